"""The stateless plan: the clip at each position of an endless stream.

Epoch e is an arrangement of the clips, a pure function of (seed, e); the stream is the epochs one
after the other, so nothing is dropped at an epoch's end and a batch may span two epochs. Global
position p is clip ``order(p // n)[p % n]``. There is no cursor.

An epoch is first selected, then arranged. The selection is all clips, or ``epoch_clips`` of them
without replacement, uniformly or by weight (Gumbel top-k: the k largest of ``log w + G``;
``multinomial`` ends at 2^24 items), or ``epoch_clips`` draws with replacement by weight. The
arrangement is a permutation, or, for slow disks and small
caches, the shards in a random order and the clips shuffled within windows of it, so that a window
touches few shards.

``MixedPlan`` interleaves the plans of several data sets by weight: each block of 1,000 positions
holds a fixed share of each, shuffled, and each data set has its own epochs. ``make_plan`` makes the
plan of an index from the settings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from bat.errors import UserError

if TYPE_CHECKING:
    from bat.data.index import Index

ORDER, CROP, ROLL, STAND_IN, OFFSET, CHOICE, SHARDS, MIX, NOISE = range(9)
"""Independent random streams of one seed."""

MIX_BLOCK = 1000
"""Positions within which a mixture's shares are exact; weights are rounded to a thousandth."""


def philox(seed: int, number: int, purpose: int) -> np.random.Philox:
    """Returns the random bits of (seed, number) for one purpose.

    Raw bits of a counter-based generator are the same in every numpy version; its ``Generator``
    methods are not guaranteed to be, and a resumed run must not depend on an upgrade.
    """
    key = np.array([seed, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64))


def below(n: int, bits: np.random.Philox) -> int:
    """Draws uniformly from ``0 .. n - 1``."""
    return int(bits.random_raw()) * n >> 64


