"""Selects the step of a fine-tuning by validation clips (docs/method.md 5).

Every ``validate_every`` steps and at the last one the metrics of the validation clips are computed;
the weights with the best main metric are kept, of equal ones the later, as in the reference. The
test clips are evaluated once, with these.

``validation.jsonl`` has a line per validation step, ``best.safetensors`` the best weights so far
(removed when the fold is finished). Both are complete after every validation step: a resumed
training repeats at most those since its checkpoint, with the same results.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bat.errors import UserError
from bat.eval.encoding import evaluating
from bat.eval.fit import preserve_rng_state
from bat.io import filter_jsonl, replace_durably
from bat.metrics.base import rank_key
from bat.train.callbacks import Metrics, StepCallback

log = logging.getLogger("bat")

ROWS, WEIGHTS = "validation.jsonl", "best.safetensors"


class Selection(StepCallback):
    """Validates a fine-tuning and keeps its best weights in ``folder``.

    Args:
        every: optimiser steps between validation steps.
        metric: main metric.
        evaluate: returns the metrics of a module on the validation clips. Every rank calls it.
        metrics: its clock is stopped during validation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        metric: str,
        evaluate: Callable[[Any], dict[str, Any]],
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self.folder, self.every, self.metric = folder, every, metric
        self.evaluate, self.metrics = evaluate, metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        rows, done = self.folder / ROWS, trainer.global_step
        if trainer.is_global_zero and rows.is_file():
            filter_jsonl(rows, lambda row: row["step"] <= done)
        if trainer.is_global_zero and not done:
            (self.folder / WEIGHTS).unlink(missing_ok=True)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if step % self.every and step != trainer.max_steps:
            return
        with preserve_rng_state(module.device), evaluating(module):
            found = self.evaluate(module)
        if trainer.is_global_zero:
            self.record(module, step, found)
        self.metrics.pause()

    def record(self, module: nn.Module, step: int, found: dict[str, Any]) -> None:
        """Writes the line of a validation step, and the weights if they are the best so far."""
        scalars = {name: v for name, v in found.items() if isinstance(v, (int, float))}
        row = {"step": step} | {n: None if math.isnan(v) else v for n, v in scalars.items()}
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        best = selected(self.folder)
        value = scalars[self.metric]
        if best is None or rank_key(self.metric, value) >= rank_key(
            self.metric, best["validation"]
        ):
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            temporary = self.folder / f".{WEIGHTS}.tmp"
            said = {"step": str(step), "validation": json.dumps(value)}
            save_file(state, temporary, metadata=said)
            replace_durably(temporary, self.folder / WEIGHTS)
        self.metrics.say(f"step {step}: validation {self.metric} {value:.4f}")


def selected(folder: Path) -> dict[str, Any] | None:
    """Returns ``step`` and ``validation`` (the main metric) of the best weights so far, if any."""
    path = folder / WEIGHTS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata()
        return {"step": int(said["step"]), "validation": json.loads(said["validation"])}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove {folder} to train it again"
        ) from error


def load_selected(module: nn.Module, folder: Path) -> dict[str, Any]:
    """Loads the best weights into ``module``; returns what ``selected`` does."""
    found = selected(folder)
    assert found is not None, "the last step is always validated"
    with torch.no_grad():
        module.load_state_dict(load_file(folder / WEIGHTS))
    return found
