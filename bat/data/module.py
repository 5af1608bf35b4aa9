"""Feeds a run: the training stream with its position and checkpoint state, and evaluation batches.

The position is read from Lightning's own count of finished micro-batches whenever an iterator is
made: ``fit_loop.epoch_loop.batch_progress.total.processed``. (``processed``, not ``completed``:
a checkpoint saved in ``on_train_batch_end`` holds the step of a batch that is not yet
``completed``. Lightning 2.6.6.) A checkpoint also records the number of clips of a micro-batch; on
a resume with another number of ranks or another division of the global batch, Lightning's counts
are converted to the new size before it reads them. A resume with another data set, seed or global
batch is refused, and so are ranks that would read different streams. Build the Trainer with
``use_distributed_sampler=False``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset, Sampler

from bat.data.bad_clips import BadClips, merged_states
from bat.data.index import Index
from bat.data.loader import Heartbeat, Loader
from bat.data.plan import MixedPlan, Plan, make_plan
from bat.data.stream import ClipDataset, ClipSettings, Item, PlanSampler
from bat.errors import UserError
from bat.types import WaveBatch


class StreamData(LightningDataModule):
    """Base of a training stream: position, ranks, unreadable clips and checkpoint state.

    Args:
        batch: clips of a micro-batch on one device.
        max_bad: fraction of unreadable clips above which the run stops.
        workers: loader processes; 0 decodes in the training process.
        out: run folder in which ``bad_clips.jsonl`` lists unreadable clips; None: no list.
    """

    clip_samples: int
    """Samples S of every batch."""

    def __init__(self, *, batch: int, max_bad: float, workers: int, out: Path | None) -> None:
        super().__init__()
        self.batch, self.workers, self.out = batch, workers, out
        self.bad_clips = BadClips(max_bad=max_bad)
        self.heartbeat = Heartbeat(workers)
        self.on_death: Callable[[str], None] | None = None
        """Called when a loader worker has died, to end the run with a checkpoint; None: the loader
        raises ``Interrupted``."""
        self.on_error: Callable[[Exception], None] | None = None
        """Called with the error of too many unreadable clips, to end the run on all ranks; None: it
        is raised."""
        self.gather: Callable[[Any], list[Any]] = lambda thing: [thing]
        """Gathers an object from every rank; all ranks must call it."""
        self._size_then: int | None = None  # clips of a micro-batch in the loaded checkpoint

    def first_batch(self) -> WaveBatch:
        """Returns the first micro-batch of the stream, made in this process."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Returns a description of the data for an export and a summary."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """Returns what the data and their order depend on, to compare with checkpoints."""
        raise NotImplementedError

    def named(self, what: int) -> str:
        """Returns the name of a number of the heartbeat: a clip and its shard, or a shard."""
        raise NotImplementedError

    def sitting_on(self) -> list[str]:
        """Returns what each reader has been reading and for how long, longest first; empty if all
        are idle.

        For example ``worker 1: shard-000003.tar, clip dog-17, for 131 s``. Safe from any thread.
        """
        return [
            f"{reader}: {self.named(what)}, for {seconds:.0f} s"
            for reader, what, seconds in self.heartbeat.readings()
        ]

    def _where(self, worker: int) -> str | None:
        what = self.heartbeat.worker(worker)
        return None if what is None else self.named(what)

    def _loader(
        self, dataset: Dataset[WaveBatch], sampler: Sampler[list[Item]] | None = None
    ) -> Loader:
        return Loader(
            dataset,
            sampler,
            workers=self.workers,
            pin_memory=self._device().type == "cuda",
            where=self._where,
            on_death=self.on_death,
        )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def setup(self, stage: str) -> None:
        """Prepare the list of unreadable clips; each process writes its own."""
        if self.out is not None:
            rank, _ = self._ranks()
            name = "bad_clips.jsonl" if rank == 0 else f"bad_clips-rank{rank}.jsonl"
            self.bad_clips.file = self.out / name

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    @property
    def _size(self) -> int:
        """Number of clips of a micro-batch over all ranks."""
        return self.batch * self._ranks()[1]

    def _stream(self) -> dict[str, Any]:
        """Returns everything that must be the same when a run resumes, and on all ranks."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self._identity() | {"global batch": self._size * accumulate}

    def batches_done(self) -> int:
        """Returns the number of finished micro-batches, by Lightning's count."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _agree(self) -> None:
        """Raise ``UserError`` on every rank if the ranks would read different streams."""
        first, *others = self.gather(self._stream())
        for rank, theirs in enumerate(others, start=1):
            for name, value in first.items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"rank {rank} has {name} {theirs.get(name)}, rank 0 {value}: the ranks "
                        "must see the same shards with the same settings"
                    )

    def bad_clips_all_ranks(self) -> dict[str, int]:
        """Returns ``{"seen", "bad"}`` summed over the ranks; all ranks must call it."""
        counts = self.gather((self.bad_clips.seen, self.bad_clips.bad))
        return {"seen": sum(seen for seen, _ in counts), "bad": sum(bad for _, bad in counts)}

    def _recount(self) -> None:
        """Convert Lightning's loaded counts to micro-batches of this run's size."""
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

    def on_before_batch_transfer(self, batch: WaveBatch, dataloader_idx: int) -> WaveBatch:
        """Count unreadable clips, in the main process, as batches are used."""
        self.bad_clips.add(batch)
        try:
            self.bad_clips.check()
        except UserError as error:
            if self.on_error is None or not batch.keys:
                raise
            self.on_error(error)  # not here, where other ranks would wait for this one
        training = self.trainer is not None and self.trainer.training
        if training and len(batch.keys) < self.batch:
            self.bad_clips.check(final=True)
            raise UserError(f"{self.bad_clips.summary()}, too many in a row: check the shards")
        return batch

    def transfer_batch_to_device(
        self, batch: WaveBatch, device: torch.device, dataloader_idx: int
    ) -> WaveBatch:
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the identity of the stream for a checkpoint (Lightning keeps the position)."""
        return {
            "clips_a_micro_batch": self._size,
            "stream": self._stream(),
            "bad_clips": merged_states(self.gather(self.bad_clips.state_dict())),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where the checkpoint was written; UserError if its stream is another one."""
        before = state_dict["stream"]
        for name, now in self._stream().items():
            then = before.get(name, "nothing of it")
            if then != now:
                raise UserError(
                    f"the checkpoint was written with {name} {then}, this run has {now}: resume "
                    f"with the same, or start a new run with another out="
                )
        self._size_then = state_dict["clips_a_micro_batch"]
        if self._ranks()[0] == 0:  # the others start at zero: only the sum is used
            self.bad_clips.load_state_dict(state_dict["bad_clips"])


