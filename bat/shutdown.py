"""Handles SIGTERM, SIGINT and SIGUSR1 (Slurm's ``--signal=USR1@300``) in commands.

During training a signal sets a flag, and the training ends after a step (``stopping.py``). At all
other times (fetching, packing, indexing, evaluating, exporting) there is nothing to save: SIGTERM
and SIGUSR1 end the command at once by ``Interrupted``, hence with the exit code for resuming; a
Ctrl-C is handled by Python. Lightning's handlers are not installed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bat.errors import Interrupted


@contextmanager
def minding_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGUSR1 end a command by ``Interrupted``."""

    def end(name: str) -> None:
        raise Interrupted(f"{name}, with nothing to save")

    with _handled(end, signal.SIGTERM, signal.SIGUSR1):
        yield


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Passes the name of each of the three signals to ``listener``, within the handler; a second
    Ctrl-C is a ``KeyboardInterrupt``."""
    interrupted = False

    def listen(name: str) -> None:
        nonlocal interrupted
        if name == "SIGINT":
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
        listener(name)

    with _handled(listen, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        yield


@contextmanager
def _handled(handle: Callable[[str], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only main may set them
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        handle(signal.Signals(number).name)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
