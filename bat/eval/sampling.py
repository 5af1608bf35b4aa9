"""Draws folds and validation clips of an index by a seed, balanced over its classes.

A clip of several classes counts for the rarest of them (the first criterion of Sechidis et al.
2011), so that rare classes are spread evenly. The draw depends only on the seed and the clip's
position in the index; its bits come from a counter-based generator, the same in every numpy.
"""

from __future__ import annotations

import numpy as np

from bat.data.index import Index
from bat.data.plan import philox
from bat.errors import UserError
from bat.seeding import derive_seed


def draw_folds(index: Index, folds: int, *, seed: int, multi_label: bool) -> np.ndarray:
    """Returns folds from 1 on, (n,), balanced in clips and in each class; at most ``folds``.

    A clip of several classes counts for the rarest of them. With one label per clip there are no
    more folds than the rarest class has clips, so that every fold has a held-out clip of it; with
    several, at least two clips per fold. Raises ``UserError`` if that makes fewer than two folds.
    """
    counts = np.bincount(index.label_ids, minlength=max(1, index.classes))
    counts[counts == 0] = len(index)  # classes that do not occur
    rarest = int(counts.argmin())
    least = len(index) // 2 if multi_label else int(counts[rarest])
    if least < 2:
        few = f"class {index.vocabulary[rarest]!r} has a single clip"
        raise UserError(
            f"{f'the data have {len(index)} clips' if multi_label else few}, so no folds can be "
            "drawn: some are to be held out, some to be trained on; add clips, remove the class, "
            "or give a column fold or split"
        )
    order = _even_order(index, np.arange(len(index)), seed=derive_seed(seed, "folds"))
    drawn = np.empty(len(index), np.int64)
    drawn[order] = np.arange(len(index)) % min(folds, least) + 1
    return drawn


def draw_part(index: Index, ids: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Returns ``fraction`` of the clips ``ids``, ascending, balanced over classes; at least one.

    One clip of each class is never taken; empty if there is no other.
    """
    order = _even_order(index, ids, seed=seed)
    strata = _strata(index)[order]
    free = order[1:][strata[1:] == strata[:-1]]  # all but the first of each class
    wanted = min(max(1, round(fraction * len(order))), len(free))
    places = (np.arange(wanted) * len(free) + len(free) // 2) // max(1, wanted)
    return np.sort(free[places])


def _even_order(index: Index, ids: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns ``ids`` class by class, the rarest first, each class shuffled."""
    bits = philox(seed, 0, 0).random_raw(len(index))
    return ids[np.lexsort((bits[ids], _strata(index)[ids]))]


def _strata(index: Index) -> np.ndarray:
    """Returns the rarest class of each clip, (n,), numbered from the rarest; C without label."""
    counts = np.bincount(index.label_ids, minlength=index.classes)
    rank = np.empty(index.classes, np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(index.classes)
    strata = np.full(len(index), index.classes, np.int64)
    owner = np.repeat(np.arange(len(index)), index.labels_per_clip)
    np.minimum.at(strata, owner, rank[index.label_ids])
    return strata
