"""Finds encoders, objectives, probes and tasks by name, without a table of names.

A name is either a file in the folder of its kind, whose constant (``ENCODER``, ``TASK``, ...) holds
the class or object, or the dotted path ``package.module.Name`` of any.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bat.errors import UserError

T = TypeVar("T")

PACKAGE = Path(__file__).parent
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def known(folder: str) -> list[str]:
    """Returns the sorted names of the files of ``bat/FOLDER`` with its constant (``TASK`` in
    ``tasks``; or ``PROBES``, several by name); imports nothing."""
    constant = re.compile(rf"^{folder[:-1].upper()}S?\b", re.MULTILINE)
    files = sorted((PACKAGE / folder).glob("*.py"))
    return [f.stem for f in files if constant.search(f.read_text(encoding="utf-8"))]


def takes_hub_names(encoder: str | None) -> bool:
    """Returns True if the file ``encoder`` of ``bat/encoders`` has ``HUB = True``: what follows its
    name in ``ENCODER:NAME`` need not be a path. Imports nothing."""
    if encoder not in known("encoders"):
        return False
    text = (PACKAGE / "encoders" / f"{encoder}.py").read_text(encoding="utf-8")
    return re.search(r"^HUB = True$", text, re.MULTILINE) is not None


def find_class(
    name: str,
    base: type[T],
    *,
    folder: str,
    key: str,
    table: Mapping[str, type[T]] | None = None,
) -> type[T]:
    """Returns the subclass of ``base`` called ``name``.

    Args:
        name: a file of ``bat/FOLDER``, or a dotted ``package.module.Class``.
        base: required base class.
        folder: ``encoders``, ``objectives``, ...
        key: the setting that ``name`` was given as, for messages.
        table: the classes of the folder by name, where a file may have several.

    Raises:
        UserError: if it is unknown (lists the known), cannot be imported, or is of another kind.
    """
    if table is not None and "." not in name:
        if name not in table:
            raise unknown(name, list(table), key=key)
        return table[name]
    found = _find(name, base.__name__.upper(), folder=folder, key=key)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}={name} is not a subclass of {base.__module__}.{base.__name__}")
    return found


def find_object(name: str, kind: type[T], *, folder: str, key: str) -> T:
    """Returns the object of type ``kind`` called ``name``; see ``find_class``."""
    found = _find(name, kind.__name__.upper(), folder=folder, key=key)
    if not isinstance(found, kind):
        raise UserError(f"{key}={name} is not a {kind.__module__}.{kind.__name__}")
    return found


def _find(name: str, constant: str, *, folder: str, key: str) -> Any:
    """Returns ``constant`` of the file ``name`` of ``bat/FOLDER``, or what a dotted path names."""
    if "." in name:
        module, _, constant = name.rpartition(".")
    elif name in known(folder):
        module = f"bat.{folder}.{name}"
    else:
        raise unknown(name, known(folder), key=key)
    try:
        return getattr(importlib.import_module(module), constant)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {key}={name}: {error}") from error


def unknown(name: str, names: Sequence[str], *, key: str) -> UserError:
    """Returns the error for a name that is not among ``names``, with the closest of them."""
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return UserError(
        f"unknown {key}={name}{hint}. Known: {', '.join(names)}; or a dotted package.module.Class"
    )


def split_checkpoint(text: str) -> tuple[str | None, str]:
    """Splits ``ENCODER:PATH`` into encoder name and path; ``(None, text)`` for a path alone.

    ``ENCODER`` is a file of ``bat/encoders`` or a dotted ``package.module.Class``.
    """
    name, colon, path = text.partition(":")
    named = name in known("encoders") or DOTTED.fullmatch(name) is not None
    return (name, path) if colon and named and not Path(text).exists() else (None, text)
