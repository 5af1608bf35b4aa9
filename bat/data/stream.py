"""The stateless plan: which clip comes at which place of an endless stream (STACK section 2).

Epoch e is a permutation of the clips, a pure function of (seed, e); the stream is the epochs one
after the other, so nothing is dropped at an epoch's end and a batch may reach across it. Global
position p is clip ``order(p // n)[p % n]``. Micro-batch k takes positions ``k G .. (k + 1) G - 1``
with ``G = batch * world``; rank r takes every ``world``-th from the r-th on. Nothing here keeps a
cursor: where the run stands is asked of the trainer whenever an iterator is made, and a clip's
randomness (crop, roll, offset) is a function of (seed, position). So interrupted and resumed equals
uninterrupted, and two ranks see what one with a doubled batch would see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from bat.audio.decode import DecodeError, decode, probe
from bat.data.index import Index
from bat.shapes import Clip, UserError

Item = tuple[int, int]
"""(position, clip id): what a sampler yields and a dataset reads."""

ORDER, CROP, ROLL, STAND_IN, OFFSET = range(5)
"""Independent random streams of one seed."""
STAND_INS = 16
"""Clips tried in the place of an unreadable one before its place stays empty."""

CROP_SLACK = 0.02
"""A clip longer than ``clip_seconds`` by less than this part is read from its start: data sets of
"5-s clips" hold 5.001 s, and a segment that does not depend on the position can be cached."""


def philox(seed: int, number: int, purpose: int) -> np.random.Philox:
    """The random bits of (seed, number) for one purpose.

    Raw bits of a counter-based generator are the same in every numpy; its ``Generator`` methods
    are not promised to be, and a resumed run must not depend on an upgrade.
    """
    key = np.array([seed, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64))


def clip_samples(clip_seconds: float, sample_rate: int) -> int:
    """Samples of the longest wave."""
    return round(clip_seconds * sample_rate)


def below(n: int, bits: np.random.Philox) -> int:
    """Uniform in ``0 .. n - 1``."""
    return int(bits.random_raw()) * n >> 64


class Plan:
    """The stream over ``clips`` (a number n for all of 0 .. n - 1, or ids)."""

    def __init__(self, clips: int | Sequence[int] | np.ndarray, *, seed: int) -> None:
        ids = np.arange(clips) if isinstance(clips, int) else np.asarray(clips, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UserError("there are no clips to stream: the selection is empty")
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed={seed} must lie in 0 .. 2^63 - 1")
        self.ids = ids
        self.seed = seed
        self.order = functools.lru_cache(maxsize=2)(self._order)  # batches straddle two epochs

    def __len__(self) -> int:
        return len(self.ids)

    def _order(self, epoch: int) -> np.ndarray:
        """The clip ids of ``epoch`` in their order: (n,) int64."""
        bits = philox(self.seed, epoch, ORDER).random_raw(len(self.ids))
        return self.ids[np.argsort(bits, kind="stable")]

    def clips(self, positions: np.ndarray) -> np.ndarray:
        """Clip ids at global ``positions`` (m,), ascending or not: (m,) int64."""
        epochs, places = np.divmod(positions, len(self.ids))
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self.order(int(epoch))[places[here]]
        return found


class PlanSampler(Sampler[list[Item]]):
    """A ``batch_sampler``: micro-batches of one rank, from where the trainer stands.

    Args:
        batch: clips of a micro-batch on one rank.
        batches: micro-batches that one iteration yields (``len``).
        batches_done: micro-batches finished so far, asked at each ``iter()``.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch: int,
        batches: int,
        rank: int = 0,
        world: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        if batch < 1 or batches < 1:
            raise UserError(f"batch={batch} and batches={batches} must be at least 1")
        assert 0 <= rank < world
        self.plan, self.batch, self.batches = plan, batch, batches
        self.rank, self.world, self.batches_done = rank, world, batches_done

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Item]]:
        start = self.batches_done()
        places = self.rank + self.world * np.arange(self.batch)
        for k in range(start, start + self.batches):
            positions = k * self.batch * self.world + places
            clips = self.plan.clips(positions)
            yield list(zip(positions.tolist(), clips.tolist(), strict=True))


class EvalSampler(Sampler[list[Item]]):
    """Each of ``ids`` once, in order; the last batch is smaller. Position = row in ``ids``."""

    def __init__(self, ids: Sequence[int] | np.ndarray, *, batch: int) -> None:
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        self.ids = np.asarray(ids, np.int64)
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch)

    def __iter__(self) -> Iterator[list[Item]]:
        for start in range(0, len(self.ids), self.batch):
            rows = np.arange(start, min(start + self.batch, len(self.ids)))
            yield list(zip(rows.tolist(), self.ids[rows].tolist(), strict=True))


