"""Computes metrics of classifiers (docs/method.md 5): accuracy, mAP, F1, AUROC, d-prime.

One sort per class gives average precision and AUROC, exact with ties, in float64 so that confident
logits do not tie; 527 classes of 20,000 clips take a second, while a library call for each class
and metric takes many. The tests compare every value with torchmetrics and scikit-learn. For the
bootstrap, accuracy is one product with the counts of the draws, and mAP sorts each class once and
sums the counts between its positive clips; each value equals ``evaluate`` of the drawn rows.

A class without a positive clip has no average precision, F1 or AUROC: it is excluded from the macro
means and reported, never counted as zero. A class without a *negative* clip has no AUROC either.
d-prime is that of the macro AUROC: ``sqrt(2)`` times the inverse normal distribution of it. For a
perfect ranking AUROC is 1 and d-prime would be infinite; it is then computed from an AUROC half a
pair short of all (positive, negative) pairs, so that it is finite and grows with their number.
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
from bat.metrics.bootstrap import draws

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Whole = NDArray[np.int64]


def evaluate(logits: Tensor, targets: Tensor, *, multi_label: bool) -> dict[str, Any]:
    """Returns metrics of logits (n, C) against targets (n, C) in {0, 1}: fractions, not percent.

    ``map``, ``auroc`` (one class against the rest) and ``f1``: means over classes; ``f1_micro``:
    over all decisions together; ``dprime``. One label per clip: scores are softmax probabilities
    and the predicted class is the greatest; also ``accuracy``, which ``f1_micro`` then equals.
    Several: scores are sigmoid probabilities, and classes above 0.5 are predicted.
    ``absent``: the indices of classes that no clip has, which the means exclude. ``per_class``:
    ``ap`` and ``auroc`` (C, None if undefined) and ``positives`` (C, clips that have it).
    A mean over no class is NaN. Raises ``UserError`` if outputs are not finite.
    """
    scores, hard = _scores(logits, targets, multi_label=multi_label)
    n, classes = scores.shape
    best = np.arange(classes) == scores.argmax(1)[:, None]  # (n, C)
    decided = scores > 0.5 if multi_label else best
    positives = hard.sum(0)
    ranks = [_rank(scores[:, c], hard[:, c]) if positives[c] else None for c in range(classes)]
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


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and population standard deviation (divided by n) over folds or seeds; NaN, as
    where the held-out clips have one class, gives NaN."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return mean(values), pstdev(values)


class Classification(Metric):
    """Classification metrics; ``update(logits, targets)`` takes all rows, as ``evaluate`` does."""

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
        """``groups`` (n,): the clip of each row, if clips have several rows."""
        self.multi_label, self.groups = multi_label, groups
        self._rows: tuple[Tensor, Tensor] | None = None

    def update(self, predicted: Tensor, true: Tensor) -> None:
        assert self._rows is None, "all rows come at once"
        self._rows = predicted, true

    def compute(self) -> dict[str, Any]:
        assert self._rows is not None
        return evaluate(*self._rows, multi_label=self.multi_label)

    def replicates(self, value: str, *, resamples: int, seed: int) -> Floats:
        """Returns ``accuracy`` or ``map`` of ``resamples`` draws of the clips: (R,).

        A class without a positive clip in a draw is excluded from that draw's mean, as in
        ``evaluate``; NaN if none is left.
        """
        import torch

        assert self._rows is not None
        assert self.values[value].bootstrap, value
        assert value == "map" or not self.multi_label, "several labels a clip have no accuracy"
        scores, hard = _scores(*self._rows, multi_label=self.multi_label)
        n, classes = scores.shape
        assert n < 1 << 24, "counts are float32, exact up to 2^24"
        clips = np.arange(n)  # of each row
        if self.groups is not None:
            clips = np.unique(np.asarray(self.groups), return_inverse=True)[1]
        if value == "accuracy":
            right = torch.from_numpy(scores.argmax(1) == hard.argmax(1)).double()  # (n,)
        else:
            ranks = [_rank(scores[:, c], hard[:, c]) for c in range(classes) if hard[:, c].any()]
        found = []
        for drawn in draws(int(clips.max()) + 1, resamples=resamples, seed=seed):
            counts = torch.from_numpy(drawn[:, clips].T.astype(np.float32))  # (n, r)
            if value == "accuracy":
                found.append((right @ counts.double()) / counts.sum(0, dtype=torch.float64))
            elif ranks:
                found.append(torch.stack([r.drawn_precision(counts) for r in ranks]).nanmean(0))
            else:
                found.append(torch.full((counts.shape[1],), math.nan, dtype=torch.float64))
        return torch.cat(found).numpy()


class Ranking(NamedTuple):
    """Clips of one class by falling score; clips of equal score share a rank.

    Only the ranks that hold a positive clip are kept; there are k of them.
    """

    order: Whole  # (n,) clips, best first
    starts: Whole  # (k,) start of each rank in ``order``
    ends: Whole  # (k,) end of each rank, exclusive
    tops: Whole  # (k,) positive clips down to each rank's end
    hits: Whole  # (positives,) positive clips, best first

    def average_precision(self) -> float:
        """Returns the mean over the positive clips of the precision at their rank."""
        gained = np.diff(self.tops, prepend=0)
        return float((gained * self.tops / self.ends).sum() / self.tops[-1])

    def auroc(self) -> float | None:
        """Returns the share of (positive, negative) pairs in the right order; ties count half."""
        gained = np.diff(self.tops, prepend=0)
        negatives = len(self.order) - self.tops[-1]
        if not negatives:
            return None
        tied = self.ends - self.starts - gained
        below = negatives - (self.ends - self.tops)
        return float((gained * (below + tied / 2)).sum() / (self.tops[-1] * negatives))

    def drawn_precision(self, counts: Tensor) -> Tensor:
        """Returns the average precision with clip i counted ``counts[i]`` times: (n, r) -> (r,)."""
        import torch
        from torch.nn import functional as F

        # cumulative clips at each rank: sums of slices of the order between consecutive rank ends
        edges = torch.from_numpy(np.append(0, self.ends[:-1]))
        upto = torch.from_numpy(self.order[: self.ends[-1]])
        every = F.embedding_bag(upto, counts, edges, mode="sum").double().cumsum(0)  # (k, r)
        edges = torch.from_numpy(np.append(0, self.tops[:-1]))
        hits = F.embedding_bag(torch.from_numpy(self.hits), counts, edges, mode="sum").double()
        precision = hits.cumsum(0) / every.clamp(min=1)  # a rank without a draw has no hit
        return (hits * precision).sum(0) / hits.sum(0)  # 0 / 0: no positive clip was drawn


def _rank(scores: Floats, hard: Flags) -> Ranking:
    """Ranks the clips of one class: scores (n,), positives (n,), at least one of them."""
    order = np.argsort(-scores)  # (n,)
    falling, positive = scores[order], hard[order]
    ends = np.append(np.flatnonzero(np.diff(falling)) + 1, len(order))  # ends of all ranks
    starts = np.append(0, ends[:-1])
    tops = positive.cumsum()[ends - 1]
    held = np.diff(tops, prepend=0) > 0
    return Ranking(order, starts[held], ends[held], tops[held], order[positive])


def _scores(logits: Tensor, targets: Tensor, *, multi_label: bool) -> tuple[Floats, Flags]:
    """Returns probabilities (n, C) in float64 and true labels (n, C), both on the CPU."""
    if not logits.isfinite().all():
        raise UserError(
            "the classifier's outputs are not finite: training diverged; lower optim.lr"
        )
    logits = logits.detach().double().cpu()
    scores = logits.sigmoid() if multi_label else logits.softmax(1)
    return scores.numpy(), (targets.detach().cpu() >= 0.5).numpy()


def _mean(values: Iterable[float | None]) -> float:
    found = [float(v) for v in values if v is not None]
    return sum(found) / len(found) if found else math.nan


def _dprime(auroc: float, *, pairs: int) -> float:
    if math.isnan(auroc):
        return math.nan
    least = 1 / (2 * pairs)
    return math.sqrt(2) * NormalDist().inv_cdf(min(max(auroc, least), 1 - least))


class Micro(Metric):
    """Micro mAP: the average precision of all decisions together, whatever their class."""

    takes: ClassVar = "labels"
    values: ClassVar = {"map_micro": Value("micro mAP", bootstrap=False)}

    def __init__(self, *, multi_label: bool, groups: ArrayLike | None = None) -> None:
        self.multi_label = multi_label
        self._value = math.nan

    def update(self, predicted: Tensor, true: Tensor) -> None:
        scores, hard = _scores(predicted, true, multi_label=self.multi_label)
        if hard.any():
            self._value = _rank(scores.ravel(), hard.ravel()).average_precision()

    def compute(self) -> dict[str, Any]:
        return {"map_micro": self._value}


METRICS = (Classification, Micro)
