"""Declares the range of a setting in the type of its field, and checks settings against them.

    width: PositiveInt = 768
    drop_path: Annotated[float, Range(0, 1, open="high")] = 0.0

OmegaConf ignores the annotation. ``problems`` checks a settings object with all its sections and
reports everything that is wrong at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Annotated, Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """An interval of numbers; ``open`` says which of its ends is excluded."""

    low: float = -inf
    high: float = inf
    open: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high < inf:
            left = "(" if self.open in ("low", "both") else "["
            right = ")" if self.open in ("high", "both") else "]"
            return f"lie in {left}{self.low:g}, {self.high:g}{right}"
        if self.low == 0:
            return "be positive" if self.open else "not be negative"
        return f"be at least {self.low:g}"


PositiveInt = Annotated[int, Range(1)]
AtLeastTwo = Annotated[int, Range(2)]
CountOrZero = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open="low")]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
DecayFactor = Annotated[float, Range(0, 1, open="low")]
Rate = Annotated[float, Range(0, 1, open="high")]
"""A drop rate or a decay: 1 is excluded."""
OpenFraction = Annotated[float, Range(0, 1, open="both")]


def problems(settings: Any, section: str = "", *, without: str = "") -> Iterator[str]:
    """Yields a message for every value out of its range and every rule that is broken, naming the
    key. Rules of several values are the section's own ``problems()``.

    ``without``: a section that is left out, and with it the rules of the whole.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    prefix = f"{section}." if section else ""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            if field.name != without:
                yield from problems(value, prefix + field.name)
        elif (allowed := _range_in(hints[field.name])) is not None:
            values = value if isinstance(value, list) else [value]
            if any(isinstance(v, int | float) and v not in allowed for v in values):
                yield f"{prefix}{field.name}={value} must {allowed}"
    if not without and hasattr(settings, "problems"):
        found = settings.problems()
        yield from [found] if isinstance(found, str) else found


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _range_in(hint: Any) -> Range | None:
    """Returns the range declared anywhere in ``hint``, as in ``list[PositiveFloat] | None``."""
    if isinstance(hint, Range):
        return hint
    found = (_range_in(part) for part in get_args(hint))
    return next((part for part in found if part is not None), None)


def changed(settings: Any, names: tuple[str, ...], defaults: Any) -> list[str]:
    """Returns those of ``names`` whose values differ from ``defaults``."""
    return [name for name in names if getattr(settings, name) != getattr(defaults, name)]
