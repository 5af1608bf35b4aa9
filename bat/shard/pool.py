"""Maps a function over items in several processes: results in order, few items in flight.

The processes are spawned, so they inherit neither threads nor locks of the caller, and leave
signals to it. Each has a pipe of its own, with a thread of the caller at the other end, and ends
with the caller, which closes it.

Departure from ``ProcessPoolExecutor``, which waits forever for a process that dies while it sends
its result, and whose processes wait forever for a caller that is killed (CPython 3.11).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from bat.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that the caller handles, though batch systems send them to all processes."""
AHEAD = 2  # items in flight for each process: one in work, one waiting


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int
) -> Generator[Result, None, None]:
    """Yields ``function`` of each of ``items``, in their order.

    Close the generator (or exhaust it) to end its processes. A script that uses several needs the
    guard ``if __name__ == "__main__":``, for each process imports it.

    Args:
        function: importable by name (or a ``functools.partial`` of such) where ``jobs > 1``.
        items: taken one by one, at most ``2 * jobs`` ahead of what has been yielded.
        jobs: processes; 1: only the caller's own.

    Raises:
        UserError: ``jobs`` below 1, or a process that died (killed, or out of memory).
        Exception: raised by ``function``, at the position of its item.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs}: 1 or more processes")
    if jobs == 1:
        yield from map(function, items)
        return
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()
    threads = ThreadPoolExecutor(jobs)
    waiting: deque[Future[Result]] = deque()

    def work(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker(item)
        finally:
            idle.put(worker)

    try:
        for item in items:
            if len(workers) < jobs:
                workers.append(_Worker(function))
                idle.put(workers[-1])
            waiting.append(threads.submit(work, item))
            if len(waiting) == AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for worker in workers:
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


class _Worker:
    """A process that calls ``function``, and the caller's end of its pipe."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        resource_tracker.ensure_running()  # otherwise it unblocks signals while it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the process
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # the process has it now: its death closes the pipe
        self.pipe.send(function)

    def __call__(self, item: Any) -> Any:
        try:
            self.pipe.send(item)
            good, result = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "a worker process died (killed, or out of memory?): run it again, with fewer jobs "
                "if memory is short"
            ) from error
        if not good:
            raise result
        return result


def _serve(pipe: Connection[Any, Any]) -> None:
    """Answers items, in a process of its own, until the caller has ended."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # numpy reads it on import, with the function
    with suppress(EOFError, ConnectionError):
        function = pipe.recv()
        while True:
            item = pipe.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)
