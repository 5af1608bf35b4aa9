"""Base class of the training streams: position and resume, checks across ranks, unreadable clips.

The position is read from Lightning's own count of finished micro-batches whenever an iterator is
made: ``fit_loop.epoch_loop.batch_progress.total.processed``. (``processed``, not ``completed``:
a checkpoint saved in ``on_train_batch_end`` holds the step of a batch that is not yet
``completed``. Lightning 2.6.6.) A checkpoint also records the number of clips of a micro-batch; on
a resume with another number of ranks or another division of the global batch, Lightning's counts
are converted to the new size before it reads them. A resume with another data set, seed or global
batch is refused, and so are ranks that would read different streams.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset, Sampler

from bat.data.bad_clips import BadClips, merged_states
from bat.data.heartbeat import Heartbeat
from bat.data.loader import Loader
from bat.data.stream import Item
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

    def __init__(
        self,
        *,
        batch: int,
        max_bad: float,
        workers: int,
        out: Path | None,
    ) -> None:
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

    def _stream(self) -> dict[str, Any]:
        """Returns everything that must be the same when a run resumes."""
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
            pin_memory=self._on_cuda(),
            where=self._where,
            on_death=self.on_death,
        )

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

    def batches_done(self) -> int:
        """Returns the number of finished micro-batches, by Lightning's count."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _agree(self) -> None:
        """Raise ``UserError`` on every rank if the ranks would read different streams."""
        _, world = self._ranks()
        if world == 1 or not torch.distributed.is_initialized():
            return
        mine, all_of_them = self._stream(), [dict[str, Any]() for _ in range(world)]
        torch.distributed.all_gather_object(all_of_them, mine)
        for other, theirs in enumerate(all_of_them):
            for name, value in all_of_them[0].items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"rank {other} has {name} {theirs.get(name)}, rank 0 {value}: the ranks "
                        "must see the same shards with the same settings"
                    )

    def bad_clips_all_ranks(self) -> dict[str, int]:
        """Returns ``{"seen", "bad"}`` summed over the ranks; all ranks must call it."""
        counts = torch.tensor([self.bad_clips.seen, self.bad_clips.bad])
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            counts = counts.to(trainer.strategy.root_device)
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        return {"seen": int(counts[0]), "bad": int(counts[1])}

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

    def _on_cuda(self) -> bool:
        trainer = self.trainer
        return trainer is not None and trainer.strategy.root_device.type == "cuda"

    def on_before_batch_transfer(self, batch: WaveBatch, dataloader_idx: int) -> WaveBatch:
        """Count unreadable clips, in the main process, as batches are used."""
        trainer = self.trainer
        self.bad_clips.add(batch)
        try:
            self.bad_clips.check()
        except UserError as error:
            if self.on_error is None or not batch.keys:
                raise
            self.on_error(error)  # not here, where other ranks would wait for this one
        if trainer is not None and trainer.training and len(batch.keys) < self.batch:
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
