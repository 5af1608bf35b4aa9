"""Keeps whole remote shards in a bounded folder that all processes of a machine share.

``open`` returns a file descriptor of a shard and fetches the shard first if it is missing. One
process fetches a shard (a file lock) while the others wait; the file appears whole
(``os.replace``). The least recently used shards are deleted to make room; a process that has one
open keeps it. A shard that could not be fetched is not tried again by this process for
``hold_seconds``, so that reading of the other data continues. ``Prefetcher`` fetches in the
background the shards that are needed next.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout

from bat.data.remote import FULL

POLL_SECONDS = 0.05
TOUCH_SECONDS = 5.0
"""Least time between two updates on disk of a shard's time of use."""
THREADS = 2
T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)


class ShardCache:
    """A cache of shards in ``folder``: at most ``max_bytes``, and at most what its disk has room
    for.

    Args:
        hold_seconds: time for which a shard that could not be fetched is not tried again.
    """

    def __init__(self, folder: Path, *, max_bytes: int, hold_seconds: float = 60.0) -> None:
        self.folder, self.max_bytes, self.hold_seconds = folder, max_bytes, hold_seconds
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        self._used: dict[str, float] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def room(self) -> int:
        """Returns the bytes that the disk lets the cache hold now: its content plus free space."""
        return sum(size for _, size, _ in self._files(".tar")) + self._free()

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", poll_interval=POLL_SECONDS)

    def open(self, name: str, size: int, fetch: Callable[[Path], None]) -> int:
        """Returns a descriptor of the shard ``name`` of ``size`` bytes; the caller closes it.

        Args:
            fetch: ``fetch(path)`` makes the file ``path``.

        Raises:
            OSError: as ``fetch``; the fetch failed less than ``hold_seconds`` ago; no room on the
                disk.
        """
        fd = self._take(name, size)
        if fd is not None:
            return fd
        until, reason = self._failed.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise OSError(errno.EIO, reason)
        part = self.folder / f"{name}-{size}.part"
        with self._lock(name):
            fd = self._take(name, size)  # another process may have fetched it meanwhile
            if fd is not None:
                return fd
            try:
                self._make_room(part, size)
                fetch(part)
                if part.stat().st_size != size:
                    raise OSError(errno.EIO, f"{name} has another size than {size} bytes")
                fd = os.open(part, os.O_RDONLY)
                os.fsync(fd)
                os.replace(part, part.with_suffix(".tar"))
                return fd
            except OSError as error:
                part.unlink(missing_ok=True)
                text = error.strerror or str(error)
                if error.errno in FULL:
                    raise self._full(size) from None
                text += f"; tried again after {self.hold_seconds:.0f} s, or by the next run"
                self._failed[name] = time.monotonic() + self.hold_seconds, text
                raise OSError(error.errno or errno.EIO, text) from None

    def _full(self, size: int) -> OSError:
        return OSError(
            errno.ENOSPC,
            f"the disk of the cache {self.folder} is full ({self._free()} bytes free, a shard has "
            f"{size}): make room there, or set data.cache to another disk",
        )

    def holds(self, name: str, size: int) -> bool:
        """Return True if the shard is in the cache; this counts as a use."""
        fd = self._take(name, size)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _take(self, name: str, size: int) -> int | None:
        try:
            fd = os.open(f"{self.folder}/{name}-{size}.tar", os.O_RDONLY)  # called for each read
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size != size:
            os.close(fd)
            return None
        now = time.monotonic()
        if now - self._used.get(name, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._used[name] = now
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(fd)
        return fd

    def _files(self, suffix: str) -> list[tuple[float, int, Path]]:
        """Returns (time of last use, bytes on disk, path) of each file, oldest use first."""
        found = []
        for path in self.folder.glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _make_room(self, part: Path, size: int) -> None:
        """Delete the least recently used shards until ``size`` bytes fit; waits for fetches."""
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes do not fit in a cache of {self.max_bytes}")
        while True:
            with self._lock("room"):
                busy, coming = self._busy(part)
                tars = self._files(".tar")
                over = size + busy + sum(n for _, n, _ in tars) - self.max_bytes
                lacking = size + coming - self._free()
                for _, n, path in tars:
                    if over <= 0 and lacking <= 0:
                        break
                    path.unlink(missing_ok=True)
                    over, lacking = over - n, lacking - n
                if over <= 0 and lacking <= 0:
                    part.touch()
                    return
                if not busy:
                    raise self._full(size)
            time.sleep(POLL_SECONDS)

    def _busy(self, part: Path) -> tuple[int, int]:
        """Returns the bytes reserved for other fetches and those to come; removes abandoned
        ones."""
        whole = coming = 0
        for _, size, path in self._files(".part"):
            name, _, wanted = path.stem.rpartition("-")
            if path == part or not wanted.isdigit():
                continue
            try:
                with self._lock(name).acquire(blocking=False):
                    path.unlink(missing_ok=True)
            except Timeout:
                whole, coming = whole + int(wanted), coming + int(wanted) - size
        return whole, coming


class Prefetcher(Generic[T]):
    """Calls ``do`` on each item of the latest list in background threads, in order."""

    def __init__(self, do: Callable[[T], None]) -> None:
        self.do = do
        self._begin()

    def __getstate__(self) -> dict[str, object]:
        return {"do": self.do}

    def __setstate__(self, state: dict[str, Callable[[T], None]]) -> None:
        self.do = state["do"]
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()  # a forked child inherits none of the threads
        self._wanted: deque[T] = deque()
        self._busy: set[T] = set()
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []

    def want(self, things: Sequence[T]) -> None:
        """Call ``do`` on ``things``, in order; replaces those of an earlier call that have not
        begun.

        An item that is already in progress is not started again.
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
