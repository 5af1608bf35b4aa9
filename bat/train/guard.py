"""NaN guard: skips optimiser steps whose loss or gradient is not finite.

    norm = |all gradients|, over all ranks      (logged as ``grad_norm``; ``optim.clip_norm`` clips)
    skip = norm is not finite                   -> weights, moments and teacher stay as they are

A non-finite loss makes its gradient NaN (``spread_nan``), and gradient reduction carries the NaN to
every rank, so all ranks skip the same step. The decision stays on the device: PyTorch's fused AdamW
takes a flag (``found_inf``, as set by its GradScaler), so no step waits for the host, which reads
the flag one step later. The host then logs the keys of the batch (``bad_batches.jsonl``), keeps the
first such steps whole (``nan_record.py``) and ends the run if too many of the latest were skipped.
"""

from __future__ import annotations

import logging
import shlex
from collections import deque
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from bat.errors import UserError
from bat.io import filter_jsonl
from bat.train import nan_record
from bat.train.callbacks import Metrics, StepCallback
from bat.train.nan_record import MicroBatch
from bat.train.sharding import total_norm
from bat.train.stopping import Stopping
from bat.train.trainer import JsonLines
from bat.types import WaveBatch

log = logging.getLogger("bat")

LATEST = 100
"""Window of steps in which skipped ones are counted."""


def spread_nan(loss: Tensor) -> Tensor:
    """Returns ``loss`` unchanged, with a NaN gradient if it is not finite."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


class Guard:
    """Decides on the device whether a module's optimiser step is skipped (see ``GuardReport``)."""

    def __init__(self, clip_norm: float | None) -> None:
        self.clip_norm = clip_norm
        self.skip: Tensor | None = None
        """0-dim, 1.0 if the current step is skipped."""
        self.batches: list[MicroBatch] = []
        """Micro-batches of the current step."""

    def note(self, batch: WaveBatch, index: int, loss: Tensor) -> None:
        """Records a micro-batch of the current step."""
        # a copy: the loss may be an output of a CUDA graph, which the next step overwrites
        self.batches.append(MicroBatch(batch, index, loss.detach().clone()))

    def inspect(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
    ) -> Tensor:
        """Clips gradients, sets ``skip`` and returns the norm, 0-dim on the device."""
        trained = [p for p in parameters if p.grad is not None]
        norm = total_norm(trained)
        self.skip = skip = (~torch.isfinite(norm)).float()
        if self.clip_norm is not None:
            factor = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            grads = [getattr(p.grad, "_local_tensor", p.grad) for p in trained]
            torch._foreach_mul_(grads, factor)  # type: ignore[arg-type]
        fused = all(group.get("fused") for group in optimizer.param_groups)
        optimizer.found_inf = skip if fused else None  # type: ignore[attr-defined]
        if not fused and skip.item():  # without that flag: drop the gradients, so there is no step
            for p in trained:
                p.grad = None
        return norm


class GuardReport(StepCallback):
    """Reads the guard's decisions (on a GPU one step later), logs them and may end the run.

    Args:
        out: run folder, for ``bad_batches.jsonl`` with lines ``{step, rank, keys, loss}``.
        most: number of the latest 100 steps that may be skipped.
        keep: number of skipped steps kept in ``out/nan``.
    """

    def __init__(
        self,
        guard: Guard,
        out: Path,
        *,
        most: int,
        keep: int,
        metrics: Metrics,
        stopping: Stopping,
    ) -> None:
        super().__init__()
        self.guard, self.out, self.most, self.keep = guard, out, most, keep
        self.metrics, self.stopping = metrics, stopping
        self.total = 0
        """Number of steps skipped so far."""
        self._latest: list[int] = []
        self._unread: deque[tuple[int, Tensor, Any, list[MicroBatch]]] = deque()
        self._module: pl.LightningModule | None = None
        self._rank, self._world = 0, 1
        self._lines = JsonLines(out / "bad_batches.jsonl")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._rank, self._world, self._module = trainer.global_rank, trainer.world_size, pl_module
        name = f"bad_batches-rank{self._rank}.jsonl" if self._rank else "bad_batches.jsonl"
        self._lines = JsonLines(self.out / name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the lines of steps that will be repeated after resuming."""
        super().on_train_start(trainer, pl_module)
        if self._lines.path.is_file():
            filter_jsonl(self._lines.path, lambda row: row.get("step", 0) <= trainer.global_step)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        skip, batches, self.guard.batches = self.guard.skip, self.guard.batches, []
        assert skip is not None
        copied = None
        if skip.is_cuda:
            skip = torch.empty_like(skip, device="cpu", pin_memory=True).copy_(skip, True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((step, skip, copied, batches))
        # after a skipped step flags are read at once, so that records hold the step's own weights
        self._read(behind=1 if copied and not 0 < self.total < self.keep else 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of skipped steps and the latest of them."""
        self._read()
        return {"total": self.total, "latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self._latest = state_dict["total"], list(state_dict["latest"])

    def _read(self, *, behind: int = 0) -> None:
        while len(self._unread) > behind:
            step, skip, copied, batches = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            if float(skip):
                self._skipped(step, batches)

    def _skipped(self, step: int, batches: list[MicroBatch]) -> None:
        rows = [(micro.batch.keys, float(micro.loss)) for micro in batches]
        bad = [(keys, None) for keys, loss in rows if not isfinite(loss)]  # JSON knows no NaN
        for keys, loss in bad or rows:
            self._lines.append({"step": step, "rank": self._rank, "keys": keys, "loss": loss})
        kept = self._keep(step, batches)
        self.total += 1
        self._latest = [s for s in self._latest if s > step - LATEST] + [step]
        what = "loss" if bad else "gradient"
        line = f"step {step} skipped: its {what} is not finite; the keys are in {self._lines.path}"
        line += f", the cause is found by: bat debug {shlex.quote(str(kept))}" if kept else ""
        self.metrics.event("skipped", line, skipped=self.total)
        if len(self._latest) > self.most:
            first = next(iter(nan_record.records(self.out)), None)
            command = f"bat debug {shlex.quote(str(first))} finds the cause. " if first else ""
            error = UserError(
                f"{len(self._latest)} of the latest {LATEST} steps were not finite (health."
                f"max_skipped={self.most}); the keys of their clips are in {self._lines.path}, "
                f"earlier checkpoints are untouched. {command}Lower optim.lr, set "
                "optim.clip_norm, or try hardware.precision=32-true; a clip that is always there: "
                "remove it"
            )
            self.stopping.ask("skipped steps", error)

    def _keep(self, step: int, batches: list[MicroBatch]) -> Path | None:
        """Keeps a step unless there are enough, and returns the folder of its record."""
        folder = self.out / nan_record.FOLDER / str(step)
        if self.total >= self.keep:
            return None
        done = nan_record.keep(
            folder,
            self._module,
            batches,
            step=step,
            later_steps=self._seen - step,
            rank=self._rank,
            world=self._world,
        )
        return folder if done else None
