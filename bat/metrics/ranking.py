"""What a classifier is judged by (docs/method.md 5): accuracy, macro mAP, F1, AUROC, d-prime.

One sort a class gives average precision and AUROC, exact with ties, in float64 so that confident
logits do not tie; 527 classes of 20,000 clips take a second, where a library call for each class
and metric takes many. Tests hold every number equal to torchmetrics' and to scikit-learn's.

A class without a positive clip has no average precision, F1 or AUROC: it is left out of the macro
means and reported, never silently zero. A class without a *negative* clip has no AUROC either.
d-prime is that of the macro AUROC: ``sqrt(2)`` times the inverse normal distribution of it. Where
nothing is confused AUROC is 1 and d-prime would be infinite; it is then taken at half a pair short
of all (positive, negative) pairs, so that it stays a number that grows with the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, mean, pstdev
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bat.errors import UserError
from bat.metrics.base import Metric, Value

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Whole = NDArray[np.int64]


def evaluate(logits: Tensor, targets: Tensor, *, multi_label: bool) -> dict[str, Any]:
    """Metrics of logits (n, C) against targets (n, C) in {0, 1}: fractions, not percent.

    ``map``, ``auroc`` (one class against the rest) and ``f1``: means over classes; ``f1_micro``:
    of all decisions together; ``dprime``. One label a clip: scores are softmax probabilities and
    the class decided for is the greatest; ``accuracy`` besides, which ``f1_micro`` then equals.
    Several: scores are sigmoid probabilities, and those above 0.5 are decided for.
    ``absent``: the indices of classes that no clip has, which the means leave out. ``per_class``:
    ``ap`` and ``auroc`` (C, None where undefined) and ``positives`` (C, clips that have it).
    A mean over no class is NaN. Outputs that are not finite raise ``UserError``.
    """
    scores, hard = judged(logits, targets, multi_label=multi_label)
    n, classes = scores.shape
    best = np.arange(classes) == scores.argmax(1)[:, None]  # (n, C)
    decided = scores > 0.5 if multi_label else best
    positives = hard.sum(0)
    ranks = [ranking(scores[:, c], hard[:, c]) if positives[c] else None for c in range(classes)]
    ap = [None if r is None else r.average_precision() for r in ranks]
    auroc = [None if r is None else r.auroc() for r in ranks]

    right, wrong = (decided & hard).sum(0), (decided != hard).sum(0)  # (C,)
    f1 = [2 * r / (2 * r + w) for r, w, p in zip(right, wrong, positives, strict=True) if p]
    found: dict[str, Any] = {}
    if not multi_label:
        found["accuracy"] = float((scores.argmax(1) == hard.argmax(1)).mean())
    found["map"] = _mean(ap)
    found["f1"] = _mean(f1)
    total = 2 * right.sum() + wrong.sum()
    found["f1_micro"] = float(2 * right.sum() / total) if total else math.nan
    found["auroc"] = _mean(auroc)
    found["dprime"] = _dprime(found["auroc"], pairs=int((positives * (n - positives)).sum()))
    found["absent"] = np.flatnonzero(positives == 0).tolist()
    found["per_class"] = {"ap": ap, "auroc": auroc, "positives": positives.tolist()}
    return found


def judged(logits: Tensor, targets: Tensor, *, multi_label: bool) -> tuple[Floats, Flags]:
    """Probabilities (n, C) in float64 and what is true (n, C), both on the CPU.

    Raises ``UserError`` where an output is not finite.
    """
    if not logits.isfinite().all():
        raise UserError(
            "the classifier's outputs are not finite: training diverged; lower optim.lr"
        )
    logits = logits.detach().double().cpu()
    scores = logits.sigmoid() if multi_label else logits.softmax(1)
    return scores.numpy(), (targets.detach().cpu() >= 0.5).numpy()


class Ranking(NamedTuple):
    """One class's clips by falling score; clips of equal score are one rank.

    Only the ranks that hold a positive clip matter; there are k of them.
    """

    order: Whole
    """(n,) clips, best first."""
    starts: Whole
    """(k,) where in ``order`` those ranks begin."""
    ends: Whole
    """(k,) where they end, exclusive."""
    tops: Whole
    """(k,) positive clips down to each rank's end."""
    hits: Whole
    """(positives,) the positive clips, best first."""

    def average_precision(self) -> float:
        """Mean over the positive clips of the precision at their rank."""
        gained = np.diff(self.tops, prepend=0)
        return float((gained * self.tops / self.ends).sum() / self.tops[-1])

    def auroc(self) -> float | None:
        """Share of (positive, negative) pairs in the right order, ties by half."""
        gained = np.diff(self.tops, prepend=0)
        negatives = len(self.order) - self.tops[-1]
        if not negatives:
            return None
        tied = self.ends - self.starts - gained
        below = negatives - (self.ends - self.tops)
        return float((gained * (below + tied / 2)).sum() / (self.tops[-1] * negatives))


def ranking(scores: Floats, hard: Flags) -> Ranking:
    """Rank the clips of one class: scores (n,), positives (n,), at least one of them."""
    order = np.argsort(-scores)  # (n,)
    falling, positive = scores[order], hard[order]
    ends = np.append(np.flatnonzero(np.diff(falling)) + 1, len(order))  # of every rank
    starts = np.append(0, ends[:-1])
    tops = positive.cumsum()[ends - 1]
    held = np.diff(tops, prepend=0) > 0
    return Ranking(order, starts[held], ends[held], tops[held], order[positive])


def _mean(values: Iterable[float | None]) -> float:
    found = [float(v) for v in values if v is not None]
    return sum(found) / len(found) if found else math.nan


def _dprime(auroc: float, *, pairs: int) -> float:
    if math.isnan(auroc):
        return math.nan
    least = 1 / (2 * pairs)
    return math.sqrt(2) * NormalDist().inv_cdf(min(max(auroc, least), 1 - least))


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation (divided by n) of a metric over folds or seeds."""
    return mean(values), pstdev(values)


class Classification(Metric):
    """``update(logits, targets)``: all rows at once, as ``evaluate`` takes them."""

    takes: ClassVar = "labels"
    values: ClassVar = {
        "accuracy": Value("accuracy"),
        "map": Value("mAP"),
        "f1": Value("F1", bootstrap=False),
        "f1_micro": Value("micro F1", bootstrap=False),
        "auroc": Value("AUROC", bootstrap=False),
        "dprime": Value("d-prime", percent=False, most=math.inf, bootstrap=False),
    }

    def __init__(self, *, multi_label: bool, groups: ArrayLike | None = None) -> None:
        """``groups`` (n,): the clip of each row, where a clip has several."""
        self.multi_label, self.groups = multi_label, groups
        self._rows: tuple[Tensor, Tensor] | None = None

    def update(self, predicted: Tensor, true: Tensor) -> None:
        assert self._rows is None, "all rows come at once"
        self._rows = predicted, true

    def compute(self) -> dict[str, Any]:
        assert self._rows is not None
        return evaluate(*self._rows, multi_label=self.multi_label)

    def replicates(self, value: str, *, resamples: int, seed: int) -> Floats:
        from bat.metrics.bootstrap import replicates

        assert self._rows is not None
        how = {"multi_label": self.multi_label, "groups": self.groups}
        return replicates(*self._rows, metric=value, resamples=resamples, seed=seed, **how)  # type: ignore[arg-type]


METRICS = (Classification,)
