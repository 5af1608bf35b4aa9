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
from bat.eval.joining import Places, check_readable, join_windows
from bat.eval.targets import FrameTargets, TokenTargets
from bat.metrics.base import Metric, find_metric
from bat.metrics.events import Event
from bat.metrics.psds import THRESHOLDS
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
        places: Places | None = None,
    ) -> None:
        """``places``: of windows in their recordings, which are evaluated as a whole."""
        self.multi_label, self.targets_of, self.detection = multi_label, targets_of, detection
        self.places = places
        self._metrics: dict[str, type[Metric]] = {}
        for name in names:
            metric, value = find_metric(name)
            self._metrics[value] = metric
        takes = {"labels"}
        if targets_of is not None:
            takes = {"labels", "events", "thresholds"}
            takes = {"tokens"} if isinstance(targets_of, TokenTargets) else takes
        for value, metric in self._metrics.items():
            if metric.takes not in takes:
                raise UserError(
                    f"metric {value} takes {metric.takes}, and here there are {', '.join(takes)}: "
                    "give the task metrics that fit its target"
                )

    @classmethod
    def of(
        cls,
        task: Task,
        targets_of: FrameTargets | TokenTargets | None,
        places: Places | None = None,
    ) -> Scorer:
        return cls(
            task.metrics,
            multi_label=task.multi_label,
            targets_of=targets_of,
            detection=task.detection,
            places=places,
        )

    def computed(
        self,
        logits: Tensor,
        found: Predictions,
        source: Source,
        ids: NDArray[np.int64],
        *,
        names: Sequence[str] = (),
    ) -> dict[str, Metric]:
        """Returns the metrics by the names of their values, updated with predictions of ``ids``.

        ``names``: only these; empty: all. Raises ``UserError`` if outputs are not finite.
        """
        if not logits.isfinite().all():
            raise UserError(
                "the classifier's outputs are not finite: training diverged; lower optim.lr"
            )
        logits, found = self.joined(logits, found, source, ids)
        asked = {v: self._metrics.get(v) or find_metric(v)[0] for v in names or self._metrics}
        made = {metric: self._made(metric, found) for metric in set(asked.values())}
        for metric in made.values():
            if metric.takes == "labels":
                metric.update(logits, found.targets)
        kinds = {"events": self._events, "thresholds": self._sweep, "tokens": self._tokens}
        for takes, pairs in kinds.items():
            wanted = [metric for metric in made.values() if metric.takes == takes]
            for pair in pairs(logits, found, source, ids) if wanted else ():
                for metric in wanted:
                    metric.update(*pair)
        return {value: made[metric] for value, metric in asked.items()}

    def joined(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> tuple[Tensor, Predictions]:
        """Returns the predictions of recordings, whose windows are joined if they were cut."""
        if self.places is None:
            return logits, found
        frames = self.targets_of if isinstance(self.targets_of, FrameTargets) else None
        return join_windows(
            logits,
            found,
            source.readable(ids),
            self.places,
            multi_label=self.multi_label,
            hop_seconds=None if frames is None else frames.hop_seconds,
        )

    def value(
        self, name: str, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> float:
        """Returns the value ``name`` alone, which need not be one of the task's metrics."""
        return float(self.computed(logits, found, source, ids, names=[name])[name].compute()[name])

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
            settings = {"classes": self.targets_of.classes}
            if metric.takes == "events":
                settings["collar_seconds"] = self.detection.collar_seconds
                settings["segment_seconds"] = self.detection.segment_seconds
        return metric(**settings)

    def clips(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> Iterator[tuple[str, NDArray[np.float64], list[Event]]]:
        """Yields key, probabilities (T, C) of time patches and reference events of each clip."""
        assert isinstance(self.targets_of, FrameTargets)
        keys = source.readable(ids) if found.keys is None else found.keys
        check_readable(keys, found)
        hop = self.targets_of.hop_seconds
        for key, rows in zip(keys, by_clip(logits.sigmoid(), found), strict=True):
            true = self.targets_of.reference(key)
            yield key, rows, [event for event in true if event[0] < len(rows) * hop]

    def detected(self, probabilities: NDArray[np.float64]) -> list[Event]:
        """Returns the events in (T, C) probabilities, with the task's constants."""
        assert isinstance(self.targets_of, FrameTargets)
        return detected(probabilities, self.detection, hop_seconds=self.targets_of.hop_seconds)

    def _events(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> Iterator[tuple[list[Event], list[Event]]]:
        for _, rows, true in self.clips(logits, found, source, ids):
            yield self.detected(rows), true

    def _sweep(
        self, logits: Tensor, found: Predictions, source: Source, ids: NDArray[np.int64]
    ) -> Iterator[tuple[tuple[float, list[list[Event]]], list[Event]]]:
        assert isinstance(self.targets_of, FrameTargets)
        hop = self.targets_of.hop_seconds
        for _, rows, true in self.clips(logits, found, source, ids):
            smooth = smoothed(rows, self.detection.median)
            sweep = [runs(smooth >= t, hop_seconds=hop) for t in THRESHOLDS]
            yield (len(rows) * hop, sweep), true

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
    """Splits the rows of all clips, one or several a time patch, into those of each; patches that
    were not read are 0."""
    assert found.clips is not None
    steps = len(rows) // len(found.clips)
    counts = found.clips.bincount(minlength=found.total)
    parts = [part.double().numpy() for part in rows.split((steps * counts).tolist())]
    if found.patches is None:
        return parts
    assert steps == 1
    whole = []
    for part, at in zip(parts, found.patches.split(counts.tolist()), strict=True):
        row = np.zeros((int(at.max()) + 1 if len(at) else 0, rows.shape[1]))
        row[at.numpy()] = part
        whole.append(row)
    return whole


def detected(
    probabilities: NDArray[np.float64], how: Detection, *, hop_seconds: float
) -> list[Event]:
    """Returns the events in (T, C) probabilities of time patches of ``hop_seconds``."""
    on = smoothed(probabilities, how.median) >= how.threshold
    return runs(on, hop_seconds=hop_seconds, edge=how.edge)


def smoothed(probabilities: NDArray[np.float64], median: int) -> NDArray[np.float64]:
    """Returns the median of ``median`` time patches around each, zeros beyond the ends: (T, C)."""
    side = median // 2
    padded = np.pad(probabilities, ((side, side), (0, 0)))  # (T + median - 1, C)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * side + 1, axis=0)
    return np.median(windows, axis=-1)


def runs(on: NDArray[np.bool_], *, hop_seconds: float, edge: str = "end") -> list[Event]:
    """Returns an event for each run of active patches of (T, C); ``edge``: ``Detection.edge``."""
    later, earlier = {"start": (0.0, 1.0), "center": (0.5, 0.5), "end": (0.0, 0.0)}[edge]
    padded = np.pad(on.astype(np.int8), ((1, 1), (0, 0)))
    found = []
    for c in range(on.shape[1]):
        turns = np.diff(padded[:, c])
        starts, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
        found += [
            (float(start * hop_seconds), float(end * hop_seconds), c)
            for start, end in zip(starts + later, ends - earlier, strict=True)
        ]
    return found
