"""Composes settings (schema < fragments < recipe < command line) and reports all errors at once.

A recipe is a YAML mapping: ``use:`` lists fragments (``model/B``), all other keys are values of
the schema. On the command line ``key=value`` sets a value (dots reach into sections) and
``model=S``, ``hardware=ddp`` replace the recipe's fragment of that group. A fragment of ``LATE``
overrides the recipe's values, but not single values: ``protocol=unmute`` overrides the recipe.

The section ``objective`` has the settings of the objective ``objective.name`` (``objective=mae``
picks a fragment that sets it). If it differs from the recipe's, the recipe's section is dropped.
"""

from __future__ import annotations

import copy
import difflib
import functools
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bat import ranges
from bat.config import locate
from bat.config.schema import OBJECTIVE, objective_settings
from bat.errors import UserError

T = TypeVar("T")

log = logging.getLogger("bat")

LATE = ("protocol",)
"""Groups whose fragment, if picked on the command line, overrides the recipe's own values."""

MOVED = ("mask", "ema")
"""Sections of earlier versions that are now part of an objective."""
GONE = {
    "health.worker_restarts": "a loader worker that dies ends the run with exit code 75, and the "
    "same command continues it",
    "control": "say permute_labels=true",
    "insight.curve": "it is diagnostics.curve",
    "insight.encoder": "it is diagnostics.encoder",
    "insight.clips": "it is diagnostics.clips",
    "insight.maps": "it is diagnostics.maps",
    "head.kernel": "prototypes pool by the portable kernel alone",
    "online.head.kernel": "prototypes pool by the portable kernel alone",
}
"""Keys of earlier versions, with a message about their replacement."""

Source = tuple[str, dict[str, Any]]
"""Source of settings, for messages, and ``{"section.name": value}``."""


def compose_early(schema: type[T], command: str, overrides: list[str]) -> T | None:
    """Composes without the section ``objective``, whose settings cannot be known without torch.

    Returns None if there are problems; ``compose`` reports all of them.
    """
    try:
        return compose(schema, command, overrides, objective=False)
    except UserError:
        return None


def compose(schema: type[T], command: str, overrides: list[str], *, objective: bool = True) -> T:
    """Resolves one configuration of ``bat-COMMAND``.

    ``overrides``: the ``key=value`` words of the command line; ``recipe=`` is required.
    ``objective``: include the section of that name and check it.
    Raises ``UserError`` naming every unknown key, wrong type and bad value found.
    """
    words = _words(overrides, command)
    recipe = words.pop("recipe", None)
    if recipe is None:
        known = ", ".join(locate.known_recipes(command))
        yours = "data.root=FOLDER" if command == "pretrain" else "data.csv=labels.csv"
        if "data.root" in words:
            yours = "recipe=own task=folder (the names of its folders are the labels)"
        raise UserError(
            f"no recipe given: say recipe=toy to try it, or {yours} for audio of your own. "
            f"Known: {known}"
        )
    path = locate.find_recipe(str(recipe), command)
    body = _read(path)
    uses = body.pop("use", None) or []
    if not isinstance(uses, list):
        raise UserError(f"{path}: 'use' must be a list of fragments such as model/B")

    def fragments(names: list[str]) -> list[Source]:
        files = {n: locate.find_fragment(n, beside=path.parent) for n in names}
        return [(f"fragment {n}", dict(_leaves(_read(file)))) for n, file in files.items()]

    sections = [g for g in words if isinstance(words[g], str) and locate.known_fragments(g)]
    picked = {g: words.pop(g) for g in sections if g in schema.__dataclass_fields__}  # type: ignore[attr-defined]
    kept = [u for u in map(str, uses) if u.partition("/")[0] not in picked]
    replaced = [u for u in map(str, uses) if u not in kept and u.startswith("objective/")]
    base, own = fragments(kept), (f"recipe {path.name}", dict(_leaves(body)))
    new = fragments([f"{g}/{leaf}" for g, leaf in picked.items() if g not in LATE])
    late = fragments([f"{g}/{leaf}" for g, leaf in picked.items() if g in LATE])
    line = ("command line", words)

    kind: Any = schema
    bare = not objective and "objective" in kind.__dataclass_fields__
    config = OmegaConf.structured(kind(objective={})) if bare else _defaults(schema)
    if objective and "objective" in config:
        first = _objective([*fragments(replaced), *base, own]) or OBJECTIVE
        chosen = _objective([*new, line]) or first
        config.objective = OmegaConf.structured(objective_settings(chosen))
        if chosen != first:
            *base, own = _without_objective([*base, own], first, chosen)
    sources = [*base, *new, own, *late, line, ("command line", {"recipe": path.stem})]
    if not objective:
        sources = [(s, {k: v for k, v in d.items() if not _is_objective(k)}) for s, d in sources]
    problems = _set_all(config, sources)
    result: Any = None
    if not problems:
        try:
            result = OmegaConf.to_object(config)
            problems = list(ranges.problems(result, without="" if objective else "objective"))
        except OmegaConfBaseException as error:
            problems = [str(error).splitlines()[0]]
    if problems:
        raise UserError("\n  ".join(["the configuration has problems:", *problems]))
    return result


