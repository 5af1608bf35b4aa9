"""Callbacks that log metrics and events and update the progress bar."""

from __future__ import annotations

import logging
import time
from math import nan
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from bat.logs import bar_seconds
from bat.train.processes import Ranks, ranks_of
from bat.train.trainer import JsonLines

log = logging.getLogger("bat")

ON_GPUS = {
    "gpu_memory_gb": "{gpu_memory_gb:.1f} GiB",
    "mfu": "MFU={mfu:.0%}",
    "gpu_hours": "GPU-hours={gpu_hours:.1f}+{gpu_hours_left:.1f}",
}
"""Scalars of a GPU that the progress bar shows."""


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
        """Called once per optimiser step, after ``step`` steps are done."""
        raise NotImplementedError


class Metrics(StepCallback):
    """Averages the step's scalars over a window; reads them off the device only to log them.

    The module leaves 0-dim tensors in ``scalars`` after each micro-batch and the number of clips in
    ``clips``; they are summed here without waiting for the device. Means are over all ranks and
    over finite values only, so a skipped step does not affect them.
    """

    def __init__(self, *, every: int, progress: bool, out: Path | None = None) -> None:
        """``out``: run folder, where ranks other than 0 write their events."""
        super().__init__()
        self.every, self.progress, self.out = every, progress, out
        self.bar: tqdm | None = None
        self.clips_per_second: list[float] = []
        self.extra: dict[str, float] = {}
        """Scalars merged into the next line (on rank 0), then cleared."""
        self._events: list[JsonLines] = []
        self._ranks = Ranks()
        self._resumed: dict[str, Any] = {}
        self._step = self._marked = 0
        self._told = False
        self._reset()

    def _reset(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # (2, scalars): sum and count of finite values
        self.clips = 0
        self._mark = ""
        self.since = self.stepped = time.perf_counter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._ranks = ranks_of(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of the unfinished line over all ranks (Lightning calls this on each)."""
        if self.sums is None:
            return {}
        return {"names": self.names, "sums": self._ranks.total(self.sums.flatten().tolist())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict if self._ranks.rank == 0 else {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = self._marked = trainer.global_step
        self._events = [logger for logger in trainer.loggers if isinstance(logger, JsonLines)]
        for logger in self._events:
            logger.rewind(trainer.global_step)
        if not trainer.is_global_zero and self.out is not None:
            self._events = [JsonLines(self.out / f"events-rank{trainer.global_rank}.jsonl")]
        if self.progress and trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="step",
                desc="training",
                dynamic_ncols=True,
                mininterval=bar_seconds(),
            )
        self._reset()
        if self._resumed:
            self.names = list(self._resumed["names"])
            held = torch.tensor(self._resumed["sums"], dtype=torch.float32)
            self.sums = held.view(2, -1).to(pl_module.device)
            self._resumed = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        scalars: dict[str, torch.Tensor] = pl_module.scalars  # type: ignore[assignment]
        values = torch.stack([value.detach().float() for value in scalars.values()])
        finite = torch.isfinite(values)
        added = torch.stack([values.where(finite, 0), finite.float()])  # (2, scalars)
        if self.names != list(scalars) or self.sums is None:
            self.names, self.sums = list(scalars), added
        else:
            self.sums += added
        self.stepped = time.perf_counter()
        self.clips += int(pl_module.clips) * trainer.world_size  # type: ignore[arg-type]
        super().on_train_batch_end(trainer, pl_module, *args)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self._step = step
        if self.bar is not None:
            self.bar.update(1)
        if step % self.every and step != trainer.max_steps and step != 1:
            return
        assert self.sums is not None
        both = self._ranks.total(self.sums.flatten().tolist())
        sums, counts = both[: len(self.names)], both[len(self.names) :]
        row = {k: s / n if n else nan for k, s, n in zip(self.names, sums, counts, strict=True)}
        row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row["clips_per_second"] = self.clips / (time.perf_counter() - self.since)
        if step > 1:  # the first step includes warm-up
            self.clips_per_second.append(row["clips_per_second"])
            self._say_time_left(trainer, row["clips_per_second"])
        row, self.extra = row | self.extra, {}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if self.bar is not None:
            shown = [f"loss={row['loss']:.3f}", f"clips={row['clips_per_second']:.3g}/s"]
            for name, form in ON_GPUS.items():
                shown += [form.format(**row)] if name in row else []
            self.bar.set_postfix_str(", ".join(shown) + self._mark)
        self._reset()
        self._marked = step

    def _say_time_left(self, trainer: pl.Trainer, clips_per_second: float) -> None:
        """Says once how long the rest will take, by the speed of the steps since the first line."""
        steps = self._step - self._marked
        if self._told or self._step >= trainer.max_steps or not steps or not trainer.is_global_zero:
            return
        self._told = True
        seconds = (trainer.max_steps - self._step) * self.clips / steps / clips_per_second
        self.say(
            f"about {seconds / 60:.3g} min to go, probes and checkpoints aside: "
            f"{trainer.max_steps - self._step} steps at {clips_per_second:.3g} clips/s (measured)"
        )

    def event(self, kind: str, line: str, **facts: Any) -> None:
        """Reports a problem: a warning, a line of metrics, a mark on the bar until the next line.

        May be called from any thread; ranks other than 0 write to ``events-rankN.jsonl``.
        """
        self._mark = f" ! {kind}"
        if self.bar is not None:
            self.bar.set_postfix_str(self._mark.strip())
            self.bar.clear()
        log.warning("%s", line)
        for logger in self._events:
            logger.append({"step": self._step, "event": kind, "message": line, **facts})

    def say(self, line: str) -> None:
        """Logs ``line`` without breaking the progress bar."""
        if self.bar is not None:
            self.bar.clear()
        log.info("%s", line)

    def pause(self) -> None:
        """Excludes the time since the last step (an online probe run) from throughput. Call it
        afterwards; scalars gathered since the last line are kept."""
        now = time.perf_counter()
        self.since = now if self.sums is None else self.since + now - self.stepped

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")
