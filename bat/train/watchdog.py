"""Detects and reports a stalled loader, and finally ends the run so that it can be resumed.

Waiting time is measured around Lightning's call of the loader through its profiler
(``[_TrainingEpochLoop].train_dataloader_next``, 2.6.6; a test checks the name), so online probes,
saving and other work between two steps do not count. A thread monitors it, since the training
process may hang in a read; it cannot react to a request then, so the thread ends it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable

from lightning.pytorch.profilers import PassThroughProfiler

from bat.errors import RESUME_ME

log = logging.getLogger("bat")

GRACE_SECONDS = 60.0
"""Seconds that a run asked to end waits for a batch before it ends without one."""


class FetchClock(PassThroughProfiler):
    """Records since when the training process waits for a batch, and its total waiting time."""

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
    """Warns repeatedly that the loader stalls, and finally ends the process.

    Time during which the whole process was stopped (SIGSTOP, a suspended machine) does not count.

    Args:
        clock: clock of the training process.
        warn_seconds: seconds of waiting between two warnings; 0: none.
        stop_seconds: seconds of waiting after which ``leave`` is called; 0: never.
        say: called with (kind, line, facts) for each problem, from this thread.
        sitting_on: returns what each reader is reading, see ``StreamData.sitting_on``.
        wanted: True if the run was asked to end; it then waits at most ``GRACE_SECONDS``.
        leave: called with the final message.
    """

    def __init__(
        self,
        clock: FetchClock,
        *,
        warn_seconds: float,
        stop_seconds: float,
        say: Callable[..., None],
        sitting_on: Callable[[], list[str]],
        wanted: Callable[[], bool],
        leave: Callable[[str], None],
    ) -> None:
        super().__init__(name="loader watchdog", daemon=True)
        self.clock, self.say, self.sitting_on = clock, say, sitting_on
        self.warn_seconds, self.stop_seconds = warn_seconds, stop_seconds
        self.wanted, self.leave = wanted, leave
        limits = [s for s in (warn_seconds, stop_seconds) if s > 0]
        self.tick = min(1.0, min(limits, default=10.0) / 10)
        self._end = threading.Event()
        self._wait: float | None = None  # the current wait: the clock's ``since``
        self._waited = self._asked = 0.0  # seconds of it: total, since asked to end
        self._warned = 0
        self._before = 0.0

    def stop(self) -> None:
        """Ends the thread."""
        self._end.set()
        if self is not threading.current_thread() and self.is_alive():
            self.join(timeout=10)

    def run(self) -> None:
        """Checks once per tick until stopped, or until nothing is left to wait for."""
        self._before = time.perf_counter()
        while not self._end.wait(self.tick):
            try:
                if self.look(time.perf_counter()):
                    return
            except Exception:  # a full disk under the metrics must not end the watchdog
                log.exception("the watch over the loader goes on after")

    def look(self, now: float) -> bool:
        """Checks the current wait at ``now``; returns True if the process was told to leave."""
        passed, self._before = min(now - self._before, 2 * self.tick), now
        since = self.clock.since
        if since != self._wait:
            if self._warned:
                line = f"the loader goes on after {self._waited:.0f} s"
                self.say("recovered", line, what="loader", seconds=round(self._waited, 1))
            self._wait, self._waited, self._asked, self._warned = since, 0.0, 0.0, 0
        if since is None:
            return False
        self._waited += passed
        self._asked = self._asked + passed if self.wanted() else 0.0
        waited = f"no batch for {self._waited:.0f} s"
        if self.warn_seconds and self._waited >= (self._warned + 1) * self.warn_seconds:
            self._warned += 1
            self.say("stall", f"{waited}: {self._where()}", seconds=round(self._waited, 1))
        if self.stop_seconds and self._waited >= self.stop_seconds:
            self.leave(f"{waited} (health.stall_stop_seconds={self.stop_seconds:g})")
            return True
        if self._asked >= GRACE_SECONDS:
            self.leave(f"asked to end, and {waited}")
            return True
        return False

    def _where(self) -> str:
        return "; ".join(self.sitting_on()) or "no reader is at a clip (starting, gone, or idle)"


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
