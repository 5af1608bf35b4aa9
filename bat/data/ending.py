"""Whether this process should stop waiting for servers and locks, because the run is over.

A loader worker ignores SIGTERM and Ctrl-C, which are for the main process to act on; one that is
in the middle of a long fetch would keep the run from ending. So every wait asks here. The main
process tells its forked workers by a byte of shared memory as it exits (before ``multiprocessing``
joins them); one that was killed tells them by being gone.
"""

from __future__ import annotations

import atexit
import errno
import mmap
import multiprocessing
import multiprocessing.util  # registers its joining of workers: what is registered later runs first
import os
import threading
import time

POLL_SECONDS = 0.5

_over = mmap.mmap(-1, 1)
_parents: dict[int, int] = {}


def _tell(main: int) -> None:
    if os.getpid() == main:  # not a child that was forked and exits by itself
        _over[0] = 1


atexit.register(_tell, os.getpid())


def ending() -> bool:
    """Whether the run is over: its main process exits, or is gone."""
    if _over[0] or not threading.main_thread().is_alive():
        return True
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    now = os.getppid()
    return now != _parents.setdefault(os.getpid(), now) or not parent.is_alive()


def go_on() -> None:
    """``OSError`` (ECANCELED) where the run is over."""
    if ending():
        raise OSError(errno.ECANCELED, "the run is ending")


def pause(seconds: float) -> None:
    """Sleep; ``OSError`` as ``go_on``."""
    until = time.monotonic() + seconds
    go_on()
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, POLL_SECONDS))
        go_on()
