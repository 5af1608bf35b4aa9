"""Makes the loaders of a run for Lightning: the training stream and evaluation batches.

This module holds the data and the order of a stream; ``base.py`` describes where it resumes.
Build the Trainer with ``use_distributed_sampler=False``.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bat.audio.decode import MAX_FILE_SECONDS
from bat.data.base import StreamData
from bat.data.heartbeat import Heartbeat
from bat.data.index import Index
from bat.data.loader import Loader
from bat.data.order import make_plan
from bat.data.plan import MixedPlan, Plan
from bat.data.stream import ClipDataset, EvalSampler, PlanSampler
from bat.types import WaveBatch


def eval_loader(
    index: Index,
    ids: np.ndarray | None = None,
    *,
    batch: int,
    sample_rate: int,
    clip_seconds: float,
    workers: int = 0,
    cache_bytes: int = 0,
    min_seconds: float = 0.0,
    max_seconds: float = MAX_FILE_SECONDS,
) -> Loader:
    """Returns a loader over the clips ``ids`` (None: all) once, in order; unreadable ones are left
    out.

    Long clips are cut off at their end; files of more than ``max_seconds`` are unreadable.
    """
    heartbeat = Heartbeat(workers)
    dataset = ClipDataset(
        index,
        sample_rate=sample_rate,
        clip_seconds=clip_seconds,
        crop="start",
        cache_bytes=cache_bytes,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        heartbeat=heartbeat,
    )

    def where(worker: int) -> str | None:
        clip = heartbeat.worker(worker)
        return None if clip is None else f"{index.shard_name(clip)}, clip {index.key(clip)}"

    ids = np.arange(len(index)) if ids is None else ids
    return Loader(dataset, EvalSampler(ids, batch=batch), workers=workers, where=where)


class AudioData(StreamData):
    """Training stream over indexed shards.

    Args:
        index: the training clips.
        plan: their order; None: all of them, evenly shuffled by ``seed``.
        batch: clips of a micro-batch on one device.
        batches: micro-batches of one of Lightning's epochs on one device.
        sample_rate: Hz of the waves; clips at another rate are resampled.
        clip_seconds: length of a row; longer clips are cropped, shorter ones padded.
        seed: of order, crops, rolls and offsets.
        roll: circular roll of each clip.
        random_offset: short clips begin at a random place of their row, see ``ClipDataset``.
        min_seconds: shorter clips count as unreadable.
        max_seconds: longer files count as unreadable ("long"), whatever part of them is wanted.
        workers: loader processes; 0 decodes in the training process.
        cache_bytes: decoded waves kept in memory by each loader process (small data sets).
        look_ahead: positions for which remote shards are prefetched.
        max_bad: fraction of unreadable clips above which the run stops.
        out: run folder in which ``bad_clips.jsonl`` lists unreadable clips; None: no list.

    Raises:
        UserError: a value out of range, an empty selection.
    """

    def __init__(
        self,
        *,
        index: Index,
        batch: int,
        batches: int,
        sample_rate: int,
        clip_seconds: float,
        plan: Plan | MixedPlan | None = None,
        seed: int = 0,
        roll: bool = False,
        random_offset: bool = False,
        min_seconds: float = 0.0,
        max_seconds: float = MAX_FILE_SECONDS,
        workers: int = 0,
        cache_bytes: int = 0,
        look_ahead: int = 8192,
        max_bad: float = 0.05,
        out: Path | None = None,
    ) -> None:
        super().__init__(
            batch=batch,
            max_bad=max_bad,
            workers=workers,
            out=out,
        )
        self.index, self.look_ahead = index, look_ahead
        self.batches, self.seed = batches, seed
        self.plan = plan or make_plan(index, seed=seed)
        self.dataset = ClipDataset(
            index,
            sample_rate=sample_rate,
            clip_seconds=clip_seconds,
            seed=seed,
            roll=roll,
            random_offset=random_offset,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            plan=self.plan,
            cache_bytes=cache_bytes,
            heartbeat=self.heartbeat,
        )
        self.clip_samples = self.dataset.clip_samples
        # Lightning 2.6.6 decides by the loader's type; this stream resumes exactly
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")

    def first_batch(self) -> WaveBatch:
        """Returns the first micro-batch of the stream, made in this process."""
        clips = self.plan.clips(np.arange(self.batch))
        return self.dataset.batch(list(enumerate(clips.tolist())))

    def facts(self) -> dict[str, Any]:
        return {"hash": self.index.hash, "clips": len(self.index), "order": self.plan.identity()}

    def named(self, what: int) -> str:
        return f"{self.index.shard_name(what)}, clip {self.index.key(what)}"

    def train_dataloader(self) -> Loader:
        self._recount()
        self._agree()
        rank, world = self._ranks()
        looks_ahead = self.index.remote and (self.trainer is None or self.trainer.local_rank == 0)
        sampler = PlanSampler(
            self.plan,
            batch=self.batch,
            batches=self.batches,
            rank=rank,
            world=world,
            batches_done=self.batches_done,
            ahead=self._fetch if looks_ahead else None,
            look_ahead=self.look_ahead,
        )
        return self._loader(self.dataset, sampler)

    def _fetch(self, clips: np.ndarray) -> None:
        """Prefetch the shards of ``clips``, in the order of their first use."""
        shards, first = np.unique(self.index.shard[clips], return_index=True)
        self.index.prefetch(shards[np.argsort(first)].tolist())

    def _stream(self) -> dict[str, Any]:
        trainer = self.trainer
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        names = "\0".join(self.index.vocabulary)
        return {
            "reading": "by index",
            "labels": f"{self.index.classes} ({hashlib.sha256(names.encode()).hexdigest()[:8]})",
            "data set": self.index.hash[:16],
            "order": f"{self.plan.identity()} of {len(self.index)}",
            "seed": self.seed,
            "global batch": self._size * accumulate,
        }
