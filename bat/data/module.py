"""The loaders of a run, as Lightning wants them, and where the stream goes on after a resume.

The position is read from Lightning's own count of finished micro-batches whenever an iterator is
made: ``fit_loop.epoch_loop.batch_progress.total.processed``. (``processed``, not ``completed``:
a checkpoint saved in ``on_train_batch_end`` holds the step of a batch that is not yet
``completed``. Lightning 2.6.6.) A checkpoint also records how many clips a micro-batch was; on a
resume with another number of ranks or another split of the global batch, Lightning's counts are
recounted in those of the new size before it reads them. Another data set, seed or global batch is
refused. Build the Trainer with ``use_distributed_sampler=False``.
"""

from __future__ import annotations

import hashlib
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from bat.data.bad_clips import BadClips
from bat.data.index import Index
from bat.data.plan import MixedPlan, Plan, make_plan
from bat.data.stream import ClipDataset, EvalSampler, PlanSampler, as_it_is
from bat.shapes import UserError, WaveBatch


def worker_init(worker: int) -> None:
    """A loader process outlives the signals meant for the run, which still has to save."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


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
) -> DataLoader[WaveBatch]:
    """Batches of the clips ``ids`` (None: all) once, in order; unreadable ones are left out.

    Long clips are cropped at their centre.
    """
    dataset = ClipDataset(
        index,
        sample_rate=sample_rate,
        clip_seconds=clip_seconds,
        crop="centre",
        cache_bytes=cache_bytes,
        min_seconds=min_seconds,
    )
    ids = np.arange(len(index)) if ids is None else ids
    return DataLoader(
        dataset,
        batch_sampler=EvalSampler(ids, batch=batch),
        collate_fn=as_it_is,
        num_workers=workers,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # the loader draws a seed: never from the run's own state
    )


class StreamData(LightningDataModule):
    """What training streams have in common: place, ranks, unreadable clips, what a checkpoint says.

    Args:
        batch: clips of a micro-batch on one device.
        max_bad: fraction of unreadable clips above which the run stops.
        out: run folder in which ``bad_clips.jsonl`` lists unreadable clips; None: no list.
    """

    clip_samples: int
    """S of every batch."""

    def __init__(self, *, batch: int, max_bad: float, out: Path | None) -> None:
        super().__init__()
        self.batch, self.out = batch, out
        self.bad_clips = BadClips(max_bad=max_bad)
        self._size_then: int | None = None  # clips a micro-batch, where a checkpoint was loaded

    def first_batch(self) -> WaveBatch:
        """The first micro-batch of the stream, made in this process."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the stream is of, for an export and a summary."""
        raise NotImplementedError

    def _stream(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Each process lists its own unreadable clips."""
        if self.out is not None:
            rank, _ = self._ranks()
            name = "bad_clips.jsonl" if rank == 0 else f"bad_clips-rank{rank}.jsonl"
            self.bad_clips.file = self.out / name

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    @property
    def _size(self) -> int:
        """Clips of a micro-batch over all ranks."""
        return self.batch * self._ranks()[1]

    def batches_done(self) -> int:
        """Micro-batches behind us, by Lightning's count."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _recount(self) -> None:
        """Make Lightning's counts, as loaded, those of micro-batches of this run's size."""
        then, now, self._size_then = self._size_then, self._size, None
        if self.trainer is None or then in (None, now):
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        for count in vars(progress)["total"], vars(progress)["current"]:
            clips = count.processed * then
            if clips % now:
                raise UserError(
                    f"the checkpoint stands at clip {clips}, which micro-batches of {now} "
                    f"(data.batch x devices) do not reach: resume with {then}, or a divisor of it"
                )
            ahead = {k: getattr(count, k) - count.processed for k in vars(count)}
            for name, difference in ahead.items():
                setattr(count, name, clips // now + difference)

    def _on_cuda(self) -> bool:
        trainer = self.trainer
        return trainer is not None and trainer.strategy.root_device.type == "cuda"

    def on_before_batch_transfer(self, batch: WaveBatch, dataloader_idx: int) -> WaveBatch:
        """Count unreadable clips, in the main process, as batches are used."""
        trainer = self.trainer
        self.bad_clips.add(batch)
        self.bad_clips.check()
        if trainer is not None and trainer.training and len(batch.keys) < self.batch:
            self.bad_clips.check(final=True)
            raise UserError(f"{self.bad_clips.summary()}, too many in a row: check the shards")
        return batch

    def transfer_batch_to_device(
        self, batch: WaveBatch, device: torch.device, dataloader_idx: int
    ) -> WaveBatch:
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: which stream it is of (where it stands, Lightning knows)."""
        return {
            "clips_a_micro_batch": self._size,
            "stream": self._stream(),
            "bad_clips": self.bad_clips.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written; UserError where the stream is another one."""
        before = state_dict["stream"]
        for name, now in self._stream().items():
            then = before.get(name, "nothing of it")
            if then != now:
                raise UserError(
                    f"the checkpoint was written with {name} {then}, this run has {now}: resume "
                    f"with the same, or start a new run with another out="
                )
        self._size_then = state_dict["clips_a_micro_batch"]
        self.bad_clips.load_state_dict(state_dict["bad_clips"])


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
        workers: loader processes; 0 decodes in the training process.
        cache_bytes: decoded waves kept in memory by each loader process (small data sets).
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
        workers: int = 0,
        cache_bytes: int = 0,
        max_bad: float = 0.05,
        out: Path | None = None,
    ) -> None:
        super().__init__(batch=batch, max_bad=max_bad, out=out)
        self.index = index
        self.batches, self.workers, self.seed = batches, workers, seed
        self.plan = plan or make_plan(index, seed=seed)
        self.dataset = ClipDataset(
            index,
            sample_rate=sample_rate,
            clip_seconds=clip_seconds,
            seed=seed,
            roll=roll,
            random_offset=random_offset,
            min_seconds=min_seconds,
            pool=self.plan.ids,
            cache_bytes=cache_bytes,
        )
        self.clip_samples = self.dataset.clip_samples
        # Lightning 2.6.6 judges by the loader's type; this stream resumes exactly
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")

    def first_batch(self) -> WaveBatch:
        """The first micro-batch of the stream, made in this process."""
        clips = self.plan.clips(np.arange(self.batch))
        return self.dataset.batch(list(enumerate(clips.tolist())))

    def facts(self) -> dict[str, Any]:
        return {"hash": self.index.hash, "clips": len(self.index), "order": self.plan.identity()}

    def train_dataloader(self) -> DataLoader[WaveBatch]:
        self._recount()
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
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=as_it_is,
            num_workers=self.workers,
            worker_init_fn=worker_init,
            persistent_workers=self.workers > 0,
            pin_memory=self._on_cuda(),
            generator=torch.Generator(),  # as in eval_loader
        )

    def _fetch(self, clips: np.ndarray) -> None:
        """Have the shards of ``clips``, in the order of their first use, brought here."""
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
