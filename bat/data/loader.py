"""Loads batches with torch's DataLoader, and ends the run in order when a loader process dies.

A worker that is killed (out of memory, ``kill -9``) is not replaced. ``Loader`` makes the missing
batches in the main process and calls ``on_death``, which in training asks for a checkpoint and the
end of the run at the next optimiser step (exit code 75); the same command then resumes the run. A
batch depends only on its positions in the plan, so none is lost or repeated. ``Heartbeat`` records
what each process reads, for the message of a stalled run.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from bat.errors import Interrupted, UserError
from bat.types import WaveBatch

POLL_SECONDS = 0.5
NEWS_SECONDS = 1.0
"""Longest time after an error until the death of a worker is visible."""
IDLE = -1
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


def as_it_is(batch: Any) -> WaveBatch:
    """Returns ``batch`` unchanged: the collate function of a dataset that makes whole batches."""
    made: WaveBatch = batch
    return made


class _Remembered(Sampler[list[Any]]):
    """Yields the batches of ``sampler``; ``rest`` yields them once more, to be taken as they
    arrive."""

    def __init__(self, sampler: Sampler[list[Any]]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Any]]:
        given, self.rest = itertools.tee(self.sampler)
        return given


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
        sampler: Sampler[list[Any]] | None = None,
        *,
        workers: int,
        pin_memory: bool = False,
        where: Callable[[int], str | None] = lambda worker: None,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        self.batches = None if sampler is None else _Remembered(sampler)
        self.where, self.on_death = where, on_death
        self._processes: list[Any] = []
        of_batches: dict[str, Any] = (
            {"batch_size": None} if self.batches is None else {"batch_sampler": self.batches}
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
            made = self._start()
        except Exception as error:
            self._failed(error)
            return self._rest()
        return self._batches(made)

    def _batches(self, made: Iterator[WaveBatch]) -> Iterator[WaveBatch]:
        while True:
            try:
                batch = next(made)
            except StopIteration:
                return
            except Exception as error:
                self._failed(error)
                break
            if self.batches is not None:
                next(self.batches.rest)
            yield batch
        yield from self._rest()

    def _rest(self) -> Iterator[WaveBatch]:
        """Yields the batches that did not arrive, made in this process."""
        dataset: Any = self.dataset
        return iter(
            dataset if self.batches is None else map(dataset.__getitems__, self.batches.rest)
        )

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
        if not self.num_workers:
            return super().__iter__()
        children = set(active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):  # installed by another loader
            handler = signal.SIG_DFL
        # workers start with these blocked: one may arrive before ``worker_init``
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if threading.current_thread() is threading.main_thread():
                # torch's handler would raise in the main thread, even within a step
                signal.signal(signal.SIGCHLD, handler)
            made = sorted(set(active_children()) - children, key=lambda process: process.pid or 0)
            if made:
                self._processes = list(made)
                atexit.register(_kill, self._processes, os.getpid())

    def _death(self) -> str | None:
        """Returns a description of how the worker died, or None if none did."""
        until = time.monotonic() + NEWS_SECONDS
        while self._processes and time.monotonic() < until:
            for worker, process in enumerate(self._processes):
                if process.exitcode is not None:
                    return self._described(worker, int(process.exitcode))
            time.sleep(0.02)
        return None

    def _described(self, worker: int, code: int) -> str:
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


def _plain(error: Exception) -> Exception:
    """Returns ``error`` as it was raised: torch puts a traceback before a ``UserError``."""
    if isinstance(error, UserError):
        return UserError(str(error).rpartition("\nbat.errors.UserError: ")[2].rstrip("\n"))
    return as_user_error(error)


def as_user_error(error: Exception) -> Exception:
    """Returns ``error``, or a ``UserError`` if torch reports that shared memory ran out."""
    text = str(error)
    if "shared memory" not in text and "</torch_" not in text:
        return error
    return UserError(
        f"shared memory is full ({text.strip().splitlines()[-1]}): loader processes hand over "
        "batches in /dev/shm. Give it more (docker run --shm-size=8g), lower data.batch, or set "
        "data.workers=0"
    )


class Reading(NamedTuple):
    """The item that one process is reading."""

    reader: str
    """``worker 1``, or ``the training process`` where that decodes."""
    what: int
    """Clip id, or number of the shard where shards are read sequentially."""
    seconds: float
    """Time since the read began."""


class Heartbeat:
    """Shows what the training process and each of ``workers`` loader processes read, since when.

    Rows in shared memory, without a lock: (item, start in ns), written by the process before it
    reads. A row that is read while it is written may mix two clips, which affects only the message.
    """

    def __init__(self, workers: int) -> None:
        try:
            self._shared = torch.full((workers + 1, 2), IDLE).share_memory_()  # (R, 2) int64
        except RuntimeError as error:
            raise as_user_error(error) from error
        self._rows: np.ndarray = self._shared.numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shared": self._shared}  # passed by handle; an array would be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shared = state["_shared"]
        self._rows = self._shared.numpy()

    def reads(self, what: int) -> None:
        """Record that this process begins to read ``what``; ``IDLE``: that it rests."""
        worker = get_worker_info()
        row = 0 if worker is None else worker.id + 1
        self._rows[row, 1] = time.monotonic_ns()
        self._rows[row, 0] = what

    def worker(self, number: int) -> int | None:
        """Returns what worker ``number`` reads; None if it reads nothing or has no row."""
        what = int(self._rows[number + 1, 0]) if number + 1 < len(self._rows) else IDLE
        return None if what == IDLE else what

    def readings(self) -> list[Reading]:
        """Returns the readings of all busy processes, longest first."""
        now, found = time.monotonic_ns(), []
        for row, (what, since) in enumerate(self._rows.tolist()):
            if what != IDLE:
                reader = f"worker {row - 1}" if row else "the training process"
                found.append(Reading(reader, what, max(0.0, (now - since) / 1e9)))
        return sorted(found, key=lambda reading: -reading.seconds)