def normal(n: int, bits: np.random.Philox) -> np.ndarray:
    """Draws from N(0, 1), two of 64 bits (Box-Muller): (n,) float32."""
    raw = bits.random_raw((n + 1) // 2)
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (raw & np.uint64(0xFFFFFFFF)) * (np.pi * 2.0**-31)
    pairs = radius * np.array([np.cos(angle), np.sin(angle)])
    return pairs.ravel()[:n].astype(np.float32)


class Plan:
    """The stream over ``clips``.

    Args:
        clips: a number n for all of 0 .. n - 1, or ids (n,).
        weights: (n,) of the clips of an epoch, zero or more; needs ``epoch_clips``. A clip of
            weight zero never occurs.
        epoch_clips: clips of an epoch, each at most once; None: all.
        replace: ``weights`` draw with replacement: a clip may occur several times an epoch.
        window: number of clips that are shuffled together, in a random order of shards; None: all
            of an epoch, uniformly.
        shard: (ids.max() + 1,) or longer, the shard of each clip id; ``window`` needs it.

    Raises:
        UserError: an empty selection, a number out of range.
    """

    def __init__(
        self,
        clips: int | Sequence[int] | np.ndarray,
        *,
        seed: int,
        weights: np.ndarray | None = None,
        epoch_clips: int | None = None,
        replace: bool = False,
        window: int | None = None,
        shard: np.ndarray | None = None,
    ) -> None:
        ids = np.arange(clips) if isinstance(clips, int) else np.asarray(clips, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UserError("there are no clips to stream: the selection is empty")
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed={seed} must lie in 0 .. 2^63 - 1")
        if window is not None and window < 1:
            raise UserError(f"window={window} clips: at least 1")
        assert (window is None) or (shard is not None and len(shard) > ids.max())
        assert (weights is None) or epoch_clips is not None
        assert weights is not None or not replace
        self.ids, self.seed, self.window, self.shard = ids, seed, window, shard
        self.replace = replace
        self.weights = None if weights is None else np.asarray(weights, np.float64)
        self.epoch_clips = len(ids) if epoch_clips is None else epoch_clips
        usable = len(ids) if self.weights is None else int((self.weights > 0).sum())
        if not 1 <= self.epoch_clips <= (self.epoch_clips if replace and usable else usable):
            raise UserError(
                f"epoch_clips={epoch_clips}: an epoch takes 1 to {usable} of {len(ids)} clips "
                f"({len(ids) - usable} have no weight)"
            )
        self.order = functools.lru_cache(maxsize=2)(self._order)  # batches may span two epochs

    def __len__(self) -> int:
        """Number of clips of an epoch."""
        return self.epoch_clips

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the clip ids of ``epoch`` in their order: (len(self),) int64."""
        everything = self.epoch_clips == len(self.ids) and not self.replace
        ids = self.ids if everything else self.ids[self._chosen(epoch)]
        bits = philox(self.seed, epoch, ORDER).random_raw(len(ids))
        if self.window is None or self.shard is None:
            return ids[np.argsort(bits, kind="stable")]
        shards, shard = np.unique(self.shard[ids], return_inverse=True)
        rank = np.argsort(np.argsort(philox(self.seed, epoch, SHARDS).random_raw(len(shards))))
        ids = ids[np.argsort(rank[shard], kind="stable")]
        return ids[np.lexsort((bits, np.arange(len(ids)) // self.window))]

    def _chosen(self, epoch: int) -> np.ndarray:
        """Returns the rows of ``ids`` that are in ``epoch``, ascending, or drawn one by one."""
        number = self.epoch_clips if self.replace else len(self.ids)
        bits = philox(self.seed, epoch, CHOICE).random_raw(number)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        if self.replace and self.weights is not None:
            edges = np.cumsum(self.weights)
            return np.searchsorted(edges, uniform * edges[-1], side="right")
        wait = -np.log(uniform)  # exponential; the k shortest of wait / w are Gumbel's top k
        if self.weights is not None:
            with np.errstate(divide="ignore"):
                wait = wait / self.weights  # weight zero: never selected
        return np.sort(np.argpartition(wait, self.epoch_clips - 1)[: self.epoch_clips])

    def clips(self, positions: np.ndarray) -> np.ndarray:
        """Returns the clip ids at global ``positions`` (m,), ascending or not: (m,) int64."""
        epochs, places = np.divmod(positions, len(self))
        if epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
            return self.order(int(epochs[0]))[places]
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self.order(int(epoch))[places[here]]
        return found

    def stand_ins(self, position: int) -> Iterator[int]:
        """Yields clips, without end, that may replace the one at ``position``.

        They are from the same epoch and window, so clips of weight zero, or from shards outside the
        window, never occur.
        """
        bits = philox(self.seed, position, STAND_IN)
        if self.weights is None and self.window is None and self.epoch_clips == len(self.ids):
            while True:  # the same result without making the order in a worker
                yield int(self.ids[below(len(self.ids), bits)])
        epoch, place = divmod(position, len(self))
        width = self.window or len(self)
        first = place // width * width
        among = self.order(epoch)[first : first + width]
        while True:
            yield int(among[below(len(among), bits)])

    def identity(self) -> str:
        """Returns what the order depends on besides seed and index, to compare with checkpoints."""
        chosen = hashlib.sha256(self.ids.tobytes()).hexdigest()[:8]
        text = f"{len(self.ids)} clips ({chosen})"
        if self.weights is not None:
            digest = hashlib.sha256(self.weights.tobytes()).hexdigest()[:8]
            drawn = " with replacement" * self.replace
            text = f"{self.epoch_clips} an epoch by weight{drawn} ({digest}) of {text}"
        elif self.epoch_clips < len(self.ids):
            text = f"{self.epoch_clips} an epoch of {text}"
        if self.window is not None and self.shard is not None:
            where = hashlib.sha256(self.shard[self.ids].tobytes()).hexdigest()[:8]
            text += f", windows of {self.window} over shards ({where})"
        return text


class MixedPlan:
    """Interleaves the plans of several data sets by ``weights`` (any positive numbers).

    Raises:
        UserError: weights that do not match the plans, or a share below a thousandth.
    """

    def __init__(self, plans: Sequence[Plan], weights: Sequence[float], *, seed: int) -> None:
        if len(plans) != len(weights) or not plans:
            raise UserError(f"mix has {len(weights)} weights for {len(plans)} data sets")
        share = np.asarray(weights, np.float64)
        if not (np.isfinite(share).all() and (share > 0).all()):
            raise UserError(f"mix={list(weights)}: the weights must be positive numbers")
        exact = share / share.sum() * MIX_BLOCK
        counts = np.floor(exact).astype(np.int64)
        short = MIX_BLOCK - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:short]] += 1  # largest remainders
        if counts.min() < 1:
            raise UserError(f"mix={list(weights)}: the least share is below a thousandth")
        self.plans, self.counts, self.seed = list(plans), counts, seed
        self.ids = np.unique(np.concatenate([plan.ids for plan in plans]))
        self._block = functools.lru_cache(maxsize=64)(self._draw_block)

    def __len__(self) -> int:
        """Number of positions in which every data set is read completely at least once."""
        blocks = (-(-len(plan) // int(n)) for plan, n in zip(self.plans, self.counts, strict=True))
        return max(blocks) * MIX_BLOCK

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns data set and clip index for each position of ``block``: (MIX_BLOCK,) each."""
        bits = philox(self.seed, block, MIX).random_raw(MIX_BLOCK)
        which = np.repeat(np.arange(len(self.plans)), self.counts)[np.argsort(bits, kind="stable")]
        nth = np.empty(MIX_BLOCK, np.int64)
        for i, count in enumerate(self.counts):
            nth[which == i] = np.arange(count)
        return which, nth

    def clips(self, positions: np.ndarray) -> np.ndarray:
        """Returns the clip ids at global ``positions`` (m,): (m,) int64."""
        blocks, places = np.divmod(positions, MIX_BLOCK)
        which = np.empty(len(positions), np.int64)
        local = np.empty(len(positions), np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            of, nth = self._block(int(block))
            which[here] = of[places[here]]
            local[here] = block * self.counts[which[here]] + nth[places[here]]
        found = np.empty(len(positions), np.int64)
        for i in np.unique(which):
            here = which == i
            found[here] = self.plans[i].clips(local[here])
        return found

    def stand_ins(self, position: int) -> Iterator[int]:
        """Yields stand-ins as ``Plan.stand_ins``, from the same data set."""
        block, place = divmod(position, MIX_BLOCK)
        of, nth = self._block(block)
        i = int(of[place])
        return self.plans[i].stand_ins(block * int(self.counts[i]) + int(nth[place]))

    def identity(self) -> str:
        """Returns the identity as ``Plan.identity``."""
        parts = zip(self.counts.tolist(), self.plans, strict=True)
        return "; ".join(f"{n} in {MIX_BLOCK} of {plan.identity()}" for n, plan in parts)


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


def first_labels(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns the number of the first label of each of ``ids``, (n,); -1 without a label."""
    found = np.full(len(ids), -1)
    has = index.labels_per_clip[ids] > 0
    found[has] = index.label_ids[index.label_ptr[ids[has]]]
    return found


def first_label_balance(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns ``1 / (clips of ids with the same first label + 1e-8)``, (n,) float64, as BirdSet is
    sampled; 0 for clips without a label.

    Raises:
        UserError: no clip has a label.
    """
    first = first_labels(index, ids)
    if (first < 0).all():
        raise UserError("balance=first_label needs labels, and no clip has any: balance=none")
    counts = np.bincount(first[first >= 0], minlength=index.classes)
    return np.where(first >= 0, 1.0 / (counts[first] + 1e-8), 0.0)


def make_plan(
    index: Index,
    ids: np.ndarray | None = None,
    *,
    seed: int,
    shuffle: Literal["auto", "exact", "window"] = "auto",
    window: int = 8192,
    balance: Literal["none", "class", "first_label"] = "none",
    epoch_clips: int | None = None,
    mix: Sequence[float] = (),
) -> Plan | MixedPlan:
    """Returns the order of ``ids`` (None: all clips).

    Args:
        shuffle: ``exact``: a uniform permutation of an epoch; ``window``: shards in a random order,
            clips shuffled within ``window`` of them; ``auto``: ``window`` where shards are remote
            (a uniform order needs all of them at once), else ``exact``.
        balance: ``class``: weights of docs/method.md 5; needs ``epoch_clips``. ``first_label``:
            with replacement, see ``first_label_balance``.
        epoch_clips: clips of an epoch; None: all, or as many draws as there are clips.
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
        weights, draws = None, epoch_clips
        if balance == "class":
            weights = class_balance(index.label_ids, index.label_ptr, chosen)
        elif balance == "first_label":
            weights, draws = first_label_balance(index, chosen), epoch_clips or len(chosen)
        return Plan(
            chosen,
            seed=(seed + (number << 40)) % (1 << 63),  # sources are shuffled independently
            weights=weights,
            epoch_clips=draws,
            replace=balance == "first_label",
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
