"""Base class of metrics, and the names, titles and directions of their values.

A metric is fed clip by clip (``update``) and computes one value or several (``compute``), each
under a name that tasks, results and reports use. One file of this folder holds a family of them in
``METRICS``; a class from outside is named by ``package.module.Class.value``.

Importing this file and the families does not import torch, so that reports open quickly.
"""

from __future__ import annotations

import abc
import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

import bat.metrics
from bat.errors import UserError
from bat.metrics.bootstrap import draws


@dataclass(frozen=True)
class Value:
    """One number that a metric computes."""

    title: str
    """Title for headings and axes."""
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True
    """True for a fraction, shown in percent."""
    most: float = 1.0
    """Greatest possible value; the least is 0."""
    bootstrap: bool = True
    """True if ``replicates`` can resample the clips."""

    @property
    def worst(self) -> float:
        """Returns the least value, or the greatest if lower is better."""
        return 0.0 if self.better == "higher" else self.most


class Metric(abc.ABC):
    """Collects predictions of clips, then computes its values."""

    takes: ClassVar[Literal["labels", "events", "thresholds", "tokens"]]
    """Kind of input that ``update`` takes for each clip, predicted and true.

    ``labels``: logits and labels (n, C) of clips or of their time patches, all at once.
    ``events``: lists of ``(onset_seconds, offset_seconds, class)``. ``thresholds``: the same for
    true; predicted ``(seconds, lists)``, the length of the clip and such a list for each threshold
    of ``bat.metrics.psds``. ``tokens``: lists of texts.
    """
    values: ClassVar[dict[str, Value]]
    """Values by the names under which ``compute`` returns them."""

    @abc.abstractmethod
    def update(self, predicted: Any, true: Any) -> None:
        """Adds one clip (``labels``: all rows)."""

    @abc.abstractmethod
    def compute(self) -> dict[str, Any]:
        """Returns the values by name, fractions if ``percent``; NaN if undefined."""

    def replicates(self, value: str, *, resamples: int, seed: int) -> NDArray[np.float64]:
        """Returns ``value`` on ``resamples`` draws of the clips with replacement: (R,)."""
        raise NotImplementedError


class Counted(Metric):
    """A metric whose values are ratios of counts that are summed over clips."""

    ratios: ClassVar[dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]]
    """Ratio of each value: ``{value: counts (R, ...) -> (R,)}``."""

    def __init__(self) -> None:
        self.counts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in self.ratios}
        """Counts of every clip, by value."""

    def compute(self) -> dict[str, Any]:
        found = dict.fromkeys(self.ratios, math.nan)
        for name, counts in self.counts.items():
            if counts:
                found[name] = float(self.ratios[name](np.sum(counts, axis=0)[None])[0])
        return found

    def replicates(self, value: str, *, resamples: int, seed: int) -> NDArray[np.float64]:
        counts = np.stack(self.counts[value])  # (clips, ...)
        blocks = draws(len(counts), resamples=resamples, seed=seed)
        found = [self.ratios[value](np.tensordot(d.astype(float), counts, 1)) for d in blocks]
        return np.concatenate(found)


@functools.cache
def families() -> dict[str, type[Metric]]:
    """Returns the metric that computes each value of this folder, by the value's name."""
    found: dict[str, type[Metric]] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(bat.metrics.__path__)):
        for metric in getattr(importlib.import_module(f"bat.metrics.{name}"), "METRICS", ()):
            found |= dict.fromkeys(metric.values, metric)
    return found


_OUTSIDE: dict[str, Value] = {}


def find_metric(name: str) -> tuple[type[Metric], str]:
    """Returns the metric that computes ``name``, and the value's name within that metric.

    ``name``: a value of this folder, or ``package.module.Class.value``. Raises ``UserError`` that
    lists the known ones.
    """
    if name in families():
        return families()[name], name
    path, _, value = name.rpartition(".")
    module, _, attribute = path.rpartition(".")
    if not module:
        close = difflib.get_close_matches(name, families(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"unknown metric {name!r}{hint}. Known: {', '.join(families())}; or the dotted path "
            "package.module.Class.value"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"metric {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Metric)) or value not in found.values:
        raise UserError(f"metric {name}: {path} is no Metric with the value {value!r}")
    _OUTSIDE.update(found.values)
    return found, value


def describe(name: str) -> Value:
    """Returns the value called ``name``; an unknown one has its name as title."""
    known = families().get(name)
    return known.values[name] if known else _OUTSIDE.get(name, Value(name))


def rank_key(name: str, value: float | None) -> float:
    """Returns a sort key that is greater if ``value`` is better, and the least if it is None."""
    if value is None or math.isnan(value):
        return -math.inf
    return value if describe(name).better == "higher" else -value
