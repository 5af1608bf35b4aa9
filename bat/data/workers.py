"""The processes of a loader: deaf to the run's signals, watched, and ended for certain.

What torch 2.11 does when a worker is killed (memory ran out, somebody's ``kill -9``): a handler of
SIGCHLD raises a RuntimeError wherever the main thread happens to be; or, where the worker died
holding the lock of the queue that all share, or in the middle of a message, the main thread waits
for ever. Here a thread waits for any worker's end. It kills the others, which have nothing to save,
and closes the queue, so that whoever reads it gets an error instead of silence; torch's handler is
told nothing. ``loader.py`` then makes new workers.
"""

from __future__ import annotations

import atexit
import glob
import os
import signal
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing import connection, parent_process
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bat.errors import UserError
from bat.types import WaveBatch

LOOK_SECONDS = 0.5
"""Between two looks at what needs no waking."""
NEWS_SECONDS = 2.0
"""How long an error waits for the news that a worker died of it."""

Deaths = list[tuple[int, int]]
"""(worker, exit code as ``Process.exitcode``) of those that died by themselves."""

OUTLIVED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def worker_init(worker: int) -> None:
    """A loader process outlives the signals meant for the run, which still has to save, and ends
    with its parent, whatever it is waiting for. It lets go of the queues of older loaders, whose
    readers would else never learn that all who write there are dead."""
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLIVED)  # see ``Workers``
    torch.set_num_threads(1)
    for older in list(_living):  # as they were when this process was forked
        results: Any = older._worker_result_queue
        results._writer.close()
    parent = parent_process()
    pid = os.getppid() if parent is None or parent.pid is None else parent.pid
    threading.Thread(target=_end_with, args=(pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    _unlink_shared(os.getpid())
    os._exit(1)


def _unlink_shared(pid: int) -> None:
    """Remove shared memory that a process made and died before it could unlink it (torch's names:
    ``torch_PID_RANDOM_COUNT``)."""
    for path in glob.glob(f"/dev/shm/torch_{pid}_*"):
        with suppress(OSError):
            os.unlink(path)


class _Watch(threading.Thread):
    """Waits for the end of any of ``workers``; those ``told`` to may."""

    def __init__(self, workers: list[Any], results: Any, told: set[int]) -> None:
        super().__init__(daemon=True, name="bat-loader-watch")
        self.workers, self.results, self.told = workers, results, told
        self.deaths: Deaths = []
        self.stopped, self.found = threading.Event(), threading.Event()

    def run(self) -> None:
        alive = {worker.sentinel: number for number, worker in enumerate(self.workers)}
        while alive and not self.stopped.is_set():
            for sentinel in connection.wait(list(alive), timeout=LOOK_SECONDS):
                number = alive.pop(sentinel)
                code = _exit_code(self.workers[number])
                well = code is None or (code == 0 and number in self.told)
                if not well and not self.stopped.is_set():
                    self.deaths.append((number, code or 0))
            if self.deaths:
                self.results._writer.close()
                self.found.set()
                _kill(self.workers)
                return


def _exit_code(worker: Any) -> int | None:
    """Of a process that is about to be dead; another thread may be the one that reaps it."""
    for _ in range(100):
        if worker.exitcode is not None:
            return int(worker.exitcode)
        time.sleep(0.01)
    return None


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if worker.exitcode is None:
            worker.kill()
    for worker in workers:
        worker.join(5.0)
        _unlink_shared(worker.pid)


class Workers(_MultiProcessingDataLoaderIter):
    """torch's iterator, which notices a death at once and waits for no dead worker's lock."""

    def __init__(self, loader: DataLoader[WaveBatch]) -> None:
        signal_handling._SIGCHLD_handler_set = True  # so torch does not set it
        self.owner, self.raised, self.told = os.getpid(), False, set[int]()
        # a worker is born deaf to these: one may come before ``worker_init``
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)
        try:
            super().__init__(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal_handling._remove_worker_pids(id(self))  # where it was set before
        self._worker_pids_set = False
        self.watch = _Watch(self._workers, self._worker_result_queue, self.told)
        self.watch.start()
        _living.add(self)

    def _try_get_data(self, timeout: float = LOOK_SECONDS) -> tuple[bool, Any]:
        if self.watch.found.is_set():
            raise RuntimeError("a loader worker died")
        found: tuple[bool, Any] = super()._try_get_data(min(timeout, LOOK_SECONDS))
        return found

    def _process_data(self, data: Any, worker_idx: int) -> Any:
        self.raised = isinstance(data, ExceptionWrapper)
        try:
            return super()._process_data(data, worker_idx)
        except UserError:  # torch puts the worker's traceback before its words
            kind = f"\n{data.exc_type.__module__}.{data.exc_type.__qualname__}: "
            raise UserError(data.exc_msg.rpartition(kind)[2].rstrip("\n")) from None

    def _mark_worker_as_unavailable(self, worker_id: int, shutdown: bool = False) -> None:
        self.told.add(worker_id)
        if not shutdown and self._workers[worker_id].exitcode is not None:
            self._workers_status[worker_id] = False  # torch would take a lock that it might hold
        else:
            super()._mark_worker_as_unavailable(worker_id, shutdown)

    def deaths(self) -> Deaths:
        """Who died, if that is why ``next()`` raised just now."""
        if self.raised or not self.watch.found.wait(NEWS_SECONDS):
            return []
        return self.watch.deaths

    def _shutdown_workers(self) -> None:
        if self.owner != os.getpid():
            return  # a forked process's copy
        watch = getattr(self, "watch", None)  # without: it failed as it was made
        if watch is not None and not self._shutdown:
            watch.stopped.set()
            if any(worker.exitcode for worker in self._workers):
                self.abandon()
        super()._shutdown_workers()
        _kill(self._workers)  # what does not end within torch's 5 s; SIGTERM it ignores

    def abandon(self) -> None:
        """End this iterator without a lock that a killed worker might have held."""
        self._shutdown = True
        self.watch.stopped.set()
        if self._pin_memory:
            self._pin_memory_thread_done_event.set()
        _kill(self._workers)
        for queue in self._index_queues:
            queue.cancel_join_thread()
            queue.close()


_living: weakref.WeakSet[Workers] = weakref.WeakSet()


def kill_workers() -> None:
    """Kill the workers of all loaders of this process; for its end."""
    for iterator in list(_living):
        if iterator.owner == os.getpid():
            iterator.watch.stopped.set()
            _kill(iterator._workers)


atexit.register(kill_workers)  # multiprocessing would wait for them, having sent a SIGTERM
