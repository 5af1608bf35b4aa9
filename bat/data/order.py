"""Makes the plan for the clips of an index from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from bat.data.index import Index
from bat.data.plan import MixedPlan, Plan
from bat.errors import UserError


def class_balance(label_ids: np.ndarray, label_ptr: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns weights of ``ids`` for class-balanced sampling (docs/method.md 5): (n,) float64.

    The weight of a class is ``1 / clips that carry it`` (among ``ids``), that of a clip is the mean
    over its labels; a clip without labels has weight zero.

    Args:
        label_ids, label_ptr: labels of all clips of an index, CSR.

    Raises:
        UserError: no clip has a label.
    """
    counts = np.diff(label_ptr)[ids]  # labels of each clip
    if not counts.sum():
        raise UserError("balance=class needs labels, and no clip has any: use balance=none")
    rows = np.repeat(np.arange(len(ids)), counts)
    first = np.cumsum(counts) - counts
    flat = label_ids[np.repeat(label_ptr[ids] - first, counts) + np.arange(len(rows))]
    per_class = np.bincount(flat).astype(np.float64)
    total = np.bincount(rows, weights=1.0 / per_class[flat], minlength=len(ids))
    weights: np.ndarray = total / np.maximum(counts, 1)
    return weights


def make_plan(
    index: Index,
    ids: np.ndarray | None = None,
    *,
    seed: int,
    shuffle: Literal["auto", "exact", "window"] = "auto",
    window: int = 8192,
    balance: Literal["none", "class"] = "none",
    epoch_clips: int | None = None,
    mix: Sequence[float] = (),
) -> Plan | MixedPlan:
    """Returns the order of ``ids`` (None: all clips).

    Args:
        shuffle: ``exact``: a uniform permutation of an epoch; ``window``: shards in a random order,
            clips shuffled within ``window`` of them; ``auto``: ``window`` where shards are remote
            (a uniform order needs all of them at once), else ``exact``.
        balance: ``class``: weights of docs/method.md 5; needs ``epoch_clips``.
        epoch_clips: clips of an epoch, without replacement; None: all.
        mix: shares of the sources that the index was opened with; empty: one set of all of them.

    Raises:
        UserError: settings that are not compatible with one another or with the data.
    """
    if shuffle == "exact" and index.remote and not index.fits:
        raise UserError(
            "shuffle=exact over remote shards that the cache cannot hold would fetch a shard for "
            "nearly every clip: use shuffle=window, or raise cache_gb above the size of the shards"
        )
    if balance == "class" and epoch_clips is None:
        raise UserError("balance=class needs epoch_clips, the clips of an epoch (AudioSet: 200000)")
    windowed = shuffle == "window" or (shuffle == "auto" and index.remote)
    if windowed:
        _check_window(index, window)
    ids = np.arange(len(index)) if ids is None else np.asarray(ids, np.int64)

    def plan(chosen: np.ndarray, number: int) -> Plan:
        weights = None
        if balance == "class":
            weights = class_balance(index.label_ids, index.label_ptr, chosen)
        return Plan(
            chosen,
            seed=(seed + (number << 40)) % (1 << 63),  # sources are shuffled independently
            weights=weights,
            epoch_clips=epoch_clips,
            window=window if windowed else None,
            shard=index.shard,
        )

    if not mix:
        return plan(ids, 0)
    parts = [ids[index.source[ids] == i] for i in range(int(index.source.max()) + 1)]
    if len(parts) != len(mix):
        raise UserError(f"mix has {len(mix)} weights for {len(parts)} sets of shards")
    if epoch_clips is not None:
        raise UserError("mix and epoch_clips (or balance) exclude one another: leave one away")
    return MixedPlan([plan(part, i) for i, part in enumerate(parts)], mix, seed=seed)


def _check_window(index: Index, window: int) -> None:
    """Raise ``UserError`` if the cache cannot hold the shards of this window and the next."""
    if index.fits or index.cache_bytes is None:
        return
    clips = len(index) / len(index.shard_bytes)  # per shard
    shards = min(len(index.shard_bytes), int(np.ceil(window / clips)) + 1)
    need = 2 * shards * float(index.shard_bytes.mean())
    if need > index.cache_bytes:
        raise UserError(
            f"a window of {window} clips lies in about {shards} remote shards: two of them need "
            f"{need / 1e9:.1f} GB, the cache holds {index.cache_bytes / 1e9:.1f}. Raise "
            f"data.cache_gb, or lower data.window"
        )
