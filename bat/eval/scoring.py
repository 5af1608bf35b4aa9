"""Computes the metrics of a task from the outputs of a probe.

Labels go to their metrics unchanged. For events, outputs of time patches become probabilities, pass
a median filter over time (0 beyond the ends) and a threshold; each run of active patches is an
event. For tokens, the best output of each patch is taken, repeats are merged and blanks removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bat.errors import UserError
from bat.eval.features import Source
from bat.eval.fit import Predictions
from bat.eval.targets import FrameTargets, TokenTargets
from bat.metrics.base import Metric, find_metric
from bat.metrics.events import Event
from bat.nn.losses import NOTHING
from bat.tasks.base import Task
from bat.tasks.events import Detection


class Scorer:
    """Computes the metrics of a task; ``names``: as ``Task.metrics``, the main one first."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        multi_label: bool,
        targets_of: FrameTargets | TokenTargets | None = None,
        detection: Detection = Detection(),  # noqa: B008  (immutable)
    ) -> None:
        self.multi_label, self.targets_of, self.detection = multi_label, targets_of, detection
        self._metrics: dict[str, type[Metric]] = {}
        for name in names:
            metric, value = find_metric(name)
            self._metrics[value] = metric
        takes = {"labels"}
        if targets_of is not None:
            takes = {"tokens"} if isinstance(targets_of, TokenTargets) else {"labels", "events"}
        for value, metric in self._metrics.items():
            if metric.takes not in takes:
                raise UserError(
                    f"metric {value} takes {metric.takes}, and here there are {', '.join(takes)}: "
                    "give the task metrics that fit its target"
                )

    @classmethod
    def of(cls, task: Task, targets_of: FrameTargets | TokenTargets | None) -> Scorer:
        return cls(
            task.metrics,
            multi_label=task.multi_label,
            targets_of=targets_of,
            detection=task.detection,
        )

    def computed(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> dict[str, Metric]:
        """Returns the metrics by the names of their values, updated with predictions of ``ids``.

        Raises ``UserError`` if outputs are not finite.
        """
        if not logits.isfinite().all():
            raise UserError(
                "the classifier's outputs are not finite: training diverged; lower optim.lr"
            )
        made = {metric: self._made(metric, found) for metric in set(self._metrics.values())}
        for metric in made.values():
            if metric.takes == "labels":
                metric.update(logits, found.targets)
        for takes, pairs in (("events", self._events), ("tokens", self._tokens)):
            wanted = [metric for metric in made.values() if metric.takes == takes]
            for pair in pairs(logits, found, source, ids) if wanted else ():
                for metric in wanted:
                    metric.update(*pair)
        return {value: made[metric] for value, metric in self._metrics.items()}

    def values(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> dict[str, Any]:
        """Returns all values that the metrics compute, those of the task first."""
        return values_of(self.computed(logits, found, source, ids))

    def _made(self, metric: type[Metric], found: Predictions) -> Metric:
        settings: dict[str, Any] = {}
        if metric.takes == "labels":
            settings = {"multi_label": self.multi_label, "groups": found.clips}
        elif metric.takes == "tokens":
            assert isinstance(self.targets_of, TokenTargets)
            settings = {"joiner": self.targets_of.joiner}
        else:
            assert isinstance(self.targets_of, FrameTargets)
            settings = {
                "classes": self.targets_of.classes,
                "collar_seconds": self.detection.collar_seconds,
                "segment_seconds": self.detection.segment_seconds,
            }
        return metric(**settings)

    def _events(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> Iterator[tuple[list[Event], list[Event]]]:
        assert isinstance(self.targets_of, FrameTargets)
        keys = source.readable(ids)
        if len(keys) != found.total:
            raise UserError("too many clips cannot be read to tell whose events were predicted")
        hop = self.targets_of.hop_seconds
        for key, rows in zip(keys, by_clip(logits.sigmoid(), found), strict=True):
            seconds = len(rows) * hop
            true = [event for event in self.targets_of.reference(key) if event[0] < seconds]
            yield detected(rows, self.detection, hop_seconds=hop), true

    def _tokens(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> Iterator[tuple[list[str], list[str]]]:
        assert isinstance(self.targets_of, TokenTargets)
        names = self.targets_of.names
        best = by_clip(logits.argmax(1, keepdim=True), found)
        for rows, target in zip(best, found.targets.tolist(), strict=True):
            numbers = greedy(rows[:, 0].astype(int).tolist())
            yield [names[n] for n in numbers], [names[n] for n in target if n != NOTHING]


def values_of(computed: dict[str, Metric]) -> dict[str, Any]:
    """Returns all values of the metrics, in their order, each metric computed once."""
    found: dict[str, Any] = {}
    for metric in dict.fromkeys(computed.values()):
        found |= metric.compute()
    asked = {name: found[name] for name in computed}
    return asked | {name: value for name, value in found.items() if name not in asked}


def greedy(best: Sequence[int]) -> list[int]:
    """Decodes the best output of each time patch: repeats merged, blanks removed."""
    changed = [n for i, n in enumerate(best) if not i or n != best[i - 1]]
    return [n for n in changed if n]


def by_clip(rows: Tensor, found: Predictions) -> list[NDArray[np.float64]]:
    """Splits the (n steps, C) rows of all clips into (T steps, C) of each."""
    assert found.clips is not None
    steps = len(rows) // len(found.clips)
    counts = (steps * found.clips.bincount(minlength=found.total)).tolist()
    return [part.double().numpy() for part in rows.split(counts)]


def detected(
    probabilities: NDArray[np.float64], how: Detection, *, hop_seconds: float
) -> list[Event]:
    """Returns the events in (T, C) probabilities of time patches of ``hop_seconds``."""
    T, C = probabilities.shape
    side = how.median // 2
    padded = np.pad(probabilities, ((side, side), (0, 0)))  # (T + median - 1, C)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * side + 1, axis=0)
    on = np.zeros((T + 2, C), np.int8)
    on[1:-1] = np.median(windows, axis=-1) >= how.threshold
    found = []
    for c in range(C):
        turns = np.diff(on[:, c])
        starts, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
        if how.edge == "start":
            ends = ends - 1
        found += [
            (float(start * hop_seconds), float(end * hop_seconds), c)
            for start, end in zip(starts, ends, strict=True)
        ]
    return found
