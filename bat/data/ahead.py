"""Background threads that work through a list of jobs, which each new list replaces.

Made anew in a forked child, which inherits none of the threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

THREADS = 2


class Ahead:
    """Does the jobs of the latest list in the background, the first ones first."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._wanted: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []

    def want(self, jobs: Sequence[Callable[[], None]]) -> None:
        if self._pid != os.getpid():
            self._begin()
        with self._news:
            self._wanted = deque(jobs)
            self._news.notify_all()
        while jobs and len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="bat-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._wanted:
                    self._news.wait()
                job = self._wanted.popleft()
            job()
