"""Runs one training with its callbacks, for pre-training and for each fold of fine-tuning.

HealthMonitor  collapse, a stalled loader, throughput, memory; its scalars join the next line
Metrics        means, events, progress bar
GuardReport    steps skipped by the NaN guard
OnlineProbe    probes on the encoder along a pre-training
Selection      validation steps of a fine-tuning
Stopping       resumable shutdown, agreed among the ranks
Checkpoints    last, since Lightning runs it after the others
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback

from bat.config.schema import Finetune, Pretrain
from bat.data.module import StreamData
from bat.errors import UserError
from bat.eval.loading import autocast_for
from bat.shutdown import listening
from bat.train.callbacks import Metrics
from bat.train.checkpointing import Checkpoints, last_checkpoint, step_of
from bat.train.cost import Cost
from bat.train.guard import GuardReport
from bat.train.health import HealthMonitor
from bat.train.online import OnlineProbe
from bat.train.pretrain import Pretraining
from bat.train.processes import Ranks, leave_quietly, ranks_of
from bat.train.selection import Selection
from bat.train.stopping import Stopping
from bat.train.supervised import Supervised
from bat.train.trainer import build_trainer
from bat.types import WaveBatch

log = logging.getLogger("bat")


class Fitting:
    """One training in ``out``, resumed from the newest checkpoint there.

    Args:
        name: name of the run for Weights & Biases.
        force: start from scratch if there are checkpoints and none loads.
        begin: called after the checkpoint is restored, before the first step.
        online: makes what evaluates the encoder along the training (online probes, selection of a
            step), given ``metrics=`` and ``stopping=``; None: nothing does.
    """

    def __init__(
        self,
        config: Pretrain | Finetune,
        out: Path,
        *,
        module: Pretraining | Supervised,
        data: StreamData,
        name: str,
        force: bool = False,
        begin: Callable[[], None] = lambda: None,
        online: Callable[..., OnlineProbe | Selection] | None = None,
    ) -> None:
        self.module, self.data = module, data
        self.newest = last_checkpoint(out, force=force)
        self.stopping = stopping = Stopping()
        metrics = Metrics(every=config.train.log_every, progress=config.log.progress, out=out)
        data.on_error = lambda error: stopping.ask("the data", error)
        data.gather = lambda thing: self.ranks.gather(thing)
        self.checkpoints = Checkpoints(config.train, out, stopping=stopping, newest=self.newest)
        most, keep = config.health.max_skipped, config.health.keep_nan
        self.guard = GuardReport(
            module.guard, out, most=most, keep=keep, metrics=metrics, stopping=stopping
        )
        health = HealthMonitor(
            config.health,
            metrics=metrics,
            stopping=stopping,
            data=data,
            objective=module.objective if isinstance(module, Pretraining) else None,
            cost=Cost(config, self.checkpoints.training_seconds),
        )
        self.online = online(metrics=metrics, stopping=stopping) if online else None
        self.trainer: pl.Trainer = build_trainer(
            hardware=config.hardware,
            train=config.train,
            log=config.log,
            out=out,
            callbacks=[
                LambdaCallback(on_train_start=lambda trainer, module: begin()),
                health,
                metrics,
                self.guard,
                *([self.online] if self.online else []),
                stopping,
                self.checkpoints,
            ],
            checkpoint_io=self.checkpoints.io,
            name=name,
            resumed=step_of(self.newest) if self.newest else None,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager around ``trainer.fit(module, datamodule=data, ckpt_path=resume_from)``.

        Raises ``Interrupted`` if the run was asked to end (it is saved), ``KeyboardInterrupt`` at
        a second Ctrl-C, and ``UserError`` for errors that the user can fix.
        """
        with listening(self.stopping.note):
            try:
                yield
                # a launcher kills the others once one exits: wait until all is written
                self.checkpoints.io.wait()
                self.ranks.gather(None)
            except SystemExit as error:
                if error.code != 1:
                    raise
                # Lightning 2.6.6 raises this for a KeyboardInterrupt
                raise KeyboardInterrupt from error
            except RuntimeError as error:
                if "loading state_dict" not in str(error):
                    raise
                raise UserError(
                    f"{self.newest} does not fit this model: {error}. Give the run its old "
                    "settings, or another out="
                ) from error
            finally:
                self.checkpoints.io.wait()
        self.stopping.finish()
        self._check_clips()

    @property
    def resume_from(self) -> str | None:
        """Checkpoint that the training resumes from; None for a new one."""
        return str(self.newest) if self.newest else None

    def _check_clips(self) -> None:
        """Raises on every rank if any of them met too many unreadable clips."""
        mine: UserError | None = None
        try:
            self.data.bad_clips.check(final=True)
        except UserError as error:
            mine = error
        said = [text for text in self.ranks.gather(mine and str(mine)) if text]
        if said:
            leave_quietly()
            raise mine or UserError(said[0])

    @property
    def ranks(self) -> Ranks:
        return ranks_of(self.trainer)

    def facts(self) -> dict[str, Any]:
        """Returns time, checkpoints and problems over all starts, for a summary."""
        return {
            "seconds": round(self.checkpoints.training_seconds(), 1),
            "checkpoints": self.checkpoints.facts(),
            "skipped_steps": self.guard.total,
        }


@contextmanager
def dry_step(
    config: Pretrain | Finetune, module: pl.LightningModule, data: StreamData
) -> Iterator[WaveBatch]:
    """Moves ``module`` to its device and yields the first batch there, as in a training step.

    On a GPU it is a whole micro-batch, to measure memory; on the CPU one clip without gradients,
    since Base at full size takes minutes and tens of gigabytes there. Raises ``UserError`` if no
    clip of the batch is readable.
    """
    on_gpu = config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    module.to(device)
    batch = data.first_batch()
    if not batch.keys:
        clip = batch.skipped[0]
        raise UserError(
            f"no clip of the first batch can be read (the first: {clip.key}, {clip.kind}: "
            f"{clip.why}): check the data (shards: bat-shard verify DIR)"
        )
    autocast = autocast_for(config.hardware)
    with (
        torch.autocast(device.type, autocast, enabled=autocast is not None),
        torch.set_grad_enabled(on_gpu),
    ):
        yield (batch if on_gpu else batch.first(1)).to(device)
