"""Resumable shutdown of a run, on signals and on request (``Stopping.ask``).

A signal (``bat/shutdown.py``) only sets a flag. At the end of each micro-batch the ranks agree on
the host (``processes.py``) whether any of them was asked to end; then, once the optimiser's step is
complete, all save and stop, and the process exits with 75 (``RESUME_ME``): the same command
resumes. An error on one rank ends all of them, so that none waits in a collective for one that has
exited.

Lightning 2.6.6 ends a SIGTERM with exit code 0 and, under DDP, calls a collective within the signal
handler: a deadlock unless the right ranks are signalled. Its handlers are not installed, and its
broadcast before every batch, which would wait for the device, is disabled (private names:
``_SignalConnector.register_signal_handlers``, ``_TrainingEpochLoop._broadcast_sigterm_tensor``;
asserted).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from bat.errors import Interrupted, UserError
from bat.train.processes import Ranks, leave_quietly, ranks_of

log = logging.getLogger("bat")

_NOTHING, _SAVE, _FAIL = 0, 1, 2


class Stopping(Callback):
    """Ends the run at the next batch end when asked to; ``finish`` then reports how it ended.

    Must come after all callbacks that may ask, so that the run is saved at the step of the request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked, self._why = _NOTHING, ""
        self._error: Exception | None = None
        self._ended: str | None = None
        self._ranks = Ranks()
        self.clock: Callable[[], bool] = lambda: False
        """Called on every rank at each batch end; if any returns True, ``due`` is True on all."""
        self.due = False
        """True if a checkpoint is due by the clock of any rank."""

    @property
    def wanted(self) -> bool:
        """True if this process was asked to end; long work between steps may then stop early."""
        return self._asked != _NOTHING

    @property
    def ending(self) -> bool:
        """True if all ranks agreed to save and end after this step."""
        return self._ended is not None

    def ask(self, why: str, error: Exception | None = None) -> None:
        """Requests an end at the next batch end; from any thread, on any rank.

        Without ``error`` the run is saved and raises ``Interrupted``; with it nothing is saved and
        ``error`` is raised (other ranks raise a ``UserError`` that names it).
        """
        with self._lock:
            if (_FAIL if error else _SAVE) > self._asked:
                self._asked, self._why, self._error = (_FAIL if error else _SAVE), why, error

    def note(self, name: str) -> None:
        """Records a signal; called within its handler, hence without the lock."""
        if not self._asked:
            self._asked, self._why = _SAVE, name

    def finish(self) -> None:
        """Raises ``Interrupted`` if the run ended before its last step; call after ``fit``."""
        if self._ended is not None:
            leave_quietly()
            raise Interrupted(self._ended)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._ranks = ranks_of(trainer)
        private: list[tuple[Any, str]] = [
            (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
            (trainer._signal_connector, "register_signal_handlers"),
        ]
        for owner, name in private:
            assert hasattr(owner, name), "Lightning has changed"
            setattr(owner, name, lambda: None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends before the first step if asked to while starting (during a long probe run)."""
        (asked,) = self._ranks.maximum([self._asked])
        if asked == _FAIL:
            self._raise()
        if asked == _SAVE:
            self._end(trainer, "before the first step of this start")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        asked, due = self._ranks.maximum([self._asked, self.clock()])
        self.due = bool(due)
        if asked == _FAIL:
            self._raise()
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        complete = ready % trainer.accumulate_grad_batches == 0
        if asked == _SAVE and complete and trainer.global_step < trainer.max_steps:
            self._end(trainer, f"after step {trainer.global_step}")

    def _end(self, trainer: pl.Trainer, when: str) -> None:
        reasons = [why for why in self._ranks.gather(self._why) if why]
        self._ended = f"{reasons[0]} {when}"
        log.info("%s: ending", self._ended)
        trainer.should_stop = True

    def _raise(self) -> None:
        errors = [str(e) for e in self._ranks.gather(self._error and str(self._error)) if e]
        if self._error is not None:
            raise self._error
        leave_quietly()
        raise UserError(f"another process of the run failed: {errors[0]}")

    def check_errors(self) -> None:
        """Raises the error requested on any rank on all ranks, after the last step."""
        if self._ranks.maximum([self._asked])[0] == _FAIL:
            self._raise()
