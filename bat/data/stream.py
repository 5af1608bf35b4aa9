"""Makes batches from the plan: the positions of each rank and worker, and the samples of each clip.

Micro-batch k takes positions ``k G .. (k + 1) G - 1`` of the plan, ``G = batch * world``; rank r
takes every ``world``-th from the r-th on; a batch is the same whichever worker makes it. The
position of the run is read from the trainer whenever an iterator is made, and a clip's randomness
(crop, roll, offset) is a function of (seed, position). So an interrupted and resumed run equals an
uninterrupted one, and two ranks read what one rank with a doubled batch would read.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Required, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from bat.audio.decode import (
    MAX_FILE_SECONDS,
    DecodeError,
    Source,
    check_length,
    decode,
    decode_into,
    probe,
    write_rolled,
)
from bat.data.draws import CROP, NOISE, OFFSET, ROLL, below, normal, philox
from bat.data.index import Index
from bat.data.loader import IDLE, Heartbeat, Loader
from bat.data.plan import MixedPlan, Plan
from bat.errors import UserError
from bat.types import Skipped, WaveBatch

Item = tuple[int, int]
"""(position, clip id), which a sampler yields and a dataset reads."""

STAND_INS = 16
"""Number of clips tried in place of an unreadable one before its place stays empty."""

CROP_SLACK = 0.02
"""Excess length, as a fraction of ``clip_seconds``, below which a clip is read from its start: data
sets of "5-s clips" hold 5.001 s, and a segment that does not depend on the position can be
cached."""

PREFETCH_BATCHES = 8
"""Micro-batches between two prefetches of shards."""


def clip_samples(clip_seconds: float, sample_rate: int) -> int:
    """Returns the number of samples of the longest wave."""
    return round(clip_seconds * sample_rate)


class PlanSampler(Sampler[list[Item]]):
    """A ``batch_sampler``: micro-batches of one rank, from the trainer's position on.

    Args:
        batch: clips of a micro-batch on one rank.
        batches: micro-batches that one iteration yields (``len``).
        batches_done: returns the micro-batches finished so far; called at each ``iter()``.
        prefetch: called from time to time with the ids of the clips of the next ``look_ahead``
            positions and a few batches more, of all ranks, in their order; None: no prefetch.
    """

    def __init__(
        self,
        plan: Plan | MixedPlan,
        *,
        batch: int,
        batches: int,
        rank: int = 0,
        world: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
        prefetch: Callable[[np.ndarray], None] | None = None,
        look_ahead: int = 8192,
    ) -> None:
        if batch < 1 or batches < 1:
            raise UserError(f"batch={batch} and batches={batches} must be at least 1")
        assert 0 <= rank < world
        self.plan, self.batch, self.batches = plan, batch, batches
        self.rank, self.world, self.batches_done = rank, world, batches_done
        self.prefetch, self.look_ahead = prefetch, look_ahead

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Item]]:
        start = self.batches_done()
        places = self.rank + self.world * np.arange(self.batch)
        size = self.batch * self.world
        for k in range(start, start + self.batches):
            if self.prefetch is not None and (k - start) % PREFETCH_BATCHES == 0:
                last = k * size + self.look_ahead + PREFETCH_BATCHES * size
                self.prefetch(self.plan.clips(np.arange(k * size, last)))
            positions = k * size + places
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


class ClipSettings(TypedDict, total=False):
    """Settings of how a clip is read, which ``ClipDataset`` and all that make one take."""

    sample_rate: Required[int]
    """Hz of the waves; clips at another rate are resampled."""
    clip_seconds: Required[float]
    """Longest wave; longer clips are cropped while reading, by a seek."""
    roll: bool
    """Circular shift of each wave by a random offset."""
    random_offset: bool
    """Put a clip shorter than ``clip_seconds`` at a random place of a silent wave of that length,
    all of which counts as signal; False: waves keep their own length."""
    noise: float
    """Deviation of normal noise added to each sample that counts as signal; 0: none."""
    min_seconds: float
    """Clips shorter than this are unreadable ("brief")."""
    max_seconds: float
    """Longer files are unreadable ("long"), whatever part of them is wanted. Where the index knows
    the length, not a byte of them is read."""
    cache_bytes: int
    """Bytes of decoded waves kept in memory, in each loader process. Only clips whose segment does
    not depend on the position are kept: the cache changes no value."""


class ClipReader:
    """Decodes, crops, rolls and places clips, by (seed, position) alone.

    Args:
        seed: of crops, rolls and offsets, with the position.
        crop: position of a crop; ``random`` by (seed, position).
        settings: see ``ClipSettings``.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        crop: Literal["random", "start"] = "random",
        **settings: Unpack[ClipSettings],
    ) -> None:
        self.seed, self.crop = seed, crop
        self.sample_rate, self.clip_seconds = settings["sample_rate"], settings["clip_seconds"]
        self.roll = settings.get("roll", False)
        self.random_offset = settings.get("random_offset", False)
        self.noise = settings.get("noise", 0.0)
        self.min_seconds = settings.get("min_seconds", 0.0)
        self.max_seconds = settings.get("max_seconds", MAX_FILE_SECONDS)
        if self.clip_seconds <= 0 or self.sample_rate < 1:
            values = f"clip_seconds={self.clip_seconds}, sample_rate={self.sample_rate}"
            raise UserError(f"{values}: not positive")

    @property
    def clip_samples(self) -> int:
        """Samples S of every batch."""
        return clip_samples(self.clip_seconds, self.sample_rate)

    def segment(
        self,
        data: Source,
        position: int,
        frames: int = 0,
        rate: int = 0,
        start: int | None = None,
    ) -> tuple[dict[str, Any], bool]:
        """Returns how ``decode`` reads the segment at ``position`` of an encoded clip of ``frames``
        samples at ``rate`` (0: unknown), and whether it is the same at every position.

        ``start``: first sample of the clip, a window of the file; None: the clip is the file."""
        known = frames > 0 and rate > 0
        how: dict[str, Any] = {
            "sample_rate": self.sample_rate,
            "start_seconds": 0.0,
            "max_seconds": self.clip_seconds,
            "expected_frames": frames if frames > 0 else None,
            "expected_rate": rate if rate > 0 else None,
            "min_seconds": self.min_seconds,
            "max_file_seconds": self.max_seconds,
        }
        if start is not None and known:
            how["start_seconds"] = start / rate
            return how, True
        if self.crop == "start":
            return how, True
        if not known:
            info = probe(data, max_file_seconds=self.max_seconds)
            frames, rate = info.frames, info.sample_rate
        extra = frames_left_out(frames, rate, self.clip_seconds)
        if extra:
            start = below(extra + 1, philox(self.seed, position, CROP))
            how["start_seconds"] = start / rate
        return how, not extra

    def place(self, position: int, samples: int) -> tuple[int, int]:
        """Returns offset and roll of a wave at ``position``."""
        roll = below(samples, philox(self.seed, position, ROLL)) if self.roll else 0
        room = self.clip_samples - samples
        if not self.random_offset or room <= 0:
            return 0, roll
        return below(room + 1, philox(self.seed, position, OFFSET)), roll