class Sample(NamedTuple):
    """One clip, decoded."""

    wave: np.ndarray | None  # (S,) float32, S <= clip_samples; None: unreadable, no stand-in
    target: np.ndarray  # (C,) float32
    key: str
    position: int
    skipped: dict[str, str]
    """``{key: "kind: why"}`` of the unreadable clips met on the way."""


class ClipDataset(Dataset[Sample]):
    """Reads, decodes, crops, rolls and places the clip of an ``Item``.

    Args:
        sample_rate: Hz of the waves.
        clip_seconds: longest wave; what is longer is cropped while reading, by a seek.
        seed: of crops, rolls and offsets, with the position.
        crop: where a crop lies; ``random`` by (seed, position).
        roll: circular shift of each wave by a random offset.
        random_offset: put a clip shorter than ``clip_seconds`` at a random place of a silent wave
            of that length, all of which counts as signal; False: waves keep their own length.
        pool: clips that may stand in for an unreadable one (training); None: no replacement, the
            sample comes without a wave and the collate drops it (evaluation).
        cache_bytes: keep up to so many bytes of decoded waves in memory, in each loader process.
            Only clips whose segment does not depend on the position are kept: the cache changes
            no value.
    """

    def __init__(
        self,
        index: Index,
        *,
        sample_rate: int,
        clip_seconds: float,
        seed: int = 0,
        crop: Literal["random", "start", "centre"] = "random",
        roll: bool = False,
        random_offset: bool = False,
        pool: np.ndarray | None = None,
        cache_bytes: int = 0,
    ) -> None:
        if clip_seconds <= 0 or sample_rate < 1:
            raise UserError(f"clip_seconds={clip_seconds}, sample_rate={sample_rate}: not positive")
        self.index = index
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self.seed, self.crop, self.roll, self.pool = seed, crop, roll, pool
        self.random_offset = random_offset
        self._cache: dict[int, np.ndarray] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: Item) -> Sample:
        position, clip = item
        skipped: dict[str, str] = {}
        stand_ins = philox(self.seed, position, STAND_IN)
        for _ in range(1 + STAND_INS):
            try:
                return self._sample(self._wave(clip, position), clip, position, skipped)
            except (DecodeError, OSError) as error:
                kind = error.kind if isinstance(error, DecodeError) else "unreadable"
                why = error.strerror if isinstance(error, OSError) else error
                skipped[self.index.key(clip)] = f"{kind}: {why}"
            if self.pool is None:
                break
            clip = int(self.pool[below(len(self.pool), stand_ins)])
        return self._sample(None, clip, position, skipped)

    def _sample(
        self, wave: np.ndarray | None, clip: int, position: int, skipped: dict[str, str]
    ) -> Sample:
        return Sample(wave, self.index.targets(clip), self.index.key(clip), position, skipped)

    def _wave(self, clip: int, position: int) -> np.ndarray:
        """(S,) float32: the segment of ``clip`` that belongs at ``position``, rolled, placed."""
        wave = self._cache.get(clip)
        if wave is None:
            encoded = self.index.read(clip)
            start_seconds, extra_frames = self._segment(clip, position, encoded)
            known = int(self.index.frames[clip])
            wave = decode(
                encoded.data,
                sample_rate=self.sample_rate,
                start_seconds=start_seconds,
                max_seconds=self.clip_seconds,
                expected_frames=known if known > 0 else None,
            )
            free = self.crop != "random" or not extra_frames
            if free and wave.nbytes <= self._room:
                self._room -= wave.nbytes
                self._cache[clip] = wave
        if self.roll:
            wave = np.roll(wave, below(len(wave), philox(self.seed, position, ROLL)))
        room = clip_samples(self.clip_seconds, self.sample_rate) - len(wave)
        if self.random_offset and room > 0:
            first = below(room + 1, philox(self.seed, position, OFFSET))
            wave = np.pad(wave, (first, room - first))
        return wave

    def _segment(self, clip: int, position: int, encoded: Clip) -> tuple[float, int]:
        """Start of the segment in seconds, and how many source frames it leaves out."""
        frames, rate = int(self.index.frames[clip]), int(self.index.rate[clip])
        if self.crop == "start":
            return 0.0, 0
        if frames <= 0 or rate <= 0:
            info = probe(encoded.data)
            frames, rate = info.frames, info.sample_rate
        wanted = math.ceil(self.clip_seconds * rate - 1e-6)  # so many does decode read
        extra = frames - wanted
        if extra <= CROP_SLACK * wanted:
            return 0.0, 0
        if self.crop == "centre":
            return extra // 2 / rate, extra
        first = below(extra + 1, philox(self.seed, position, CROP))
        return first / rate, extra
