"""NaN guard: skips optimiser steps whose loss or gradient is not finite.

    norm = |all gradients|, over all ranks      (logged as ``grad_norm``; ``optim.clip_norm`` clips)
    skip = norm is not finite                   -> weights, moments and teacher stay as they are

A non-finite loss makes its gradient NaN (``poison``), and gradient reduction carries the NaN to
every rank, so all ranks skip the same step. The decision stays on the device: PyTorch's fused AdamW
takes a flag (``found_inf``, as set by its GradScaler), so no step waits for the host, which reads
the flag one step later. The host then logs the keys of the batch (``bad_batches.jsonl``) and ends
the run if too many of the latest steps were skipped.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from bat.errors import UserError
from bat.io import read_jsonl
from bat.train.callbacks import Metrics, StepCallback
from bat.train.sharding import total_norm
from bat.train.stopping import Stopping
from bat.types import WaveBatch

log = logging.getLogger("bat")

LATEST = 100
"""Window of steps in which skipped ones are counted."""


def poison(loss: Tensor) -> Tensor:
    """Returns ``loss`` unchanged, with a NaN gradient if it is not finite."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


class Guard:
    """Decides on the device whether a module's optimiser step is skipped (see ``GuardReport``)."""

    def __init__(self, clip_norm: float | None) -> None:
        self.clip_norm = clip_norm
        self.skip: Tensor | None = None
        """0-dim, 1.0 if the current step is skipped."""
        self.batches: list[tuple[list[str], Tensor]] = []
        """Keys and loss of each micro-batch of the current step."""

    def note(self, batch: WaveBatch, loss: Tensor) -> None:
        """Records a micro-batch of the current step."""
        # a copy: the loss may be an output of a CUDA graph, which the next step overwrites
        self.batches.append((batch.keys, loss.detach().clone()))

    def inspect(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
    ) -> Tensor:
        """Clips gradients, sets ``skip`` and returns the norm, 0-dim on the device."""
        trained = [p for p in parameters if p.grad is not None]
        norm = total_norm(trained)
        skip = (~torch.isfinite(norm)).float()
        if self.clip_norm is not None:
            factor = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            grads = [getattr(p.grad, "_local_tensor", p.grad) for p in trained]
            torch._foreach_mul_(grads, factor)  # type: ignore[arg-type]
        fused = all(group.get("fused") for group in optimizer.param_groups)
        optimizer.found_inf = skip if fused else None  # type: ignore[attr-defined]
        if not fused and skip.item():  # without that flag: drop the gradients, so there is no step
            for p in trained:
                p.grad = None
        self.skip = skip
        return norm


class GuardReport(StepCallback):
    """Reads the guard's decisions (on a GPU one step later), logs them and may end the run.

    Args:
        out: run folder, for ``bad_batches.jsonl`` with lines ``{step, rank, keys, loss}``.
        most: number of the latest 100 steps that may be skipped.
    """

    def __init__(
        self, guard: Guard, out: Path, *, most: int, metrics: Metrics, stopping: Stopping
    ) -> None:
        super().__init__()
        self.guard, self.out, self.most = guard, out, most
        self.metrics, self.stopping = metrics, stopping
        self.total = 0
        """Number of steps skipped so far."""
        self._latest: deque[int] = deque()
        self._waiting: deque[tuple[int, Tensor, Any, list[tuple[list[str], Tensor]]]] = deque()
        self._rank = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._rank = trainer.global_rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the lines of steps that will be repeated after resuming."""
        super().on_train_start(trainer, pl_module)
        if self._file.is_file():
            rows = [r for r in read_jsonl(self._file) if r.get("step", 0) <= trainer.global_step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self._file.write_text(text, encoding="utf-8")

    @property
    def _file(self) -> Path:
        return self.out / f"bad_batches{f'-rank{self._rank}' if self._rank else ''}.jsonl"

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        skip, batches, self.guard.batches = self.guard.skip, self.guard.batches, []
        assert skip is not None
        event = None
        if skip.is_cuda:
            skip = torch.empty_like(skip, device="cpu", pin_memory=True).copy_(skip, True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, skip, event, batches))
        self._read(behind=1 if event else 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(behind=0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of skipped steps and the latest of them."""
        self._read(behind=0)
        return {"total": self.total, "latest": list(self._latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self._latest = state_dict["total"], deque(state_dict["latest"])

    def _read(self, *, behind: int) -> None:
        while len(self._waiting) > behind:
            step, skip, event, batches = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            if float(skip):
                self._skipped(step, batches)

    def _skipped(self, step: int, batches: list[tuple[list[str], Tensor]]) -> None:
        losses = [float(loss) for _, loss in batches]
        own = [i for i, loss in enumerate(losses) if not _finite(loss)]
        lines = ""
        for i in own or range(len(batches)):
            loss = losses[i] if _finite(losses[i]) else None  # JSON knows no NaN
            row = {"step": step, "rank": self._rank, "keys": batches[i][0], "loss": loss}
            lines += json.dumps(row) + "\n"
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as full:  # they are at least in the log
            log.warning("cannot write %s (%s): %s", self._file, full, lines)
        self.total += 1
        self._latest.append(step)
        while self._latest and self._latest[0] <= step - LATEST:
            self._latest.popleft()
        what = "loss" if own else "gradient"
        line = f"step {step} skipped: its {what} is not finite; the keys are in {self._file}"
        self.metrics.event("skipped", line, skipped=self.total)
        if len(self._latest) > self.most:
            error = UserError(
                f"{len(self._latest)} of the latest {LATEST} steps were not finite (health."
                f"max_skipped={self.most}); the keys of their clips are in {self._file}, "
                "earlier checkpoints are untouched. Lower optim.lr, set optim.clip_norm, or try "
                "hardware.precision=32-true; a clip that is always there: remove it"
            )
            self.stopping.ask("skipped steps", error)


def _finite(value: float) -> bool:
    return value - value == 0
