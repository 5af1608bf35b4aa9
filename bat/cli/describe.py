"""Describes recipes, components and settings, without importing torch.

The meaning of a setting is the docstring below its field, a component's line the first sentence of
its docstring, a recipe's the first line of its file. Sources are read with ``ast``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bat import ranges, registry
from bat.config import locate, schema
from bat.errors import UserError

SCHEMAS: dict[str, Any] = {
    "pretrain": schema.Pretrain,
    "finetune": schema.Finetune,
    "probe": schema.Probe,
}
UNITS = {
    "seconds": "s",
    "minutes": "min",
    "gb": "GB",
    "steps": "steps",
    "every": "steps",
    "epochs": "epochs",
    "clips": "clips",
    "batch": "clips",
    "window": "clips",
    "frames": "frames",
    "n_mels": "mel bins",
    "n_fft": "samples",
    "hop_length": "samples",
    "sample_rate": "Hz",
}
"""Units by a setting's name or its last word."""
KINDS = {**vars(ranges), "Literal": Literal}


class Setting(NamedTuple):
    key: str
    kind: str
    """Type and range in words, with the unit."""
    default: str
    meaning: str
    values: tuple[str, ...] = ()
    """All values, if they are few."""

    def text(self) -> str:
        """Returns the setting for a terminal."""
        return f"{f'{self.key}={self.default}':<38} {self.kind}\n    {self.meaning}"


def recipes(command: str) -> dict[str, str]:
    """Returns the recipes of ``bat-COMMAND`` with a line each."""
    found = {}
    for name in locate.known_recipes(command):
        text = locate.find_recipe(name, command).read_text("utf-8", "replace")
        comment = re.match(r"#(.*)", text)
        found[name] = comment[1].strip().removesuffix(".") if comment else ""
    return found


def components(folder: str) -> dict[str, str]:
    """Returns the components of ``bat/FOLDER`` (``probes``, ``tasks`` ...) with a line each."""
    found = {}
    for name in registry.known(folder):
        tree = _parse(registry.PACKAGE / folder / f"{name}.py")
        if folder == "probes":
            classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
            (table,) = (
                n.value
                for n in tree.body
                if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "PROBES"
            )
            assert isinstance(table, ast.Dict)
            for key, value in zip(table.keys, table.values, strict=True):
                assert key is not None
                found[ast.literal_eval(key)] = sentence(
                    ast.get_docstring(classes[ast.unparse(value)])
                )
        else:
            found[name] = sentence(ast.get_docstring(tree))
    return found


def settings(command: str) -> list[Setting]:
    """Returns all settings of ``bat-COMMAND``, those of every objective included."""
    kind = SCHEMAS[command]
    return list(_settings(kind(objective=None) if command == "pretrain" else kind(), ""))


def find_settings(command: str, name: str) -> list[Setting]:
    """Returns the settings called ``name``: a key, a section, or the last word of keys; all if it
    is empty. Raises ``UserError`` if there are none."""
    known = settings(command)
    found = [s for s in known if not name or f"{s.key}.".startswith(f"{name}.")]
    found = found or [s for s in known if s.key.rpartition(".")[2] == name]
    if not found:
        names = {part for s in known for part in (s.key, s.key.partition(".")[0])}
        names |= {s.key.rpartition(".")[2] for s in known}
        close = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f": did you mean {close[0]}?" if close else ": say a key, or a section such as data"
        raise UserError(f"no setting of bat-{command} is called {name}{hint}")
    return found


def _settings(section: Any, prefix: str) -> Iterator[Setting]:
    kind = type(section)
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        meanings |= _meanings(
            _classes(Path(str(sys.modules[base.__module__].__file__)))[base.__name__]
        )
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{key}.")
        elif key == "objective":
            for name in registry.known("objectives"):
                classes = _classes(registry.PACKAGE / "objectives" / f"{name}.py")
                for found in _from_source(classes["Config"], classes, f"{key}."):
                    note = f"With objective={name}: {found.meaning}"
                    yield found if name == schema.OBJECTIVE else found._replace(meaning=note)
        else:
            meaning = meanings.get(field.name, "")
            yield _setting(key, hints[field.name], _shown(value), meaning)


def _from_source(
    node: ast.ClassDef, classes: dict[str, ast.ClassDef], prefix: str
) -> Iterator[Setting]:
    """Yields the settings of a dataclass that cannot be imported without torch."""
    shared = _meanings(_classes(registry.PACKAGE / "objectives/base.py")["Config"])
    meanings = shared | {name: said for name, said in _meanings(node).items() if said}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign):
            continue
        name, hint, value = ast.unparse(line.target), ast.unparse(line.annotation), line.value
        if hint in classes:
            yield from _from_source(classes[hint], classes, f"{prefix}{name}.")
            continue
        assert value is not None
        kind = eval(hint, KINDS)  # an annotation of this package
        yield _setting(f"{prefix}{name}", kind, _shown(ast.literal_eval(value)), meanings[name])


def _setting(key: str, hint: Any, default: str, meaning: str) -> Setting:
    name = key.rpartition(".")[2]
    unit = UNITS.get(name) or UNITS.get(name.rpartition("_")[2])
    kind = _kind(hint) + (f", in {unit}" if unit and not _values(hint) else "")
    return Setting(key, kind, default, " ".join(meaning.replace("``", "").split()), _values(hint))


def _kind(hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        words = str(parts[1]).replace("be ", "").removeprefix("lie ")
        return f"{_kind(parts[0])}, {words}"
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, parts))
    if typing.get_origin(hint) is list:
        return f"list of {_kind(parts[0])}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_kind(part) for part in parts)
    return {type(None): "null", bool: "true | false"}.get(hint, getattr(hint, "__name__", ""))


def _values(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return ("true", "false") if hint is bool else ()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {n.name: n for n in ast.walk(_parse(path)) if isinstance(n, ast.ClassDef)}


def _meanings(node: ast.ClassDef) -> dict[str, str]:
    """Returns the docstrings below the fields of a class; empty where there is none."""
    found = {}
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign):
            said = after.value if isinstance(after, ast.Expr) else None
            found[ast.unparse(line.target)] = (
                str(said.value) if isinstance(said, ast.Constant) else ""
            )
    return found


def sentence(docstring: str | None) -> str:
    """Returns the first sentence of a docstring, without its full stop."""
    text = " ".join((docstring or "").partition("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", text.replace("``", ""))[0].removesuffix(".")
