"""Computes bootstrap confidence intervals: the spread of a metric over resampled held-out clips.

The held-out clips are drawn again with replacement, the metric is computed on each draw, and the
interval is the middle share of these values (the percentile bootstrap of Efron; moved to the
metric's own value, see ``interval``). A draw is a count for each clip, so no row is copied:
accuracy is one product with the counts, and mAP sorts each class once and sums the counts between
its positive clips, exact with ties. Each value equals ``metrics.evaluate`` of the drawn rows.

The draws depend only on ``seed`` and the number of clips: two methods evaluated on the same clips
get the same draws, so their difference can be taken draw by draw (paired). Give different folds
different seeds, or their draws are correlated. These intervals do **not** include the variation of
training; seeds and folds show that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bat.metrics.ranking import Ranking, judged, ranking

if TYPE_CHECKING:
    from torch import Tensor

RESAMPLED = ("accuracy", "map")
CELLS = 1 << 22
"""Counts held at once (16 MiB); fixed, because it determines how draws are split into blocks."""


def replicates(
    logits: Tensor,
    targets: Tensor,
    *,
    metric: str,
    multi_label: bool,
    resamples: int,
    seed: int,
    groups: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Returns ``metric`` (``accuracy`` or ``map``) of ``resamples`` draws of the rows: (R,).

    logits, targets (n, C) as for ``metrics.evaluate``. ``groups`` (n,): rows of equal value (the
    frames of one clip) are drawn together. A class without a positive clip in a draw is excluded
    from that draw's mean, as in ``evaluate``; NaN if none is left.
    """
    import torch

    assert metric in RESAMPLED, metric
    assert not (metric == "accuracy" and multi_label), "several labels a clip have no accuracy"
    scores, hard = judged(logits, targets, multi_label=multi_label)
    n, classes = scores.shape
    if groups is None:
        member = np.arange(n)
    else:
        member = np.unique(np.asarray(groups), return_inverse=True)[1]
        assert member.shape == (n,), "groups names the clip of every row"
    assert n < 1 << 24, "counts are float32, exact up to 2^24"
    if metric == "accuracy":
        right = torch.from_numpy(scores.argmax(1) == hard.argmax(1)).double()  # (n,)
    else:
        ranks = [ranking(scores[:, c], hard[:, c]) for c in range(classes) if hard[:, c].any()]
    found = []
    for drawn in draws(int(member.max()) + 1, resamples=resamples, seed=seed):
        counts = torch.from_numpy(drawn[:, member].T.astype(np.float32))  # (n, r)
        if metric == "accuracy":
            found.append((right @ counts.double()) / counts.sum(0, dtype=torch.float64))
        elif ranks:
            found.append(torch.stack([_precision(rank, counts) for rank in ranks]).nanmean(0))
        else:
            found.append(torch.full((counts.shape[1],), math.nan, dtype=torch.float64))
    return torch.cat(found).numpy()


def draws(clips: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields how often each of ``clips`` is drawn: (r, clips) blocks, ``resamples`` rows in all."""
    generator = np.random.default_rng(seed)
    block = max(1, CELLS // clips)
    for start in range(0, resamples, block):
        r = min(block, resamples - start)
        drawn = generator.integers(clips, size=(r, clips)) + clips * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * clips).reshape(r, clips)


def _precision(rank: Ranking, counts: Tensor) -> Tensor:
    """Returns the average precision of one class, clip i counted ``counts[i]`` times.

    (n, r) -> (r,).
    """
    import torch
    from torch.nn import functional as F

    # cumulative clips at each rank: sums of slices of the order between consecutive rank ends
    edges = torch.from_numpy(np.append(0, rank.ends[:-1]))
    upto = torch.from_numpy(rank.order[: rank.ends[-1]])
    every = F.embedding_bag(upto, counts, edges, mode="sum").double().cumsum(0)  # (k, r)
    edges = torch.from_numpy(np.append(0, rank.tops[:-1]))
    hits = F.embedding_bag(torch.from_numpy(rank.hits), counts, edges, mode="sum").double()
    precision = hits.cumsum(0) / every.clamp(min=1)  # a rank without a draw has no hit
    return (hits * precision).sum(0) / hits.sum(0)  # 0 / 0: no positive clip was drawn


def interval(
    values: ArrayLike, confidence: float = 0.95, *, at: float | None = None, most: float = 1.0
) -> tuple[float, float]:
    """Returns the middle ``confidence`` of replicates (R,), excluding draws without a value (NaN).

    ``at``: the metric on the clips themselves; the interval is shifted by the mean deviation of the
    replicates from it. Give it for mAP: a clip drawn twice ties with itself, which lifts the
    replicates above the metric (by more than half the interval if mAP is low), and the unshifted
    interval then covers the true value in 73% to 95% of simulated cases instead of 93% to 97%. The
    result stays within [0, ``most``]. NaN if no draw has a value.
    """
    low, high = _middle(values, confidence, at)
    return (low, high) if math.isnan(low) else (max(low, 0.0), min(high, most))


def difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, *, at: float | None = None
) -> tuple[float, float]:
    """Returns the interval of a - b, replicates (R,) of two methods on the same draws of clips.

    If it lies entirely above or below 0, one method is better than the other on such clips, as
    trained here. ``at``: the difference on the clips themselves, as for ``interval``.
    """
    one, two = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert one.shape == two.shape, "paired replicates are equally many"
    return _middle(one - two, confidence, at)


def _middle(values: ArrayLike, confidence: float, at: float | None) -> tuple[float, float]:
    assert 0 < confidence < 1, confidence
    held = np.asarray(values, dtype=float)
    held = held[~np.isnan(held)]
    if not len(held):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(held, [tail, 1 - tail])
    off = 0.0 if at is None else held.mean() - at
    return float(low - off), float(high - off)
