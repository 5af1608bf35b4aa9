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
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bat import ranges, registry
from bat.config import locate, schema
from bat.errors import UserError

SCHEMAS: dict[str, Any] = {
    "pretrain": schema.Pretrain,
    "finetune": schema.Finetune,
    "probe": schema.Probe,
}
UNITS = {
    "seconds": "s", "minutes": "min", "gb": "GB", "sample_rate": "Hz", "every": "steps",
    "steps": "steps", "epochs": "epochs", "batch": "clips", "clips": "clips", "window": "clips",
    "frames": "frames", "n_mels": "mel bins", "n_fft": "samples", "hop_length": "samples",
}  # fmt: skip
"""Units by a setting's name or its last word."""
WORDS = {"bool": "true | false", "None": "null"} | {
    name: f"{kind.__origin__.__name__}, {kind.__metadata__[0]}".replace("lie ", "").replace(
        "be ", ""
    )
    for name, kind in vars(ranges).items()
    if typing.get_origin(kind) is typing.Annotated
}
"""Words for types: ``PositiveInt`` is ``int, at least 1``."""


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
        file = registry.PACKAGE / folder / f"{name}.py"
        if folder == "probes":
            table = re.search(r"^PROBES\b.*?\}", file.read_text("utf-8"), re.M | re.S)
            for probe, kind in re.findall(r'"(\w+)": (\w+)', table[0] if table else ""):
                found[probe] = sentence(ast.get_docstring(_classes(file)[kind]))
        else:
            found[name] = sentence(ast.get_docstring(_parse(file)))
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
        names = {part for s in known for part in (s.key, *s.key.split("."))}
        close = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f": did you mean {close[0]}?" if close else ": say a key, or a section such as data"
        raise UserError(f"no setting of bat-{command} is called {name}{hint}")
    return found


def _settings(section: Any, prefix: str) -> Iterator[Setting]:
    meanings: dict[str, str] = {}
    for base in reversed(type(section).__mro__[:-1]):
        file = Path(str(sys.modules[base.__module__].__file__))
        meanings |= _meanings(_classes(file)[base.__name__])
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
            yield _setting(key, str(field.type), value, meanings[field.name])


def _from_source(
    node: ast.ClassDef, classes: dict[str, ast.ClassDef], prefix: str
) -> Iterator[Setting]:
    """Yields the settings of a dataclass that cannot be imported without torch; of those that it
    inherits, the ones with another default."""
    meanings = _inherited(node) | {name: said for name, said in _meanings(node).items() if said}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and line.value is not None:
            name, hint = ast.unparse(line.target), ast.unparse(line.annotation)
            if hint in classes:
                yield from _from_source(classes[hint], classes, f"{prefix}{name}.")
            elif hint in (others := _objective_of(hint)):
                words = [k for call in ast.walk(line.value) if isinstance(call, ast.Call)
                         for k in call.keywords if k.arg != "default_factory"]  # fmt: skip
                given = {f"{prefix}{name}.{k.arg}": ast.literal_eval(k.value) for k in words}
                for found in _from_source(others[hint], others, f"{prefix}{name}."):
                    if found.key in given:
                        yield found._replace(default=json.dumps(given[found.key]))
            else:
                value = ast.literal_eval(line.value)
                yield _setting(f"{prefix}{name}", hint, value, meanings[name])


def _objective_of(name: str) -> dict[str, ast.ClassDef]:
    """Returns the classes of the objective's file that has a class of this name; else none."""
    for file in (registry.PACKAGE / "objectives").glob("*.py"):
        if name in (classes := _classes(file)):
            return classes
    return {}


def _inherited(node: ast.ClassDef) -> dict[str, str]:
    """Returns the meanings of the fields that a Config inherits: ``class Config(MAE.Config)``."""
    found: dict[str, str] = {}
    for base in map(ast.unparse, node.bases):
        if config := _objective_of(base.partition(".")[0]).get("Config"):
            found |= _inherited(config) | _meanings(config)
    return found


def _setting(key: str, hint: str, value: Any, meaning: str) -> Setting:
    """``hint``: the type as it is written in the source."""
    literal = re.fullmatch(r"Literal\[(.*)\]( \| None)?", hint)
    values = ast.literal_eval(f"({literal[1]},)") if literal else ()
    values = ("true", "false") if hint == "bool" else values
    kind = hint.replace(f"Literal[{literal[1]}]", " | ".join(values)) if literal else hint
    kind = re.sub(r"\w+", lambda word: WORDS.get(word[0], word[0]), kind)
    name = key.rpartition(".")[2]
    unit = UNITS.get(name) or UNITS.get(name.rpartition("_")[2])
    kind += f", in {unit}" if unit and not values else ""
    default = value if isinstance(value, str) else json.dumps(value)
    return Setting(key, kind, default, " ".join(meaning.replace("``", "").split()), values)


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
            text = said.value if isinstance(said, ast.Constant) else ""
            found[ast.unparse(line.target)] = str(text)
    return found


def sentence(docstring: str | None) -> str:
    """Returns the first sentence of a docstring, without its full stop."""
    text = " ".join((docstring or "").partition("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", text.replace("``", ""))[0].removesuffix(".")
