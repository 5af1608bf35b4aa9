"""Maps a function over many items in several processes, results in order, few in flight.

The processes are spawned, not forked: threads and locks of the caller (CUDA, a progress bar) are
not inherited. They leave Ctrl-C and SIGTERM to the caller, and end with it even if it is killed:
each has its own pipe, which then closes.

Departure from ``concurrent.futures``: its processes wait for work forever when the caller is
killed (CPython 3.11), and its one result pipe with a thread behind it takes 0.5 ms for a result of
300 kB.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import suppress
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from bat.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

CALLERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that the caller handles, though batch systems send them to all processes."""
AHEAD = 2  # items in flight for each process: one in work, one waiting
_END: Any = object()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    jobs: int,
    progress: bool = False,
    total: int | None = None,
    unit: str = "clip",
) -> Generator[Result, None, None]:
    """Yields ``function`` of each of ``items``, in their order.

    Close the generator (or exhaust it) to end its processes. A script that uses several needs the
    guard ``if __name__ == "__main__":``, for each process imports it.

    Args:
        function: importable by name (or a ``functools.partial`` of such) where ``jobs > 1``.
        items: taken one by one, at most ``2 * jobs`` ahead of what has been yielded. Small ones
            (under 64 kB pickled, else two sides of a full pipe could wait for each other).
        jobs: processes; 1: only the caller's own.
        progress: show a bar with rate and time left on stderr.
        total: number of items where they have no length.

    Raises:
        UserError: ``jobs`` below 1, or a process that died (killed, or out of memory).
        Exception: raised by ``function``, at the position of its item.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs}: 1 or more processes")
    results = map(function, items) if jobs == 1 else _parallel(function, iter(items), jobs)
    if not progress:
        return _closing(results)
    from tqdm import tqdm

    if total is None and isinstance(items, Sized):
        total = len(items)
    return _closing(tqdm(results, total=total, unit=unit), results)


def _closing(
    shown: Iterable[Result], source: Iterator[Result] | None = None
) -> Generator[Result, None, None]:
    """Yields from ``shown``; at any end, also closes its bar and the processes of its source."""
    try:
        yield from shown
    finally:
        for it in (shown, source):
            getattr(it, "close", lambda: None)()


class _Worker:
    """A process, the caller's end of its pipe, and the numbers of the items it has."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        resource_tracker.ensure_running()  # otherwise it unblocks signals while it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, CALLERS)  # inherited until it ignores them
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # the process has it now: its death closes the pipe
        self.pipe.send(function)
        self.items: deque[int] = deque()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _parallel(
    function: Callable[[Item], Result], items: Iterator[Item], jobs: int
) -> Iterator[Result]:
    workers: list[_Worker] = []
    done: dict[int, tuple[bool, Any]] = {}  # {number: (success, result or exception)}
    taken, more = 0, True
    try:
        for number in count():
            while more and taken < number + AHEAD * jobs:
                item = next(items, _END)
                more = item is not _END
                if more:
                    if taken < jobs:
                        workers.append(_Worker(function))
                    worker = min(workers, key=lambda w: len(w.items))
                    _alive(jobs, worker.pipe.send, item)
                    worker.items.append(taken)
                    taken += 1
            if number == taken:
                return
            while number not in done:
                busy = {w.pipe: w for w in workers if w.items}
                for pipe in wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]
                    done[worker.items.popleft()] = _alive(jobs, worker.pipe.recv)
            good, result = done.pop(number)
            if not good:
                raise result
            yield result
    finally:
        for worker in workers:
            worker.end()


def _alive(jobs: int, talk: Callable[..., Any], *said: Any) -> Any:
    try:
        return talk(*said)
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise UserError(
            f"one of the {jobs} worker processes died (killed, or out of memory?): run it again, "
            f"with fewer jobs if memory is short"
        ) from error


def _serve(pipe: Connection[Any, Any]) -> None:
    """Answers items, in a process of its own, until the caller has ended."""
    for number in CALLERS:
        signal.signal(number, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # numpy reads it on import, with the function
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function = pipe.recv()
        while True:
            item = pipe.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)
