"""The training stream over shards that cannot be indexed: **not exactly resumable**.

``SequentialClips`` are decoded and batched in the loader's workers. No position is known
beforehand, so a resumed run continues with an epoch that it has not begun, some clips of which it
has seen. Unreadable clips are skipped; the next one takes their place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from bat.audio.decode import MAX_FILE_SECONDS, DecodeError, decode_into, probe
from bat.data.base import StreamData
from bat.data.heartbeat import Heartbeat
from bat.data.loader import Loader
from bat.data.plan import ROLL, below, philox
from bat.data.sequential import SequentialClips
from bat.data.sources import RetryPolicy, Shard, find
from bat.data.splits import choose_split
from bat.data.stream import BatchRows, clip_samples, frames_left_out, random_start
from bat.errors import UserError
from bat.types import Clip, Skipped, WaveBatch

TOO_MANY_IN_A_ROW = 1000


class WatchedClips(SequentialClips):
    """``SequentialClips`` that record in a heartbeat the shard they read the next clip from."""

    heartbeat: Heartbeat

    def _clips(self, shard: Shard) -> Iterator[Clip]:
        number = self.shards.index(shard)
        self.heartbeat.reads(number)
        for clip in super()._clips(shard):
            yield clip
            self.heartbeat.reads(number)


class SequentialBatches(IterableDataset[WaveBatch]):
    """Endless batches of decoded clips, cropped at random and rolled; see ``ClipDataset``."""

    def __init__(
        self,
        clips: WatchedClips,
        *,
        batch: int,
        sample_rate: int,
        clip_seconds: float,
        seed: int,
        roll: bool,
        min_seconds: float,
        max_seconds: float,
    ) -> None:
        self.clips, self.batch, self.max_seconds = clips, batch, max_seconds
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self.seed, self.roll, self.min_seconds = seed, roll, min_seconds

    def __iter__(self) -> Iterator[WaveBatch]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.clips.rank * workers + number, self.clips.world * workers
        samples = clip_samples(self.clip_seconds, self.sample_rate)
        clips, count, failures = iter(self.clips), 0, 0
        while True:
            rows, keys, positions = BatchRows(self.batch, samples), list[str](), list[int]()
            skipped: list[Skipped] = []
            while len(keys) < self.batch:
                clip = next(clips)
                position = count * readers + reader
                count += 1
                skipped += self.clips.take_skipped()
                try:
                    rows.keep(*self._fill(rows.next, clip, position))
                except DecodeError as error:
                    skipped.append(Skipped(clip.key, clip.shard, error.kind, str(error), position))
                    failures += 1
                    if failures > TOO_MANY_IN_A_ROW:
                        raise UserError(
                            f"{failures} unreadable clips in a row (the last: {clip.key}, "
                            f"{error}): check the shards"
                        ) from error
                    continue
                failures = 0
                keys.append(clip.key)
                positions.append(position)
            self.clips.heartbeat.rests()
            waves, lengths = rows.tensors()
            yield WaveBatch(
                waves=waves,  # (B, S)
                lengths=lengths,
                targets=torch.zeros(self.batch, 0),
                keys=keys,
                positions=torch.tensor(positions, dtype=torch.int64),
                skipped=skipped,
            )

    def _fill(self, row: np.ndarray, clip: Clip, position: int) -> tuple[int, int]:
        info = probe(clip.data, max_file_seconds=self.max_seconds)
        rate, start_seconds = info.sample_rate, 0.0
        extra = frames_left_out(info.frames, rate, self.clip_seconds)
        if extra:
            start_seconds = random_start(extra, rate, seed=self.seed, position=position)

        def place(samples: int) -> tuple[int, int]:
            return 0, below(samples, philox(self.seed, position, ROLL)) if self.roll else 0

        return decode_into(
            row,
            clip.data,
            place=place,
            sample_rate=self.sample_rate,
            start_seconds=start_seconds,
            max_seconds=self.clip_seconds,
            min_seconds=self.min_seconds,
            max_file_seconds=self.max_seconds,
        )


class SequentialData(StreamData):
    """Training stream over ``shards`` read from front to end, without labels.

    Args:
        shards: as ``open_index`` takes them, compressed tars too.
        split: as ``choose_split``: a name, ``all``, or ``auto`` (``train`` where there is one).
        batch, sample_rate, clip_seconds, seed, roll, min_seconds, max_seconds, workers, max_bad,
            out: as ``AudioData``.
        retries, timeout_seconds, redirects: of remote shards, as ``open_index``.

    Raises:
        UserError: no shards found, a split that does not exist, a value out of range.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        batch: int,
        sample_rate: int,
        clip_seconds: float,
        split: str = "auto",
        seed: int = 0,
        roll: bool = False,
        min_seconds: float = 0.0,
        max_seconds: float = MAX_FILE_SECONDS,
        workers: int = 0,
        max_bad: float = 0.05,
        out: Path | None = None,
        retries: int = 5,
        timeout_seconds: float = 30.0,
        redirects: Sequence[str] = (),
    ) -> None:
        super().__init__(
            batch=batch,
            max_bad=max_bad,
            workers=workers,
            out=out,
        )
        self.clip_samples = clip_samples(clip_seconds, sample_rate)
        self.seed = seed
        self._decoding: dict[str, Any] = {
            "batch": batch,
            "sample_rate": sample_rate,
            "clip_seconds": clip_seconds,
            "seed": seed,
            "roll": roll,
            "min_seconds": min_seconds,
            "max_seconds": max_seconds,
        }
        self._policy: dict[str, Any] = {
            "retries": retries,
            "timeout_seconds": timeout_seconds,
            "redirects": redirects,
        }
        policy = RetryPolicy(retries, timeout_seconds, redirects=tuple(redirects))
        found = [shard for source in shards for shard in find(source, policy)]
        self.shards, self.splits = choose_split(found, split, policy)
        self._hash = _identity(self.shards, self.splits)

    def _clips(self, *, epoch: int) -> WatchedClips:
        rank, world = self._ranks()
        clips = WatchedClips(
            self.shards,
            splits=self.splits,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world=world,
            **self._policy,
        )
        clips.heartbeat = self.heartbeat
        return clips

    def named(self, what: int) -> str:
        return self.shards[what].name

    def first_batch(self) -> WaveBatch:
        return next(iter(SequentialBatches(self._clips(epoch=0), **self._decoding)))

    def facts(self) -> dict[str, Any]:
        return {
            "hash": self._hash,
            "shards": len(self.shards),
            "order": "front to end, not exactly resumable",
        }

    def train_dataloader(self) -> Loader:
        self._recount()
        # the first epoch to read: differs between resumes, does not count epochs
        clips = self._clips(epoch=self.batches_done())
        return self._loader(SequentialBatches(clips, **self._decoding))

    def _stream(self) -> dict[str, Any]:
        trainer = self.trainer
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        return {
            "reading": "front to end",
            "data set": self.facts()["hash"][:16],
            "seed": self.seed,
            "global batch": self._size * accumulate,
        }


def _identity(shards: Sequence[Shard], splits: frozenset[str] | None) -> str:
    """Returns a digest of the data: names of the shards, sizes of the local ones, splits."""
    digest = hashlib.sha256(repr(None if splits is None else sorted(splits)).encode())
    for shard in shards:
        try:
            size = shard.place.stat().st_size if isinstance(shard.place, Path) else -1
        except OSError:
            size = -1  # counted when it is read
        digest.update(os.fsencode(f"\0{shard.split}/{shard.name}\0{size}"))
    return digest.hexdigest()
