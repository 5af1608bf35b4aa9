"""Background threads that work through a list of things to do, which each new list replaces.

Made anew in a forked child, which inherits none of the threads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

THREADS = 2
T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)


class Ahead(Generic[T]):
    """Calls ``do`` with each of the latest list in the background, the first ones first."""

    def __init__(self, do: Callable[[T], None]) -> None:
        self.do = do
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._wanted: deque[T] = deque()
        self._busy: set[T] = set()
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []

    def want(self, things: Sequence[T]) -> None:
        """Do ``things``, in the order of need, and no more of what an earlier call still waits for.

        What is being done already is not begun again.
        """
        if self._pid != os.getpid():
            self._begin()
        with self._news:
            self._wanted = deque(thing for thing in things if thing not in self._busy)
            self._news.notify_all()
        while things and len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="bat-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._wanted:
                    self._news.wait()
                thing = self._wanted.popleft()
                self._busy.add(thing)
            try:
                self.do(thing)
            except Exception:
                log.exception("prefetching failed; who reads the shard fetches it")
            finally:
                with self._news:
                    self._busy.discard(thing)
