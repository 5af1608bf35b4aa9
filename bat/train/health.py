"""Monitors the health of a run, at a cost of at most 1% of the step time.

- Collapse: every few steps, statistics of the encoders' output on a few clips
  (``bat/eval/collapse.py``).
- A stalled loader: reported with the shards being read, and finally the end of the run, to be
  resumed. Waiting time is measured around Lightning's call of the loader through its profiler, so
  online probes, saving and other work between two steps do not count.
- Throughput: clips per second of each line of metrics against the run's own median.
- The share of time spent waiting for batches (on a GPU the host runs ahead of the device, so part
  of it may have cost nothing), and the peak GPU memory, per line of metrics.
- Dead loader workers (``bat/data/loader.py``): the run is saved and ends.

Problems are reported to the log, ``metrics.jsonl`` and the progress bar (``Metrics.event``).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from bat.config.running import Health
from bat.data.module import StreamData
from bat.errors import RESUME_ME, UserError
from bat.eval.collapse import representation
from bat.objectives.base import Objective
from bat.train.callbacks import Metrics, StepCallback
from bat.train.cost import Cost
from bat.train.stopping import Stopping
from bat.types import WaveBatch

log = logging.getLogger("bat")

CLIPS = 8
"""Clips that one collapse check uses."""

LINES = 5
"""Lines of metrics before a slow one is reported."""


class FetchClock(PassThroughProfiler):
    """Records since when the training process waits for a batch, and its total waiting time.

    Lightning 2.6.6 calls the action ``[_TrainingEpochLoop].train_dataloader_next``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.since: float | None = None
        """``time.perf_counter()`` when the wait began; None while a batch is processed."""
        self.total = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next") and self.since is not None:
            self.total += time.perf_counter() - self.since
            self.since = None


class Watchdog(threading.Thread):
    """Reports again and again that the loader stalls, and finally ends the process.

    A thread, since the training process may hang in a read.

    Args:
        say: called with (kind, line, facts) for each problem, from this thread.
        sitting_on: returns what each reader is reading, see ``StreamData.sitting_on``.
        leave: called with the final message.
    """

    def __init__(
        self,
        clock: FetchClock,
        config: Health,
        *,
        say: Callable[..., None],
        sitting_on: Callable[[], list[str]],
        leave: Callable[[str], None],
    ) -> None:
        super().__init__(name="loader watchdog", daemon=True)
        self.clock, self.say, self.sitting_on, self.leave = clock, say, sitting_on, leave
        self.warn_seconds, self.stop_seconds = config.stall_seconds, config.stall_stop_seconds
        limits = [s for s in (self.warn_seconds, self.stop_seconds) if s > 0]
        self.tick = min(1.0, min(limits, default=10.0) / 10)
        self._end = threading.Event()
        self._since: float | None = None  # start of the wait that ``_warnings`` are about
        self._warnings = 0

    def stop(self) -> None:
        """Ends the thread."""
        self._end.set()
        if self is not threading.current_thread() and self.is_alive():
            self.join(timeout=10)

    def run(self) -> None:
        """Checks once per tick until stopped."""
        while not self._end.wait(self.tick):
            try:
                self.check(time.perf_counter())
            except Exception:  # a full disk under the metrics must not end the watchdog
                log.exception("the watchdog of the loader continues after an error")

    def check(self, now: float) -> None:
        """Checks the current wait at ``now``."""
        since = self.clock.since
        if since != self._since:
            self._since, self._warnings = since, 0
        if since is None:
            return
        waited = now - since
        line = f"no batch for {waited:.0f} s"
        if self.warn_seconds and waited >= (self._warnings + 1) * self.warn_seconds:
            self._warnings += 1
            readers = "; ".join(self.sitting_on()) or "no reader is at a clip"
            self.say("stall", f"{line}: {readers}", seconds=round(waited, 1))
        if self.stop_seconds and waited >= self.stop_seconds:
            self._end.set()
            self.leave(f"{line} (health.stall_stop_seconds={self.stop_seconds:g})")


def leave(why: str) -> None:
    """Ends this process and its loader workers at once with the exit code for resuming.

    Nothing is saved, since the training process may hang in a read forever.
    """
    try:
        log.error("%s: ending; the same command continues from the last checkpoint", why)
        for worker in multiprocessing.active_children():  # they ignore SIGTERM
            worker.kill()
        for stream in (*log.handlers, sys.stdout, sys.stderr):
            stream.flush()
    finally:  # on any error of a disk or a pipe
        os._exit(RESUME_ME)


