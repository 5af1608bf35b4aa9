"""Computes the polyphonic sound detection score (Bilen et al. 2020, arXiv 1910.08440).

Each probability threshold makes a set of detections. With overlap(d, g) in seconds:

- a detection is *relevant* if the events of its class cover at least ``dtc`` of it; a reference
  event is *found* if the relevant detections of its class cover at least ``gtc`` of it;
- the other detections are false positives, and one that the events of another class k cover at
  least ``cttc`` of is a *cross-trigger* on k besides;
- of class c, with rates an hour: TPR = found / events, FPR = false positives / duration of all
  recordings, CTR_k = cross-triggers on k / duration of the events of k, and
  eFPR = FPR + alpha_ct mean_k CTR_k;
- TPR as a function of eFPR is the best of the thresholds up to there. With its mean and standard
  deviation over the classes, PSDS = 1 / E  integral from 0 to E of max(0, mean - alpha_st std).

Equal to the package psds_eval (0.5) except where it refuses or is undefined: overlapping events of
one class are joined, and classes without a reference event are left out. ``psds1`` (reaction time)
and ``psds2`` (confusions) have the constants of DCASE's task 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bat.metrics.base import Metric, Value
from bat.metrics.events import Event

Floats = NDArray[np.float64]
HOUR = 3600.0
THRESHOLDS = tuple(np.linspace(0.01, 0.99, 50).round(4).tolist())
"""Probabilities at which detections are made."""


class Scenario(NamedTuple):
    """Constants of a score, see the module's text."""

    dtc: float
    gtc: float
    cttc: float
    alpha_ct: float
    alpha_st: float = 1.0
    most_per_hour: float = 100.0
    """E, the greatest eFPR."""


SCENARIOS = {
    "psds1": Scenario(dtc=0.7, gtc=0.7, cttc=1.0, alpha_ct=0.0),
    "psds2": Scenario(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5),
}


class Psds(Metric):
    """``update(predicted, true)`` takes ``(seconds, [events at each threshold])`` of a recording
    and its reference events."""

    takes: ClassVar = "thresholds"
    values: ClassVar = {
        "psds1": Value("PSDS 1", bootstrap=False),
        "psds2": Value("PSDS 2", bootstrap=False),
    }

    def __init__(self, *, classes: int, scenarios: dict[str, Scenario] | None = None) -> None:
        self.classes, self.scenarios = classes, scenarios or SCENARIOS
        self.counts: dict[str, list[Floats]] = {name: [] for name in self.scenarios}
        """By threshold and class: events found, false positives, cross-triggers on each class."""
        self.events = np.zeros(classes)
        self.seconds_of = np.zeros(classes)
        self.seconds = 0.0

    def update(
        self, predicted: tuple[float, Sequence[Sequence[Event]]], true: Sequence[Event]
    ) -> None:
        seconds, sweep = predicted
        spans = [joined([e[:2] for e in true if e[2] == c]) for c in range(self.classes)]
        self.seconds += seconds
        self.events += [len(span) for span in spans]
        self.seconds_of += [(span[:, 1] - span[:, 0]).sum() for span in spans]
        if not any(self.counts.values()):
            empty = np.zeros((self.classes, 2 + self.classes))
            self.counts = {name: [empty.copy() for _ in sweep] for name in self.scenarios}
        every = np.concatenate(spans)  # (m, 2), events of all classes
        owner = np.repeat(np.arange(self.classes), [len(span) for span in spans])
        of_class = (owner[:, None] == np.arange(self.classes)).astype(np.float64)  # (m, C)
        for t, events in enumerate(sweep):
            for c in {event[2] for event in events}:
                found = np.array([e[:2] for e in events if e[2] == c])  # (n, 2)
                shared = overlaps(found, every)  # (n, m)
                parts = shared @ of_class / (found[:, 1] - found[:, 0])[:, None]  # (n, C)
                own = shared[:, owner == c]
                for name, at in self.scenarios.items():
                    relevant = parts[:, c] >= at.dtc
                    covered = own[relevant].sum(0) / (spans[c][:, 1] - spans[c][:, 0])
                    crossed = (parts >= at.cttc) & (parts > 0) & ~relevant[:, None]
                    crossed[:, c] = False
                    count = self.counts[name][t][c]
                    count[0] += (covered >= at.gtc).sum()
                    count[1] += (~relevant).sum()
                    count[2:] += crossed.sum(0)

    def compute(self) -> dict[str, Any]:
        return {name: self._score(name, at) for name, at in self.scenarios.items()}

    def _score(self, name: str, at: Scenario) -> float:
        there = self.events > 0
        if not there.any():
            return math.nan
        counts = np.stack(self.counts[name])[:, there]  # (thresholds, C, 2 + C)
        found, false, crossed = counts[..., 0], counts[..., 1], counts[..., 2:][..., there]
        rates = found / self.events[there]  # (thresholds, C)
        others = max(1, there.sum() - 1)
        cross = (crossed / self.seconds_of[there]).sum(-1) / others
        costs = HOUR * (false / self.seconds + at.alpha_ct * cross)
        steps = np.unique(np.append(costs[costs < at.most_per_hour], 0.0))  # (m,)
        reached = costs[None] <= steps[:, None, None]  # (m, thresholds, C)
        curves = np.where(reached, rates, 0.0).max(1)  # (m, C)
        height = np.maximum(curves.mean(1) - at.alpha_st * curves.std(1), 0.0)
        widths = np.diff(np.append(steps, at.most_per_hour))
        return float((height * widths).sum() / at.most_per_hour)


def joined(spans: Sequence[Sequence[float]]) -> Floats:
    """Returns ``spans`` (n, 2) in order, those that overlap as one."""
    found: list[list[float]] = []
    for onset, offset in sorted(map(tuple, spans)):
        if found and onset < found[-1][1]:
            found[-1][1] = max(found[-1][1], offset)
        else:
            found.append([onset, offset])
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def overlaps(one: Floats, other: Floats) -> Floats:
    """Returns the seconds that spans (n, 2) and (m, 2) share: (n, m)."""
    ends = np.minimum(one[:, None, 1], other[None, :, 1])
    return np.maximum(ends - np.maximum(one[:, None, 0], other[None, :, 0]), 0.0)


METRICS = (Psds,)