class AudioData(StreamData):
    """Training stream over the clips of an index.

    Args:
        index: the training clips.
        plan: their order; None: all of them, evenly shuffled by ``seed``.
        batch: clips of a micro-batch on one device.
        batches: micro-batches of one of Lightning's epochs on one device.
        seed: of order, crops, rolls and offsets.
        workers: loader processes; 0 decodes in the training process.
        look_ahead: positions for which remote shards are prefetched.
        max_bad: fraction of unreadable clips above which the run stops.
        out: run folder in which ``bad_clips.jsonl`` lists unreadable clips; None: no list.
        settings: what is read of a clip, see ``ClipSettings``.

    Raises:
        UserError: a value out of range, an empty selection.
    """

    def __init__(
        self,
        *,
        index: Index,
        batch: int,
        batches: int,
        plan: Plan | MixedPlan | None = None,
        seed: int = 0,
        workers: int = 0,
        look_ahead: int = 8192,
        max_bad: float = 0.05,
        out: Path | None = None,
        **settings: Unpack[ClipSettings],
    ) -> None:
        super().__init__(batch=batch, max_bad=max_bad, workers=workers, out=out)
        self.index, self.look_ahead = index, look_ahead
        self.batches, self.seed = batches, seed
        self.plan = plan or make_plan(index, seed=seed)
        self.dataset = ClipDataset(
            index, seed=seed, plan=self.plan, heartbeat=self.heartbeat, **settings
        )
        self.clip_samples = self.dataset.clip_samples
        # Lightning 2.6.6 decides by the loader's type; this stream resumes exactly
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")

    def first_batch(self) -> WaveBatch:
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
        if self.index.remote and self.trainer is not None:
            self.index.share_among(self.trainer.num_nodes)
        prefetches = self.index.remote and (self.trainer is None or self.trainer.local_rank == 0)
        sampler = PlanSampler(
            self.plan,
            batch=self.batch,
            batches=self.batches,
            rank=rank,
            world=world,
            batches_done=self.batches_done,
            prefetch=self._prefetch if prefetches else None,
            look_ahead=self.look_ahead,
        )
        return self._loader(self.dataset, sampler)

    def _prefetch(self, clips: np.ndarray) -> None:
        """Prefetch the shards of ``clips``, in the order of their first use."""
        shards, first = np.unique(self.index.shard[clips], return_index=True)
        self.index.prefetch(shards[np.argsort(first)].tolist())

    def _identity(self) -> dict[str, Any]:
        names = "\0".join(self.index.vocabulary)
        return {
            "reading": "by index",
            "labels": f"{self.index.classes} ({hashlib.sha256(names.encode()).hexdigest()[:8]})",
            "data set": self.index.hash[:16],
            "order": f"{self.plan.identity()} of {len(self.index)}",
            "seed": self.seed,
        }
