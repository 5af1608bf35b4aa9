"""Finds encoders, objectives, probes, tasks and metrics by name, without a table of names.

A name is either a file in the folder of its kind, whose constant (``ENCODER``, ``OBJECTIVE``, ...)
holds the class, or the dotted path ``package.module.Class`` of any class.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from bat.errors import UserError

T = TypeVar("T")

PACKAGE = Path(__file__).parent
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def known(folder: str) -> list[str]:
    """Returns the sorted module names of ``bat/FOLDER`` except ``base``; imports nothing."""
    found = pkgutil.iter_modules([str(PACKAGE / folder)])
    return sorted(m.name for m in found if m.name != "base" and not m.ispkg)


def find_class(name: str, base: type[T], *, folder: str, key: str) -> type[T]:
    """Returns the subclass of ``base`` called ``name``.

    Args:
        name: a file of ``bat/FOLDER``, or a dotted ``package.module.Class``.
        base: required base class.
        folder: ``encoders``, ``objectives``, ...
        key: the setting that ``name`` was given as, for messages.

    Raises:
        UserError: if it is unknown (lists the known), cannot be imported, or is of another kind.
    """
    if "." in name:
        return import_class(name, base, key=key)
    if name not in known(folder):
        raise unknown(name, known(folder), key=key)
    constant = base.__name__.upper()
    found = getattr(importlib.import_module(f"bat.{folder}.{name}"), constant)
    assert issubclass(found, base), f"{constant} of bat/{folder}/{name}.py"
    return found


def import_class(name: str, base: type[T], *, key: str) -> type[T]:
    """Returns the subclass of ``base`` at dotted path ``name``. Raises ``UserError``."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {key}={name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}={name} is not a subclass of {base.__module__}.{base.__name__}")
    return found


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
