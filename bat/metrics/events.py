"""Computes metrics of detected events: event-based F1 by onset, segment-based F1.

Event-based, as in sed_eval with ``event_matching_type="optimal"`` and onsets only: in each clip and
class an estimated event matches a reference event if their onsets are at most ``collar_seconds``
apart, each at most once, in the largest possible matching. Matches, estimates and references are
summed over clips:

    P = matches / estimates    R = matches / references    F1 = 2 P R / (P + R)

Segment-based: a class is active in a segment of ``segment_seconds`` if one of its events overlaps
it; F1 over all segments and classes. The macro mean is over the classes that have a reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bat.metrics.base import Counted, Value

Event = tuple[float, float, int]
"""Onset and offset in seconds, and the class."""
Floats = NDArray[np.float64]


def pairs(
    estimated: Sequence[float], reference: Sequence[float], collar: float
) -> list[tuple[int, int]]:
    """Returns pairs (estimated, reference) of the indices of onsets at most ``collar`` apart, the
    largest one-to-one matching."""
    one, other = (sorted(range(len(x)), key=x.__getitem__) for x in (estimated, reference))
    found = []
    i = j = 0
    while i < len(one) and j < len(other):  # pairing the earliest is optimal
        a, b = estimated[one[i]], reference[other[j]]
        if math.fabs(a - b) <= collar:
            found.append((one[i], other[j]))
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    return found


def matches(estimated: Sequence[float], reference: Sequence[float], collar: float) -> int:
    """Counts the ``pairs``."""
    return len(pairs(estimated, reference, collar))


def _f1(counts: Floats) -> Floats:
    """Returns F1 of counts (..., 3), right, estimated, true -> (...); 0 / 0 is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2])


def _macro(counts: Floats) -> Floats:
    """Returns the macro F1, (R, C, 3) -> (R,), the mean over classes with a reference."""
    there = counts[..., 2] > 0
    scores = np.where(there, np.nan_to_num(_f1(counts)), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return scores.sum(-1) / there.sum(-1)


class Events(Counted):
    """Event metrics; ``update(estimated, reference)`` takes the events of one clip."""

    takes: ClassVar = "events"
    values: ClassVar = {
        "event_f1": Value("event onset F1"),
        "event_f1_macro": Value("macro event onset F1"),
        "segment_f1": Value("segment F1"),
    }
    ratios: ClassVar = {"event_f1": _f1, "event_f1_macro": _macro, "segment_f1": _f1}

    def __init__(
        self, *, classes: int, collar_seconds: float = 0.2, segment_seconds: float = 1.0
    ) -> None:
        super().__init__()
        self.classes, self.collar = classes, collar_seconds
        self.segment = segment_seconds

    def update(self, predicted: Sequence[Event], true: Sequence[Event]) -> None:
        each = np.zeros((self.classes, 3))
        for c in {event[2] for event in (*predicted, *true)}:
            ours, theirs = ([e[0] for e in events if e[2] == c] for events in (predicted, true))
            each[c] = matches(ours, theirs, self.collar), len(ours), len(theirs)
        cells = [self._cells(events) for events in (predicted, true)]
        right = len(cells[0] & cells[1])
        self.counts["event_f1"].append(each.sum(0))
        self.counts["event_f1_macro"].append(each)
        self.counts["segment_f1"].append(np.array([right, len(cells[0]), len(cells[1])], float))

    def _cells(self, events: Sequence[Event]) -> set[tuple[int, int]]:
        """Returns the pairs ``(segment, class)`` that events overlap."""
        return {
            (segment, c)
            for onset, offset, c in events
            for segment in range(math.floor(onset / self.segment), math.ceil(offset / self.segment))
        }


METRICS = (Events,)
