"""The stateless plan: the clip at each position of an endless stream.

Epoch e is an arrangement of the clips, a pure function of (seed, e); the stream is the epochs one
after the other, so nothing is dropped at an epoch's end and a batch may span two epochs. Global
position p is clip ``order(p // n)[p % n]``. There is no cursor.

An epoch is first selected, then arranged. The selection is all clips, or ``epoch_clips`` of them
without replacement, uniformly or by weight (Gumbel top-k: the k largest of ``log w + G``;
``multinomial`` ends at 2^24 items), or ``epoch_clips`` draws with replacement by weight. There are
three arrangements, with n clips of an epoch in m shards:

    exact    argsort of n random numbers                                        memory n
    window   the shards in a random order, clips shuffled within windows of it,
             so that a window touches few shards (slow disks, small caches)     memory m + window
    keyed    ``permuted``, a bijection of 0 .. n - 1 that is computed for each
             position by itself                                                 memory 0

``MixedPlan`` interleaves the plans of several data sets by weight: each block of 1,000 positions
holds a fixed share of each, shuffled, and each data set has its own epochs. ``make_plan`` makes the
plan of an index from the settings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from bat.data.balance import class_balance, first_label_balance
from bat.data.columns import PIECE
from bat.data.draws import CHOICE, MIX, ORDER, ROUNDS, SHARDS, STAND_IN, below, permuted, philox
from bat.data.index import Index
from bat.errors import UserError

MIX_BLOCK = 1000
"""Positions within which a mixture's shares are exact; weights are rounded to a thousandth."""
KEYED_FROM = 1 << 23
"""Clips from which ``shuffle=auto`` takes the keyed order: the exact one would need 200 MB."""
K = TypeVar("K")
V = TypeVar("V")


class Latest(dict[K, V]):
    """The latest ``size`` results of ``make(key)``, made when they are asked for; sent to spawned
    loader processes without them."""

    def __init__(self, make: Callable[[K], V], size: int) -> None:
        super().__init__()
        self.make, self.size = make, size

    def __missing__(self, key: K) -> V:
        while len(self) >= self.size:
            del self[next(iter(self))]
        value = self[key] = self.make(key)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return Latest, (self.make, self.size)