def _objective(sources: list[Source]) -> str | None:
    """Returns the ``objective.name`` set by the last of the sources."""
    names = [leaves["objective.name"] for _, leaves in sources if "objective.name" in leaves]
    return str(names[-1]) if names else None


def _without_objective(sources: list[Source], old: str, new: str) -> list[Source]:
    """Drops a recipe's settings of objective ``old``, since ``new`` has others."""
    gone = [k for _, leaves in sources for k in leaves if _is_objective(k)]
    if gone:
        log.warning(
            "objective %s in the place of the recipe's %s: not used %s", new, old, ", ".join(gone)
        )
    return [(s, {k: v for k, v in d.items() if not _is_objective(k)}) for s, d in sources]


def _is_objective(key: str) -> bool:
    return key == "objective" or key.startswith("objective.")


def words_of(config: Any, command: str) -> list[str] | None:
    """Returns the words of ``bat-COMMAND`` that compose to ``config``, ``recipe=`` first.

    Fragments on the command line are returned as such if they set more than one value. None if the
    recipe was given by a path, which a configuration does not keep.
    """
    if config.recipe not in locate.known_recipes(command):
        return None
    wanted = dict(_leaves(to_dict(config)))

    def missing(words: list[str]) -> dict[str, Any] | None:
        """Returns the values that ``words`` do not set; None if ``words`` cannot be composed."""
        try:
            made = dict(_leaves(to_dict(compose(type(config), command, words))))
        except UserError:
            return None
        return {k: v for k, v in wanted.items() if v != made.get(k, made)}

    words = [f"recipe={config.recipe}"]
    left = missing(words) or {}
    for group in sorted({key.partition(".")[0] for key in left} - {"objective"}):
        for leaf in locate.known_fragments(group):
            sets = _leaves(_read(locate.find_fragment(f"{group}/{leaf}")))
            if not any(key in left for key, _ in sets):
                continue
            fewer = missing([*words, f"{group}={leaf}"])
            if fewer is not None and len(fewer) < len(left) - 1:
                best, left = f"{group}={leaf}", fewer
                words = [w for w in words if not w.startswith(f"{group}=")] + [best]
    return words + [word(key, value) for key, value in left.items()]


def word(key: str, value: Any) -> str:
    """Formats ``key=value`` for the command line (not quoted for a shell)."""
    value = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return f"{key}={text}"


def words_from(settings: Mapping[str, Any]) -> list[str]:
    """Returns the words ``key=value`` of the command line for settings from Python.

    A mapping is a section (``{"data": {"csv": "a.csv"}}`` is ``data.csv=a.csv``; an empty one sets
    nothing). Values are text, numbers, None, paths, NumPy's scalars and arrays, and lists of these.
    Raises ``UserError`` for each value of another type.
    """
    words, problems = [], []
    for key, value in _leaves(settings):
        try:
            if not isinstance(value, Mapping):
                words.append(word(key, _plain(value)))
        except (yaml.YAMLError, TypeError):
            kind = type(value).__name__
            problems.append(f"{key} is a {kind}: give text, a number, None, a path or a list")
    if problems:
        raise UserError("; ".join(problems))
    return words