class ClipDataset(ClipReader, Dataset[WaveBatch]):
    """Reads the clips of a batch of ``Item``s.

    The loader calls ``batch`` (as ``__getitems__``), which decodes into the batch's own memory:
    no wave is copied twice, and in a worker that memory is already shared with the trainer.

    Args:
        plan: its ``stand_ins`` replace unreadable clips (training); None: no replacement, the
            batch lacks the clip (evaluation).
        heartbeat: records the clip that this process reads.
        seed, crop, settings: see ``ClipReader``.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int = 0,
        crop: Literal["random", "start"] = "random",
        plan: Plan | MixedPlan | None = None,
        heartbeat: Heartbeat | None = None,
        **settings: Unpack[ClipSettings],
    ) -> None:
        super().__init__(seed=seed, crop=crop, **settings)
        self.index, self.plan, self.heartbeat = index, plan, heartbeat
        self._cache: dict[int, np.ndarray] = {}
        self._room = settings.get("cache_bytes", 0)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, items: Sequence[Item]) -> WaveBatch:
        """Returns the clips of ``items``; unreadable ones without a stand-in are left out."""
        rows = BatchRows(len(items), self.clip_samples)
        skipped: list[Skipped] = []
        kept: list[Item] = []
        for position, clip in items:
            for candidate in self._candidates(position, clip):
                if self.heartbeat is not None:
                    self.heartbeat.reads(candidate)
                try:
                    offset, samples = self._fill(rows.next, candidate, position)
                except (DecodeError, OSError) as error:
                    skipped.append(self._skipped(candidate, position, error))
                    continue
                rows.keep(offset, samples, whole=self.random_offset)
                if self.noise:
                    wave = rows.last
                    wave += self.noise * normal(len(wave), philox(self.seed, position, NOISE))
                kept.append((position, candidate))
                break
        if self.heartbeat is not None:
            self.heartbeat.reads(IDLE)
        waves, lengths = rows.tensors()
        targets = np.zeros((len(kept), self.index.classes), np.float32)
        for row, (_, clip) in enumerate(kept):
            targets[row] = self.index.targets(clip)
        return WaveBatch(
            waves=waves,  # (B, S)
            lengths=lengths,
            targets=torch.from_numpy(targets),  # (B, C)
            keys=[self.index.key(clip) for _, clip in kept],
            positions=torch.tensor([position for position, _ in kept], dtype=torch.int64),
            skipped=skipped,
        )

    __getitems__ = batch

    def __getitem__(self, item: Item) -> WaveBatch:
        return self.batch([item])

    def _candidates(self, position: int, clip: int) -> Iterator[int]:
        """Yields ``clip``, then the clips that may replace it."""
        yield clip
        if self.plan is not None:
            yield from itertools.islice(self.plan.stand_ins(position), STAND_INS)

    def _skipped(self, clip: int, position: int, error: DecodeError | OSError) -> Skipped:
        kind = error.kind if isinstance(error, DecodeError) else "unreadable"
        why = error.strerror if isinstance(error, OSError) else error
        return Skipped(
            self.index.key(clip), self.index.shard_name(clip), kind, str(why or error), position
        )

    def _fill(self, row: np.ndarray, clip: int, position: int) -> tuple[int, int]:
        """Writes the segment of ``clip`` at ``position`` into ``row``; returns (offset, n)."""
        wave = self._cache.get(clip)
        if wave is None:
            frames, rate = int(self.index.frames[clip]), int(self.index.rate[clip])
            if frames > 0 and rate > 0:
                check_length(frames, rate, self.max_seconds)
            data = self.index.audio(clip)
            start = None if self.index.starts is None else int(self.index.starts[clip])
            how, fixed = self.segment(data, position, frames, rate, start)
            if not fixed or not self._room:
                place = functools.partial(self.place, position)
                return decode_into(row, data, place=place, **how)
            wave = decode(data, **how)
            if wave.nbytes <= self._room:
                self._room -= wave.nbytes
                self._cache[clip] = wave
        wave = wave[: len(row)]
        offset, roll = self.place(position, len(wave))
        write_rolled(row[offset:], wave, roll)
        return offset, len(wave)


def eval_loader(
    index: Index,
    ids: np.ndarray | None = None,
    *,
    batch: int,
    workers: int = 0,
    **settings: Unpack[ClipSettings],
) -> Loader:
    """Returns a loader over the clips ``ids`` (None: all) once, in order; unreadable ones are left
    out, and long clips are cut off at their end."""
    heartbeat = Heartbeat(workers)
    dataset = ClipDataset(index, crop="start", heartbeat=heartbeat, **settings)

    def where(worker: int) -> str | None:
        clip = heartbeat.worker(worker)
        return None if clip is None else f"{index.shard_name(clip)}, clip {index.key(clip)}"

    ids = np.arange(len(index)) if ids is None else ids
    return Loader(dataset, EvalSampler(ids, batch=batch), workers=workers, where=where)


def frames_left_out(frames: int, rate: int, clip_seconds: float) -> int:
    """Returns the source frames of a clip that a segment lacks; 0: it is read whole."""
    wanted = math.ceil(clip_seconds * rate - 1e-6)  # as many as decode reads
    extra = frames - wanted
    return extra if extra > CROP_SLACK * wanted else 0


class BatchRows:
    """Up to ``rows`` waves of up to ``samples`` samples; filled from the top, see ``next``."""

    def __init__(self, rows: int, samples: int) -> None:
        if get_worker_info() is not None:  # written where the other process reads it
            self._tensor = torch.empty(rows, samples, dtype=torch.float32).share_memory_()
        else:  # numpy asks for huge pages: page faults cost a twentieth of a FLAC clip
            self._tensor = torch.from_numpy(np.empty((rows, samples), np.float32))
        self._waves = self._tensor.numpy()
        self._lengths: list[int] = []

    @property
    def next(self) -> np.ndarray:
        """Returns the next free row, (S,) float32, to be filled; then ``keep`` it."""
        row: np.ndarray = self._waves[len(self._lengths)]
        return row

    @property
    def last(self) -> np.ndarray:
        """Returns the samples of the latest row that count as signal, to be changed."""
        row: np.ndarray = self._waves[len(self._lengths) - 1][: self._lengths[-1]]
        return row

    def keep(self, offset: int, samples: int, *, whole: bool = False) -> None:
        """Keep the next row, a wave of ``samples`` from ``offset`` on with silence around it.

        ``whole``: the row counts as signal up to its end, silence included.
        """
        row = self.next
        row[:offset] = 0.0
        row[offset + samples :] = 0.0
        self._lengths.append(len(row) if whole else offset + samples)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Returns waves (B, S) float32 and lengths (B,) int64 of the rows that were filled."""
        filled = len(self._lengths)
        return self._tensor[:filled], torch.tensor(self._lengths, dtype=torch.int64)
