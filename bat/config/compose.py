"""Schema < fragments < recipe < command line, strictly, with every problem named at once.

A recipe is a YAML mapping: ``use:`` lists fragments (``model/B``), everything else are values of
the schema. On the command line ``key=value`` sets a value (dots reach into sections) and
``model=S``, ``hardware=ddp`` pick a fragment of that group, in the place of the recipe's. One of
``LATE`` is the last word but for single values: ``protocol=unmute`` overrides the recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bat.config import locate
from bat.shapes import UserError

T = TypeVar("T")

LATE = ("protocol",)
"""Groups whose fragment, picked on the command line, comes after the recipe's own values."""


def compose(schema: type[T], command: str, overrides: list[str]) -> T:
    """Resolve one configuration of ``bat-COMMAND``.

    ``overrides`` are the ``key=value`` words of the command line; ``recipe=`` is required.
    Raises ``UserError`` naming every unknown key, wrong type and bad value found.
    """
    words = _words(overrides, command)
    recipe = words.pop("recipe", None)
    if recipe is None:
        known = ", ".join(locate.known_recipes(command))
        raise UserError(f"no recipe given: say recipe=NAME. Known: {known}")
    path = locate.find_recipe(str(recipe), command)
    body = _read(path)
    uses = body.pop("use", None) or []
    if not isinstance(uses, list):
        raise UserError(f"{path}: 'use' must be a list of fragments such as model/B")

    picked = {g: w for g, w in words.items() if _is_section(schema, g) and isinstance(w, str)}
    for group in picked:
        del words[group]
    uses = [u for u in uses if str(u).partition("/")[0] not in picked]
    uses += [f"{group}/{leaf}" for group, leaf in picked.items() if group not in LATE]
    late = [f"{group}/{leaf}" for group, leaf in picked.items() if group in LATE]

    config = OmegaConf.structured(schema)
    problems: list[str] = []
    for name in uses:
        file = locate.find_fragment(str(name), beside=path.parent)
        _apply(config, _read(file), f"fragment {name}", problems)
    _apply(config, body, f"recipe {path.name}", problems)
    for name in late:
        file = locate.find_fragment(name, beside=path.parent)
        _apply(config, _read(file), f"fragment {name}", problems)
    for key, value in words.items():
        _set(config, key, value, "command line", problems)
    _set(config, "recipe", path.stem, "command line", problems)
    result: Any = None
    if not problems:
        try:
            result = OmegaConf.to_object(config)
            problems = list(_problems(result))
        except OmegaConfBaseException as error:
            problems = [str(error).splitlines()[0]]
    if problems:
        raise UserError("\n  ".join(["the configuration has problems:", *problems]))
    return result


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries, lists and scalars."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def from_yaml(schema: type[T], path: Path) -> T:
    """Read a configuration that ``to_yaml`` wrote (a run's ``config.yaml``), as strictly."""
    config = OmegaConf.structured(schema)
    problems: list[str] = []
    _apply(config, _read(path), str(path), problems)
    if problems:
        raise UserError("\n  ".join([f"{path} does not fit this version:", *problems]))
    result: Any = OmegaConf.to_object(config)
    return result


def _words(overrides: list[str], command: str) -> dict[str, Any]:
    words: dict[str, Any] = {}
    for word in overrides:
        key, eq, text = word.partition("=")
        if not eq or not key:
            hint = f" Did you mean recipe={word}?" if "=" not in word else ""
            raise UserError(f"'{word}' is not key=value.{hint} See bat-{command} --help")
        if key in words:
            raise UserError(f"'{key}' is given twice on the command line: keep one")
        try:
            words[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]  # type: ignore[index, call-overload]
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"cannot read the value of {key}={text}: {error}") from error
    return words


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML in UTF-8: {error}") from error
    plain = OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else None
    if not isinstance(plain, dict):
        raise UserError(f"{path} must be a YAML mapping of settings")
    return {str(k): v for k, v in plain.items()}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves({str(k): v for k, v in value.items()}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply(config: DictConfig, tree: dict[str, Any], source: str, problems: list[str]) -> None:
    for key, value in _leaves(tree):
        _set(config, key, value, source, problems)


def _set(config: DictConfig, key: str, value: Any, source: str, problems: list[str]) -> None:
    """Set one leaf, or say what is wrong with it."""
    known = [k for k, _ in _schema_leaves(config)]
    if key not in known:
        sections = {k.rpartition(".")[0] for k in known} - {""}
        if key in sections:
            problems.append(
                f"'{key}' ({source}) is a section: set {key}.NAME=..., or pick a fragment"
            )
            return
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if not close:
            leaf = key.rpartition(".")[2]
            close = [k for k in known if k.rpartition(".")[2] == leaf][:1]
        hint = f"; did you mean '{close[0]}'?" if close else ""
        problems.append(f"unknown key '{key}' ({source}){hint}")
        return
    if re.search(r"\$\{[^}]*:", str(value)):
        problems.append(
            f"'{key}={value}' ({source}) asks for something outside the configuration, such as an "
            "environment variable, which would be written down with the run: write the value"
        )
        return
    if isinstance(value, bool) and isinstance(OmegaConf.select(config, key), str):
        value = "on" if value else "off"  # YAML 1.1 reads the word as a truth value
    if isinstance(OmegaConf.select(config, key), ListConfig) and not isinstance(value, list):
        value = [] if value is None else [value]  # one of a list needs no brackets
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        first = str(error.msg if hasattr(error, "msg") else error).splitlines()[0]
        problems.append(f"'{key}={value}' ({source}) has the wrong type: {first}")


def _schema_leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, config):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _schema_leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node


def _is_section(schema: type, name: str) -> bool:
    return bool(locate.known_fragments(name)) and name in {f.name for f in fields(schema)}


def _problems(section: Any) -> Iterator[str]:
    yield from section.problems() if hasattr(section, "problems") else []
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            yield from _problems(value)
