"""Monitors the health of a run, at a cost of at most 1% of the step time.

- Collapse: every few steps, statistics of the encoders' output on a few clips
  (``bat/eval/collapse.py``).
- A stalled loader (``watchdog.py``).
- Throughput: clips per second of each line of metrics against the run's own median.
- The share of time spent waiting for batches (on a GPU the host runs ahead of the device, so part
  of it may have cost nothing), and the peak GPU memory, per line of metrics.
- Dead loader workers (``bat/data/loader.py``): the run is saved and ends.

Problems are reported to the log, ``metrics.jsonl`` and the progress bar (``Metrics.event``).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch

from bat.config.running import Health
from bat.data.module import StreamData
from bat.errors import UserError
from bat.eval.collapse import representation
from bat.objectives.base import Objective
from bat.train.callbacks import Metrics, StepCallback
from bat.train.stopping import Stopping
from bat.train.watchdog import FetchClock, Watchdog, leave
from bat.types import WaveBatch

CLIPS = 8
"""Clips that one collapse check uses."""

LINES = 5
"""Lines of metrics before a slow one is reported."""


class HealthMonitor(StepCallback):
    """Monitors a run; must come before ``Metrics`` in the list of callbacks.

    Args:
        config: section ``health`` of the settings.
        metrics: receives events and scalars.
        stopping: asked to end a collapsed run.
        data: its readers are named when it stalls.
        objective: its encoders are checked for collapse; None (fine-tuning): no checks.
    """

    def __init__(
        self,
        config: Health,
        *,
        metrics: Metrics,
        stopping: Stopping,
        data: StreamData,
        objective: Objective | None,
    ) -> None:
        super().__init__()
        self.config, self.metrics, self.stopping = config, metrics, stopping
        self.data, self.objective = data, objective
        self.clock = FetchClock()
        self.watchdog: Watchdog | None = None
        self.leave = leave
        self._batch: WaveBatch | None = None
        self._waited = 0.0  # total waiting time when the current line began
        self._lines = 0  # lines of metrics checked so far
        self._usual: list[float] = []  # clips per second of lines that were not slow
        self._slow = False
        self._low = 0  # consecutive checks that found a collapse
        self._rank = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        order: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        assert order.index(self) < order.index(self.metrics), "HealthMonitor goes before Metrics"
        trainer.profiler = self.clock  # type: ignore[attr-defined]
        self._rank = f"rank {trainer.global_rank}: " if trainer.world_size > 1 else ""
        self.data.on_death = self._worker_died

    def _worker_died(self, line: str) -> None:
        self._say("worker", line)
        self.stopping.ask(line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._waited = self.clock.total
        self._lines = len(self.metrics.clips_per_second)
        if self.config.stall_seconds or self.config.stall_stop_seconds:
            self.watchdog = Watchdog(
                self.clock,
                warn_seconds=self.config.stall_seconds,
                stop_seconds=self.config.stall_stop_seconds,
                say=self._say,
                sitting_on=self.data.sitting_on,
                wanted=lambda: self.stopping.wanted,
                leave=self.leave,
            )
            self.watchdog.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        lines = self.metrics.clips_per_second
        for i in range(self._lines, len(lines)):
            self._judge(lines[i], trainer)
        self._lines = len(lines)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        _outputs, self._batch, *_ = args
        super().on_train_batch_end(trainer, pl_module, *args)
        self._batch = None

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        every = self.config.collapse_every
        last = step == trainer.max_steps
        looks = self.objective is not None and self.config.collapse != "off"
        if looks and (step % every == 0 or step == 1 or last):
            self._look(trainer, module, step)
        if step % self.metrics.every == 0 or step == 1 or last:  # Metrics is about to write a line
            self._measure(trainer)

    def _measure(self, trainer: pl.Trainer) -> None:
        seconds = time.perf_counter() - self.metrics.since
        waited, self._waited = self.clock.total - self._waited, self.clock.total
        self.metrics.extra["loader_wait"] = min(1.0, waited / seconds)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.metrics.extra["gpu_memory_gb"] = peak / 2**30
            torch.cuda.reset_peak_memory_stats(device)

    def _judge(self, speed: float, trainer: pl.Trainer) -> None:
        """Compares one line's clips per second with the median of those that were not slow."""
        usual = statistics.median(self._usual) if len(self._usual) >= LINES else None
        slow = usual is not None and speed < self.config.slowdown * usual
        if not slow:
            self._usual.append(speed)
        if slow != self._slow and trainer.is_global_zero:
            assert usual is not None
            kind, again = ("slow", "only") if slow else ("recovered", "again")
            line = f"{again} {speed:.3g} clips a second; the run's median is {usual:.3g}"
            self._say(kind, line, what="speed", clips_per_second=speed, usual=usual)
        self._slow = slow

    def _look(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Logs rank and deviation of each encoder; on collapse warns, then ends the run."""
        assert self.objective is not None
        assert self._batch is not None
        encoders = self.objective.encoders()
        with torch.compiler.set_stance("force_eager"):
            spectrogram = self.objective.spectrogram(
                self._batch.first(CLIPS)
            )  # (B, 1, frames, mels)
        found = module.within(
            lambda: {name: representation(e, spectrogram) for name, e in encoders.items()}
        )
        if not trainer.is_global_zero:  # other ranks only took part in gathering sharded weights
            return
        row = {f"health/{n}_{what}": v for n, own in found.items() for what, v in own.items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        low = [n for n, own in found.items() if self._collapsed(own)]
        self._low = self._low + 1 if low else 0
        if not low:
            return
        figures = ", ".join(
            f"{n} effective rank {own['rank']:.1f}, deviation between clips {own['std']:.3f}"
            for n, own in found.items()
        )
        line = f"step {step}: clips look alike to the {' and the '.join(low)} ({figures})"
        if self._low == 1:
            self._say("collapse", line, step=step)
        elif self.config.collapse == "stop":
            advice = self.objective.collapse_advice and f"{self.objective.collapse_advice}, "
            error = UserError(
                f"{line}, as {self.config.collapse_every} steps before: the run collapsed. Begin "
                "anew, or from an older checkpoint, with a lower optim.lr, more "
                f"optim.warmup_steps, {advice}or optim.clip_norm=1; health.collapse=warn goes on "
                "all the same "
                f"(limits: health.min_rank={self.config.min_rank}, "
                f"health.min_std={self.config.min_std})"
            )
            self.stopping.ask("collapse", error)

    def _collapsed(self, found: dict[str, float]) -> bool:
        """Returns True for a collapse; NaN (undefined) is none."""
        return found["rank"] < self.config.min_rank or found["std"] < self.config.min_std

    def _say(self, kind: str, line: str, **facts: Any) -> None:
        self.metrics.event(kind, self._rank + line, **facts)

    def state_dict(self) -> dict[str, Any]:
        """Returns the collapse count, so that a resumed run acts as an uninterrupted one."""
        return {"low": self._low}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._low = state_dict["low"]

    def _end(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()
