"""Hands encoders to other libraries: the formats of ``bat-export``, ``bat-embed``, ``bat-predict``.

A format is a file of this folder with the constant ``EXPORT``, a function
``(checkpoint: str, out: Path) -> None`` that writes into the new, empty folder ``out``. Its name is
the file's, and the first line of the file's docstring describes it in ``bat-export --help``.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from bat.errors import UserError

FOLDER = Path(__file__).parent
CONSTANT = re.compile(r"^EXPORT\b", re.MULTILINE)

Export = Callable[[str, Path], None]
"""A function that writes a checkpoint (as for ``bat.load_encoder``) to an empty folder."""


def formats() -> dict[str, str]:
    """Returns the names of all formats with the first line of their docstring; imports none."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if CONSTANT.search(text):
            found[file.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def find_export(name: str) -> Export:
    """Returns the function of format ``name``. Raises ``UserError`` that lists the known ones."""
    known = list(formats())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise UserError(f"unknown format {name}{hint}. Known: {', '.join(known)}")
    made: Export = importlib.import_module(f"bat.interfaces.{name}").EXPORT
    return made


def export(name: str, checkpoint: str, out: str | Path) -> Path:
    """Writes ``checkpoint`` in format ``name`` to the folder ``out``; returns that.

    Raises ``UserError`` for an unknown format, and for an ``out`` that is not a new or empty
    folder. If the export fails, nothing is left in ``out``.
    """
    write, out = find_export(name), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give a new one, or remove it")
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(checkpoint, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if not new:
            out.mkdir(exist_ok=True)
        raise
    return out


def require(extra: str, *packages: str) -> None:
    """Raises ``UserError`` with the install command if one of ``packages`` is not installed."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise UserError(f"{', '.join(absent)} not installed: pip install 'bat-audio[{extra}]'")
