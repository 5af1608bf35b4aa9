"""What happens beside the training step: checkpoints, metrics and the progress bar."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from tqdm import tqdm

from bat.shapes import UserError
from bat.train.trainer import JsonLines, checkpoints, link_or_copy

log = logging.getLogger("bat")


class StepCallback(Callback):
    """Base of callbacks that act after an optimiser step, not after every micro-batch."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Called once an optimiser step, ``step`` steps being done."""
        raise NotImplementedError


class Checkpoints(StepCallback, CheckpointBase):
    """``step-N.ckpt`` every ``every`` steps and at the end; ``last.ckpt`` is the newest.

    Saved on accumulation boundaries only. Older ones are removed after the newer one is safe.
    A ``CheckpointBase``, so Lightning runs it after every other callback of the step.
    """

    def __init__(self, out: Path, *, every: int, keep: int) -> None:
        super().__init__()
        self.out, self.every, self.keep = out, every, keep

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:  # leftovers of a write that was cut off
            for stale in (self.out / "checkpoints").glob(".*.tmp"):
                stale.unlink(missing_ok=True)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if step % self.every and step != trainer.max_steps:
            return
        broken = [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise UserError(
                f"the weights are not finite after step {step} ({broken[0]} and {len(broken) - 1} "
                "more): nothing was saved, earlier checkpoints are untouched. Lower optim.lr, set "
                "optim.clip_norm, or try hardware.precision=32-true"
            )
        path = self.out / "checkpoints" / f"step-{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            link_or_copy(path, path.with_name("last.ckpt"))
            for old in checkpoints(self.out)[self.keep :]:
                old.unlink(missing_ok=True)


class Metrics(StepCallback):
    """Means of the step's figures over a window, read off the device only when they are logged.

    The module leaves scalars on the device in ``figures`` after each micro-batch and says how many
    clips it took in ``clips``; here they are added up without waiting for the device.
    """

    def __init__(self, *, every: int, progress: bool) -> None:
        super().__init__()
        self.every, self.progress = every, progress
        self.bar: tqdm | None = None
        self.clips_per_second: list[float] = []
        self.steps = 0
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.batches = self.clips = 0
        self.since = self.stepped = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, JsonLines):
                logger.rewind(trainer.global_step)
        if self.progress and trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="step",
                desc="training",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 15,
            )
        self._reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        figures: dict[str, torch.Tensor] = pl_module.figures  # type: ignore[assignment]
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.batches += 1
        self.stepped = time.perf_counter()
        self.clips += int(pl_module.clips) * trainer.world_size  # type: ignore[arg-type]
        super().on_train_batch_end(trainer, pl_module, *args)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self.steps += 1
        if self.bar is not None:
            self.bar.update(1)
        if step % self.every and step != trainer.max_steps and step != 1:
            return
        row = {name: float(total) / self.batches for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.since
        row |= {"lr": float(trainer.optimizers[0].param_groups[0]["lr"])}
        row |= {"clips_per_second": self.clips / seconds}
        if step > 1:  # the first step pays for warming up
            self.clips_per_second.append(row["clips_per_second"])
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{row['loss']:.3f}", clips=f"{row['clips_per_second']:.3g}/s"
            )
        self._reset()

    def say(self, line: str) -> None:
        """Log ``line`` without breaking the bar."""
        if self.bar is not None:
            self.bar.clear()
        log.info("%s", line)

    def pause(self) -> None:
        """Leave out of the clock what happens between two steps (a probing): call it after.

        The figures gathered since the last line go on being gathered.
        """
        now = time.perf_counter()
        if not self.batches:
            self.since = now
        else:  # as if the clock had stood still since the step ended
            self.since += now - self.stepped

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
