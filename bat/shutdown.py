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

_listener: Callable[[str], None] | None = None
_interrupted = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _interrupted
    name = signal.Signals(number).name
    if _listener is None:
        raise Interrupted(f"{name}, with nothing to save")
    if number == signal.SIGINT:
        if _interrupted:
            raise KeyboardInterrupt  # a second Ctrl-C is intended
        _interrupted = True
    _listener(name)


@contextmanager
def minding_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGUSR1 end a command by ``Interrupted``."""
    with _handled(signal.SIGTERM, signal.SIGUSR1):
        yield


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Passes the name of each of the three signals to ``listener``, within the handler."""
    global _listener, _interrupted
    with _handled(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        _listener, _interrupted = listener, False
        try:
            yield
        finally:
            _listener = None


@contextmanager
def _handled(*numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only main may set them
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