class Plan:
    """The stream over ``clips``.

    Args:
        clips: a number n for all of 0 .. n - 1, a range of ids, or ids (n,).
        weights: (n,) of the clips of an epoch, zero or more; needs ``epoch_clips``. A clip of
            weight zero never occurs.
        epoch_clips: clips of an epoch, each at most once; None: all.
        replace: ``weights`` draw with replacement: a clip may occur several times an epoch.
        window: number of clips that are shuffled together, in a random order of shards; None: all
            of an epoch, uniformly.
        shard: (ids.max() + 1,) or longer, the shard of each clip id; ``window`` needs it.
        keyed: the keyed arrangement; neither with ``weights`` nor with ``window``.

    Raises:
        UserError: an empty selection, a number out of range.
    """

    def __init__(
        self,
        clips: int | range | Sequence[int] | np.ndarray,
        *,
        seed: int,
        weights: np.ndarray | None = None,
        epoch_clips: int | None = None,
        replace: bool = False,
        window: int | None = None,
        shard: np.ndarray | None = None,
        keyed: bool = False,
    ) -> None:
        ids = range(clips) if isinstance(clips, int) else clips
        if not len(ids):
            raise UserError("there are no clips to stream: the selection is empty")
        if not isinstance(ids, range):
            ids = np.asarray(ids, np.int64)
            side_by_side = range(int(ids[0]), int(ids[0]) + len(ids))
            if all(map(np.array_equal, _pieces(ids), _pieces(side_by_side))):
                ids = side_by_side  # takes no memory
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed={seed} must lie in 0 .. 2^63 - 1")
        if window is not None and window < 1:
            raise UserError(f"window={window} clips: at least 1")
        assert (window is None) or (shard is not None)
        assert (weights is None) or epoch_clips is not None
        assert weights is not None or not replace
        assert not keyed or (weights is None and window is None)
        self.ids, self.seed, self.window, self.shard = ids, seed, window, shard
        self.replace, self.keyed = replace, keyed
        self.weights = None if weights is None else np.asarray(weights, np.float64)
        self.epoch_clips = len(ids) if epoch_clips is None else epoch_clips
        usable = len(ids) if self.weights is None else int((self.weights > 0).sum())
        if not 1 <= self.epoch_clips <= (self.epoch_clips if replace and usable else usable):
            raise UserError(
                f"epoch_clips={epoch_clips}: an epoch takes 1 to {usable} of {len(ids)} clips "
                f"({len(ids) - usable} have no weight)"
            )
        self._orders = Latest(self._order, 2)  # batches may span two epochs
        self._sequences = Latest(self._sequence, 2)
        self._windows = Latest(self._window, 16)

    def __len__(self) -> int:
        """Number of clips of an epoch."""
        return self.epoch_clips

    def order(self, epoch: int) -> np.ndarray:
        """Returns the clip ids of ``epoch`` in their order: (len(self),) int64."""
        return self._at(epoch, np.arange(len(self)))

    def clips(self, positions: np.ndarray) -> np.ndarray:
        """Returns the clip ids at global ``positions`` (m,), ascending or not: (m,) int64."""
        epochs, places = np.divmod(positions, len(self))
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._at(int(epoch), places[here])
        return found

    def _at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns the clip ids at ``places`` (m,) of ``epoch``: (m,) int64."""
        if self.keyed:
            keys = philox(self.seed, epoch, ORDER).random_raw(ROUNDS)
            return _rows(self.ids, permuted(places, len(self.ids), keys))
        if self.window is None:
            return self._orders[epoch][places]
        numbers, within = np.divmod(places, self.window)
        found = np.empty(len(places), np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self._windows[epoch, int(number)][within[here]]
        return found

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the exact arrangement of ``epoch``."""
        ids = self._selected(epoch)
        return _rows(ids, np.argsort(self._bits(epoch, 0, len(ids)), kind="stable"))

    def _bits(self, epoch: int, start: int, end: int) -> np.ndarray:
        return philox(self.seed, epoch, ORDER, start).random_raw(end - start)

    def _sequence(self, epoch: int) -> tuple[range | np.ndarray, np.ndarray, np.ndarray]:
        """Returns the ids of ``epoch`` shard by shard, and in the order in which the shards come:
        the places (k,) where they end, and what is added to such a place for its row in the ids."""
        ids = self._selected(epoch)
        assert self.shard is not None
        starts = _runs(ids, self.shard)
        if starts is None:  # the clips of a shard do not lie side by side
            ids = _rows(ids, np.argsort(self.shard[_rows(ids, slice(None))], kind="stable"))
            starts = _runs(ids, self.shard)
            assert starts is not None
        turn = np.argsort(philox(self.seed, epoch, SHARDS).random_raw(len(starts)))
        counts = np.diff(starts, append=len(ids))[turn]
        ends = np.cumsum(counts)
        return ids, ends, starts[turn] - (ends - counts)

    def _window(self, which: tuple[int, int]) -> np.ndarray:
        """Returns the clips of a window, (epoch, number)."""
        epoch, number = which
        assert self.window is not None
        ids, ends, shift = self._sequences[epoch]
        start, end = number * self.window, min((number + 1) * self.window, len(self))
        places = np.arange(start, end)
        places = places[np.argsort(self._bits(epoch, start, end), kind="stable")]
        return _rows(ids, places + shift[np.searchsorted(ends, places, side="right")])

    def _selected(self, epoch: int) -> range | np.ndarray:
        """Returns the clips of ``epoch``: all of ``ids``, some of them in their order, or drawn one
        by one."""
        if self.epoch_clips == len(self.ids) and not self.replace:
            return self.ids
        number = self.epoch_clips if self.replace else len(self.ids)
        bits = philox(self.seed, epoch, CHOICE).random_raw(number)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        if self.replace and self.weights is not None:
            edges = np.cumsum(self.weights)
            return _rows(self.ids, np.searchsorted(edges, uniform * edges[-1], side="right"))
        wait = -np.log(uniform)  # exponential; the k shortest of wait / w are Gumbel's top k
        if self.weights is not None:
            with np.errstate(divide="ignore"):
                wait = wait / self.weights  # weight zero: never selected
        chosen = np.argpartition(wait, self.epoch_clips - 1)[: self.epoch_clips]
        return _rows(self.ids, np.sort(chosen))

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
        width = min(width, len(self) - first)
        while True:
            yield int(self._at(epoch, np.array([first + below(width, bits)]))[0])

    def identity(self) -> str:
        """Returns what the order depends on besides seed and index, to compare with checkpoints."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        if self.keyed and isinstance(self.ids, range):
            which = f"from {self.ids.start}"  # a digest of a hundred millions takes a second
        else:
            which = _digest(_pieces(self.ids))
        text = f"{len(self.ids)} clips ({which})"
        if self.weights is not None:
            drawn = f"{' with replacement' * self.replace} ({_digest([self.weights])})"
            text = f"{self.epoch_clips} an epoch by weight{drawn} of {text}"
        elif self.epoch_clips < len(self.ids):
            text = f"{self.epoch_clips} an epoch of {text}"
        if self.window is not None and self.shard is not None:
            where = _digest(_shards(self.ids, self.shard))
            text += f", windows of {self.window} over shards ({where})"
        return text + ", keyed" * self.keyed


def _rows(ids: range | np.ndarray, rows: Any) -> np.ndarray:
    """Returns ``ids[rows]`` as an array."""
    if not isinstance(ids, range):
        return np.asarray(ids[rows])
    assert ids.step == 1
    if isinstance(rows, slice):
        part = ids[rows]
        return np.arange(part.start, part.stop)
    return np.asarray(rows + ids.start)


def _pieces(ids: range | np.ndarray) -> Iterator[np.ndarray]:
    """Yields ``ids`` piece by piece."""
    for start in range(0, len(ids), PIECE):
        yield _rows(ids, slice(start, start + PIECE))


def _shards(ids: range | np.ndarray, shard: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the shards of ``ids`` piece by piece."""
    for start in range(0, len(ids), PIECE):
        piece = ids[start : start + PIECE]
        yield shard[piece.start : piece.stop] if isinstance(piece, range) else shard[piece]


