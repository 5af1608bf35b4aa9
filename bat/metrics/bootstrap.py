"""Computes bootstrap confidence intervals: the spread of a metric over resampled held-out clips.

The held-out clips are drawn again with replacement, the metric is computed on each draw
(``Metric.replicates``), and the interval is the middle share of these values (the percentile
bootstrap of Efron; moved to the metric's own value, see ``interval``). A draw is a count for each
clip, so no row is copied.

The draws depend only on ``seed`` and the number of clips: two methods evaluated on the same clips
get the same draws, so their difference can be taken draw by draw (paired). Give different folds
different seeds, or their draws are correlated. These intervals do **not** include the variation of
training; seeds and folds show that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

CELLS = 1 << 22
"""Counts held at once (16 MiB); fixed, because it determines how draws are split into blocks."""


def draws(clips: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields how often each of ``clips`` is drawn: (r, clips) blocks, ``resamples`` rows in all."""
    generator = np.random.default_rng(seed)
    block = max(1, CELLS // clips)
    for start in range(0, resamples, block):
        r = min(block, resamples - start)
        drawn = generator.integers(clips, size=(r, clips)) + clips * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * clips).reshape(r, clips)


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
    low, high = difference(values, 0.0, confidence, at=at)
    return (low, high) if math.isnan(low) else (max(low, 0.0), min(high, most))


def difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, *, at: float | None = None
) -> tuple[float, float]:
    """Returns the interval of a - b, replicates (R,) of two methods on the same draws of clips.

    If it lies entirely above or below 0, one method is better than the other on such clips, as
    trained here. ``at``: the difference on the clips themselves, as for ``interval``.
    """
    assert 0 < confidence < 1, confidence
    values = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    off = 0.0 if at is None else values.mean() - at
    return float(low - off), float(high - off)