class HealthMonitor(StepCallback):
    """Monitors a run; must come before ``Metrics`` in the list of callbacks.

    Args:
        config: section ``health`` of the settings.
        metrics: receives events and scalars.
        stopping: asked to end a collapsed run.
        data: its readers are named when it stalls.
        objective: its encoders are checked for collapse; None (fine-tuning): no checks.
        cost: of the training on GPUs, added to each line of metrics; None: not counted.
    """

    def __init__(
        self,
        config: Health,
        *,
        metrics: Metrics,
        stopping: Stopping,
        data: StreamData,
        objective: Objective | None,
        cost: Cost | None = None,
    ) -> None:
        super().__init__()
        self.cost = cost
        self.config, self.metrics, self.stopping = config, metrics, stopping
        self.data, self.objective = data, objective
        self.clock = FetchClock()
        self.watchdog: Watchdog | None = None
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

    def _say(self, kind: str, line: str, **facts: Any) -> None:
        self.metrics.event(kind, self._rank + line, **facts)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._waited = self.clock.total
        self._lines = len(self.metrics.clips_per_second)
        if self.config.stall_seconds or self.config.stall_stop_seconds:
            self.watchdog = Watchdog(
                self.clock,
                self.config,
                say=self._say,
                sitting_on=self.data.sitting_on,
                leave=leave,
            )
            self.watchdog.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        speeds = self.metrics.clips_per_second
        for speed in speeds[self._lines :] if trainer.is_global_zero else ():
            self._check_speed(speed)
        self._lines = len(speeds)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        _outputs, self._batch, *_ = args
        super().on_train_batch_end(trainer, pl_module, *args)
        self._batch = None

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        ends = step == 1 or step == trainer.max_steps
        checked = self.objective is not None and self.config.collapse != "off"
        if checked and (ends or step % self.config.collapse_every == 0):
            self._check_collapse(trainer, module, step)
        if ends or step % self.metrics.every == 0:  # Metrics is about to write a line
            self._measure(trainer, step)

    def _measure(self, trainer: pl.Trainer, step: int) -> None:
        device = trainer.strategy.root_device
        seconds = time.perf_counter() - self.metrics.since
        waited, self._waited = self.clock.total - self._waited, self.clock.total
        self.metrics.extra["loader_wait"] = min(1.0, waited / seconds)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.metrics.extra["gpu_memory_gb"] = peak / 2**30
            torch.cuda.reset_peak_memory_stats(device)
            if self.cost is not None and trainer.is_global_zero:
                name, n = torch.cuda.get_device_name(device), trainer.world_size
                speed = self.metrics.clips / seconds
                self.metrics.extra |= self.cost.row(
                    name, devices=n, step=step, clips_per_second=speed
                )

    def _check_speed(self, speed: float) -> None:
        """Compares one line's clips per second with the median of those that were not slow."""
        usual = statistics.median(self._usual) if len(self._usual) >= LINES else 0.0
        slow = speed < self.config.slowdown * usual
        if not slow:
            self._usual.append(speed)
        if slow != self._slow:
            kind, again = ("slow", "only") if slow else ("recovered", "again")
            line = f"{again} {speed:.3g} clips a second; the run's median is {usual:.3g}"
            self._say(kind, line, what="speed", clips_per_second=speed, usual=usual)
        self._slow = slow

    def _check_collapse(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Logs rank and deviation of each encoder; on collapse warns, then ends the run."""
        assert self.objective is not None
        assert self._batch is not None
        encoders = self.objective.encoders()
        with torch.compiler.set_stance("force_eager"):
            x = self.objective.spectrogram(self._batch.first(CLIPS))  # (B, 1, frames, mels)
        found = module.within(lambda: {name: representation(e, x) for name, e in encoders.items()})
        if not trainer.is_global_zero:  # other ranks only took part in gathering sharded weights
            return
        row = {f"health/{n}_{what}": v for n, own in found.items() for what, v in own.items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        config = self.config
        low = [  # NaN (undefined) is no collapse
            name
            for name, own in found.items()
            if own["rank"] < config.min_rank or own["std"] < config.min_std
        ]
        self._low = self._low + 1 if low else 0
        if not low:
            return
        shown = ", ".join(
            f"{n} effective rank {own['rank']:.1f}, deviation between clips {own['std']:.3f}"
            for n, own in found.items()
        )
        line = f"step {step}: clips look alike to the {' and the '.join(low)} ({shown})"
        if self._low == 1:
            self._say("collapse", line, step=step)
        elif config.collapse == "stop":
            advice = self.objective.collapse_advice and f"{self.objective.collapse_advice}, "
            error = UserError(
                f"{line}, as {config.collapse_every} steps before: the run collapsed (limits: "
                f"health.min_rank={config.min_rank}, health.min_std={config.min_std}). Begin anew, "
                f"or from an older checkpoint, with a lower optim.lr, more optim.warmup_steps, "
                f"{advice}or optim.clip_norm=1; health.collapse=warn only warns"
            )
            self.stopping.ask("collapse", error)

    def state_dict(self) -> dict[str, Any]:
        """Returns the collapse count, so that a resumed run acts as an uninterrupted one."""
        return {"low": self._low}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._low = state_dict["low"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")