def _runs(ids: range | np.ndarray, shard: np.ndarray) -> np.ndarray | None:
    """Returns the rows of ``ids`` where another shard begins; None if the shards do not ascend."""
    starts, row, before = [], 0, -1
    for piece in _shards(ids, shard):
        if piece[0] < before or (piece[1:] < piece[:-1]).any():
            return None
        starts.append(np.flatnonzero(piece[1:] != piece[:-1]) + row + 1)
        if piece[0] != before:
            starts[-1] = np.insert(starts[-1], 0, row)
        row, before = row + len(piece), int(piece[-1])
    return np.concatenate(starts)


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:8]


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
        self._blocks = Latest(self._block, 64)

    def __len__(self) -> int:
        """Number of positions in which every data set is read completely at least once."""
        blocks = (-(-len(plan) // int(n)) for plan, n in zip(self.plans, self.counts, strict=True))
        return max(blocks) * MIX_BLOCK

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
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
            of, nth = self._blocks[int(block)]
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
        of, nth = self._blocks[block]
        i = int(of[place])
        return self.plans[i].stand_ins(block * int(self.counts[i]) + int(nth[place]))

    def identity(self) -> str:
        """Returns the identity as ``Plan.identity``."""
        parts = zip(self.counts.tolist(), self.plans, strict=True)
        return "; ".join(f"{n} in {MIX_BLOCK} of {plan.identity()}" for n, plan in parts)


def make_plan(
    index: Index,
    ids: np.ndarray | None = None,
    *,
    seed: int,
    shuffle: Literal["auto", "exact", "window", "keyed"] = "auto",
    window: int = 8192,
    balance: Literal["none", "class", "first_label"] = "none",
    epoch_clips: int | None = None,
    mix: Sequence[float] = (),
) -> Plan | MixedPlan:
    """Returns the order of ``ids`` (None: all clips).

    Args:
        shuffle: ``exact``: a uniform permutation of an epoch; ``window``: shards in a random order,
            clips shuffled within ``window`` of them; ``auto``: ``window`` where shards are remote
            (a uniform order needs all of them at once), else ``exact``, and ``keyed`` for
            ``KEYED_FROM`` clips and more, in constant memory.
        balance: ``class``: weights of docs/method.md 5; needs ``epoch_clips``. ``first_label``:
            with replacement, see ``first_label_balance``.
        epoch_clips: clips of an epoch; None: all, or as many draws as there are clips.
        mix: shares of the sources that the index was opened with; empty: one set of all of them.

    Raises:
        UserError: settings that are not compatible with one another or with the data.
    """
    if shuffle in ("exact", "keyed") and index.remote and not index.fits:
        raise UserError(
            f"shuffle={shuffle} over remote shards that the cache cannot hold would fetch a shard "
            "for nearly every clip: use shuffle=window, or raise cache_gb above the size of the "
            "shards"
        )
    if shuffle == "keyed" and balance != "none":
        raise UserError(f"shuffle=keyed and balance={balance} exclude one another: leave one away")
    if balance == "class" and epoch_clips is None:
        raise UserError("balance=class needs epoch_clips, the clips of an epoch (AudioSet: 200000)")
    windowed = shuffle == "window" or (shuffle == "auto" and index.remote)
    if windowed:
        _check_window(index, window)
    chosen: range | np.ndarray = range(len(index)) if ids is None else np.asarray(ids, np.int64)

    def plan(chosen: range | np.ndarray, number: int) -> Plan:
        weights, draws = None, epoch_clips
        if balance == "class":
            weights = class_balance(index.label_ids, index.label_ptr, np.asarray(chosen))
        elif balance == "first_label":
            weights = first_label_balance(index, np.asarray(chosen))
            draws = epoch_clips or len(chosen)
        large = shuffle == "auto" and len(chosen) >= KEYED_FROM
        return Plan(
            chosen,
            seed=(seed + (number << 40)) % (1 << 63),  # sources are shuffled independently
            weights=weights,
            epoch_clips=draws,
            replace=balance == "first_label",
            window=window if windowed else None,
            shard=index.shard,
            keyed=shuffle == "keyed" or (large and not windowed and balance == "none"),
        )

    if not mix:
        return plan(chosen, 0)
    parts = []
    for i in range(int(index.source.max()) + 1):  # the clips of a source lie side by side
        part = range(*np.searchsorted(index.source, [i, i + 1]).tolist())
        parts.append(part if ids is None else ids[(ids >= part.start) & (ids < part.stop)])
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
