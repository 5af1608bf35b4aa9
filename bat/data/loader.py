"""Loads batches with torch's DataLoader, and ends the run in order when a loader process dies.

A worker that is killed (out of memory, ``kill -9``) is not replaced. ``Loader`` makes the missing
batches in the main process and calls ``on_death``, which in training asks for a checkpoint and the
end of the run at the next optimiser step (exit code 75); the same command then resumes the run. A
batch depends only on its positions in the plan, so none is lost or repeated.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import active_children, parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bat.data.heartbeat import as_user_error
from bat.data.stream import Item, as_it_is
from bat.errors import Interrupted, UserError
from bat.types import WaveBatch

log = logging.getLogger("bat")

POLL_SECONDS = 0.5
NEWS_SECONDS = 1.0
"""Longest time after an error until the death of a worker is visible."""

OUTLIVED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def worker_init(worker: int) -> None:
    """Make a loader process ignore the signals meant for the run, which still has to save, and end
    with its parent in any state."""
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLIVED)  # see ``Loader._start``
    torch.set_num_threads(1)
    parent = parent_process()
    pid = os.getppid() if parent is None or parent.pid is None else parent.pid
    threading.Thread(target=_end_with, args=(pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _kill(processes: list[Any], owner: int) -> None:
    """Kill ``processes`` of process ``owner``: at exit multiprocessing would wait for the workers
    after a SIGTERM, which they ignore."""
    for process in processes if os.getpid() == owner else ():
        process.kill()


class _Handed(Sampler[list[Item]]):
    """Yields the batches of ``sampler``; remembers those handed to workers and not yet received."""

    def __init__(self, sampler: Sampler[list[Item]]) -> None:
        self.sampler = sampler
        self.begin()

    def begin(self) -> None:
        """Start ``sampler`` again."""
        self.waiting: deque[list[Item]] = deque()
        self.rest = iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Item]]:
        for items in self.rest:
            self.waiting.append(items)
            yield items


class Loader(DataLoader[WaveBatch]):
    """``DataLoader`` over whole batches that continues in the main process when a worker dies.

    Args:
        sampler: yields the batches of a map-style ``dataset``; None for an iterable one, which then
            begins anew in the main process.
        workers: loader processes; 0 decodes in this process.
        where: returns what a worker was reading when it died, or None.
        on_death: called once with a line about the death; None: ``Interrupted`` is raised.

    Raises:
        Interrupted: from ``next()``: a worker died, and there is no ``on_death``.
    """

    def __init__(
        self,
        dataset: Dataset[WaveBatch],
        sampler: Sampler[list[Item]] | None = None,
        *,
        workers: int,
        pin_memory: bool = False,
        where: Callable[[int], str | None] = lambda worker: None,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        self.handed = None if sampler is None else _Handed(sampler)
        self.where, self.on_death = where, on_death
        self._processes: list[Any] = []
        of_batches: dict[str, Any] = (
            {"batch_size": None} if self.handed is None else {"batch_sampler": self.handed}
        )
        super().__init__(
            dataset,
            **of_batches,
            collate_fn=as_it_is,
            num_workers=workers,
            worker_init_fn=worker_init,
            persistent_workers=workers > 0 and sampler is not None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # a seed is drawn from it: not from the run's own state
        )

    def __iter__(self) -> Iterator[WaveBatch]:  # type: ignore[override]
        try:
            batches = self._start()
        except Exception as error:
            self._failed(error)
            return self._rest()
        return self._batches(batches)

    def _batches(self, batches: Iterator[WaveBatch]) -> Iterator[WaveBatch]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._failed(error)
                break
            if self.handed is not None:
                self.handed.waiting.popleft()
            yield batch
        yield from self._rest()

    def _failed(self, error: Exception) -> None:
        """Raise ``error``, unless a worker's death caused it and ``on_death`` handles that."""
        death = self._death()
        if death is None:
            raise _plain(error) from None
        if self.on_death is None:
            raise Interrupted(death) from None
        self.on_death(death)

    def _start(self) -> Iterator[WaveBatch]:
        """Returns torch's iterator; records its processes and removes its handler of SIGCHLD."""
        if self.handed is not None:
            self.handed.begin()
        if not self.num_workers:
            return super().__iter__()
        children, in_main = set(active_children()), self._in_main_thread()
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):  # installed by another loader
            handler = signal.SIG_DFL
        # workers start with these blocked: one may arrive before ``worker_init``
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if in_main:  # torch's handler would raise in the main thread, even within a step
                signal.signal(signal.SIGCHLD, handler)
            made = sorted(set(active_children()) - children, key=lambda process: process.pid or 0)
            if made:
                self._processes = list(made)
                atexit.register(_kill, self._processes, os.getpid())
        return batches

    @staticmethod
    def _in_main_thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    def _death(self) -> str | None:
        """Returns a description of how the worker died, or None if none did."""
        until = time.monotonic() + NEWS_SECONDS
        while time.monotonic() < until:
            for worker, process in enumerate(self._processes):
                if process.exitcode is not None:
                    return self._told(worker, int(process.exitcode))
            time.sleep(0.02)
        return None

    def _told(self, worker: int, code: int) -> str:
        how = f"ended with exit code {code}"
        if code < 0:
            names = {int(s): s.name for s in signal.Signals}
            how = f"was killed by {names.get(-code, f'signal {-code}')}"
        where = self.where(worker)
        return (
            f"loader worker {worker} {how}{f' at {where}' if where else ''}. Most likely memory "
            "ran out: lower data.workers or data.cache_waves_gb, or give more shared memory "
            "(/dev/shm; docker run --shm-size). If it is the same clip each time, that file is "
            "to blame: look at it with bat-shard verify"
        )

    def _rest(self) -> Iterator[WaveBatch]:
        """Yields the batches that did not arrive, made in this process."""
        dataset: Any = self.dataset
        if self.handed is None:
            yield from dataset
            return
        for items in itertools.chain(list(self.handed.waiting), self.handed.rest):
            yield dataset.__getitems__(items)


def _plain(error: Exception) -> Exception:
    """Returns ``error`` as it was raised: torch puts a traceback before a ``UserError``."""
    if isinstance(error, UserError):
        return UserError(str(error).rpartition("\nbat.errors.UserError: ")[2].rstrip("\n"))
    return as_user_error(error)
