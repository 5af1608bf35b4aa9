"""Finds recipes and fragments.

A recipe is looked up, in this order, as an explicit ``.yaml`` path; in ``$BAT_RECIPES``; in the
checkout beside ``bat/``; in the copies inside the installed wheel. Fragments (``configs/``) are
found in the checkout or the wheel, or beside the recipe that names them by a ``.yaml`` path.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from bat.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(kind: str) -> list[Path]:
    """Returns folders of ``kind`` (recipes, configs): the checkout's before the wheel's."""
    checkout = _PACKAGE.parent / kind
    is_checkout = (_PACKAGE.parent / "pyproject.toml").is_file()
    return [f for f in ([checkout] if is_checkout else []) + [_PACKAGE / "_shipped" / kind]
            if f.is_dir()]  # fmt: skip


def recipe_folders(command: str) -> list[Path]:
    """Returns the recipe folders of ``command`` (``pretrain``, ``finetune``, ``probe``)."""
    folders = []
    extra = os.environ.get("BAT_RECIPES")
    if extra:
        if not Path(extra).is_dir():
            raise UserError(f"BAT_RECIPES={extra} is not a folder: unset it or point it at one")
        folders += [Path(extra) / command, Path(extra)]
    folders += [f / command for f in _shipped("recipes")]
    return [f for f in folders if f.is_dir()]


def known_recipes(command: str) -> list[str]:
    """Returns the names of all recipes found for ``command``, sorted."""
    return sorted({p.stem for f in recipe_folders(command) for p in f.glob("*.yaml")})


def find_recipe(name: str, command: str) -> Path:
    """Returns the file of recipe ``name``; a ``.yaml`` path is used as given."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"recipe file {name} does not exist")
        return path
    names = dict.fromkeys((name, name.replace("-", "_")))  # urban-sed is urban_sed
    for path in (f / f"{n}.yaml" for n in names for f in recipe_folders(command)):
        if path.is_file():
            return path
    known = known_recipes(command)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UserError(
        f"unknown recipe '{name}' for bat-{command}.{hint} Known: {', '.join(known) or 'none'}; "
        "or give the path of a .yaml file"
    )


def known_fragments(group: str) -> list[str]:
    """Returns the fragments of ``group`` (``model``, ``data``, ``hardware``), sorted."""
    return sorted({p.stem for f in _shipped("configs") for p in (f / group).glob("*.yaml")})


def find_fragment(name: str, beside: Path | None = None) -> Path:
    """Returns the file of fragment ``group/name``, or of a ``.yaml`` path beside its recipe."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name) if beside is None else beside / name
        if not path.is_file():
            raise UserError(f"fragment file {path} does not exist")
        return path
    group, _, leaf = name.partition("/")
    for folder in _shipped("configs"):
        path = folder / group / f"{leaf}.yaml"
        if path.is_file():
            return path
    known = known_fragments(group)
    listed = ", ".join(f"{group}/{k}" for k in known) or "none in that group"
    hint = f". For a class of your own say {group}.name={leaf}" if group == "objective" else ""
    raise UserError(f"unknown fragment '{name}'. Known: {listed}{hint}")