def _plain(value: Any) -> Any:
    """Returns ``value`` as YAML can write it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, torch
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """Returns the resolved configuration as YAML with every value written out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config) if is_dataclass(config) else config))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the resolved configuration as plain dictionaries, lists and scalars."""
    return asdict(config)


def from_yaml(schema: type[T], path: Path) -> T:
    """Reads a configuration written by ``to_yaml`` (a run's ``config.yaml``), strictly."""
    config = _defaults(schema)
    source = (str(path), dict(_leaves(_read(path))))
    if "objective" in config:
        name = _objective([source]) or OBJECTIVE
        config.objective = OmegaConf.structured(objective_settings(name))
    problems = _set_all(config, [source])
    if problems:
        raise UserError("\n  ".join([f"{path} does not fit this version:", *problems]))
    result: Any = OmegaConf.to_object(config)
    return result


def _defaults(schema: type) -> DictConfig:
    """Returns ``OmegaConf.structured(schema)``, which takes 50 ms, at the cost of a copy."""
    return copy.deepcopy(_structured(schema))


_structured = functools.cache(OmegaConf.structured)


def _words(overrides: list[str], command: str) -> dict[str, Any]:
    words: dict[str, Any] = {}
    for word in overrides:
        key, eq, text = word.partition("=")
        if not eq or not key:
            hint = f" Did you mean {_meant(word, command)}?" if "=" not in word else ""
            raise UserError(f"'{word}' is not key=value.{hint} See bat-{command} --help")
        if key in words:
            raise UserError(f"'{key}' is given twice on the command line: keep one")
        try:
            words[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]  # type: ignore[index, call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"cannot read the value of {key}={text}: {error}") from error
    return words


def _meant(word: str, command: str) -> str:
    """Returns the setting that a bare ``word`` was probably meant for."""
    if Path(word).is_dir() or word.endswith("/"):
        return f"{'data.root' if command == 'pretrain' else 'checkpoint'}={word}"
    if "." in word and not word.endswith((".csv", ".yaml")):
        return f"{word}=VALUE"
    return f"{'data.csv' if word.endswith('.csv') else 'recipe'}={word}"


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML in UTF-8: {error}") from error
    if plain is None:
        raise UserError(f"{path} must be a YAML mapping of settings")
    return {str(k): v for k, v in plain.items()}


@functools.lru_cache
def _parse(text: str) -> Any:
    """Returns the mapping written in ``text``, None if it is something else."""
    loaded = OmegaConf.load(io.StringIO(text))
    return OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves({str(k): v for k, v in value.items()}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set_all(config: DictConfig, sources: list[Source]) -> list[str]:
    """Sets the leaves of all sources in order; returns what is wrong with any of them."""
    known = list(_schema_leaves(config))
    found = [_set(config, known, k, v, source) for source, d in sources for k, v in d.items()]
    return [problem for problem in found if problem]


def _set(config: DictConfig, known: list[str], key: str, value: Any, source: str) -> str:
    """Sets one leaf, or returns what is wrong with it. ``known``: all keys."""
    if key not in known:
        return _unknown(known, key, source)
    if re.search(r"\$\{[^}]*:", str(value)):
        return (
            f"'{key}={value}' ({source}) asks for something outside the configuration, such as an "
            "environment variable, which would be written down with the run: write the value"
        )
    before = OmegaConf.select(config, key)
    if isinstance(value, bool) and isinstance(before, str):
        value = "on" if value else "off"  # YAML 1.1 reads the word as a boolean
    if isinstance(before, ListConfig) and not isinstance(value, list):
        value = [] if value is None else [value]  # a list of one needs no brackets
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        first = str(error.msg if hasattr(error, "msg") else error).splitlines()[0]
        return f"'{key}={value}' ({source}) has the wrong type: {first}"
    return ""


def _unknown(known: list[str], key: str, source: str) -> str:
    """Returns a message about a key that is none, with the key that was probably meant."""
    if any(k.startswith(f"{key}.") for k in known):
        return f"'{key}' ({source}) is a section: set {key}.NAME=..., or pick a fragment"
    if key.partition(".")[0] in MOVED and "objective.name" in known:
        return f"'{key}' ({source}) is now 'objective.{key}'"
    if key in GONE:
        return f"'{key}' ({source}) is gone: {GONE[key]}"
    if key == "checkpoint" and "init" in known:
        return f"'{key}' ({source}) is for bat-probe and bat-finetune: say init=CHECKPOINT"
    leaf = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close += [k for k in known if k.rpartition(".")[2] == leaf]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown key '{key}' ({source}){hint}"


def _schema_leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _schema_leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
