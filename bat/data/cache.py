"""Keeps whole remote shards in a bounded folder that all processes of a machine share.

``open`` gives a file descriptor of a shard, fetching it first where it is missing. One process
fetches a shard (a file lock), the others wait; the file appears whole (``os.replace``); what was
used longest ago is deleted to make room, which takes nothing from a process that has it open. A
shard that could not be fetched is left alone by this process for ``hold_seconds``, so that the rest
of the data goes on. ``Prefetcher`` fetches in the background what will be needed next.
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
"""A use is noted on disk at most this often."""
THREADS = 2
T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)


class ShardCache:
    """Shards in ``folder``: at most ``max_bytes``, and what its disk has room for.

    Args:
        hold_seconds: how long a shard that could not be fetched is left alone.
    """

    def __init__(self, folder: Path, *, max_bytes: int, hold_seconds: float = 60.0) -> None:
        self.folder, self.max_bytes, self.hold_seconds = folder, max_bytes, hold_seconds
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        self._used: dict[str, float] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def room(self) -> int:
        """Bytes that the disk lets the cache hold now: what is in it, and what is free."""
        return sum(size for _, size, _ in self._files(".tar")) + self._free()

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", poll_interval=POLL_SECONDS)

    def open(self, name: str, size: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor of the shard ``name`` of ``size`` bytes; the caller closes it.

        Args:
            fetch: ``fetch(path)`` makes the file ``path``.

        Raises:
            OSError: as ``fetch``, or it failed a while ago; no room on the disk.
        """
        fd = self._take(name, size)
        if fd is not None:
            return fd
        until, reason = self._failed.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise OSError(errno.EIO, reason)
        part = self.folder / f"{name}-{size}.part"
        with self._lock(name):
            fd = self._take(name, size)  # another process fetched it meanwhile
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
        """Whether the shard is here; if so, that counts as a use."""
        fd = self._take(name, size)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _take(self, name: str, size: int) -> int | None:
        try:
            fd = os.open(f"{self.folder}/{name}-{size}.tar", os.O_RDONLY)  # each read comes by here
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
        """(time of last use, bytes on the disk, path), the longest unused first."""
        found = []
        for path in self.folder.glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _make_room(self, part: Path, size: int) -> None:
        """Delete what is longest unused until ``size`` bytes fit; waits for fetches under way."""
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
        """Bytes set aside for other fetches, and those of them still to come; dead ones go."""
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
    """Calls ``do`` with each of the latest list in background threads, the first ones first."""

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
