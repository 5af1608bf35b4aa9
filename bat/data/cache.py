"""A bounded folder of whole remote shards, shared by all processes of a machine.

``open`` gives a file descriptor of a shard, fetching it first where it is missing. One process
fetches a shard (a lock), the others wait; the file appears whole (``os.replace``); what was used
longest ago is deleted to make room, which takes nothing from a process that has it open. A fetch
that was cut off leaves a ``.part`` to go on from. A shard that could not be fetched is left alone
for a while by every process, longer each time, so that the rest of the data goes on; a new run
(``forgive``) tries it anew. Where the disk is smaller than the cache may be, shards go earlier.

Locks are ``lockf`` ones (a forked child does not inherit them, as it would with ``flock``) and a
``threading.Lock`` beside them, because ``lockf`` does not tell the threads of a process apart.
They are polled: the kernel would take two processes with two threads each for a deadlock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from bat.data.ending import go_on
from bat.data.tar import write_atomic

POLL_SECONDS = 0.02
TOUCH_SECONDS = 5.0
"""A use is noted on disk at most this often."""
LONGEST_HOLD_SECONDS = 3600.0
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TRIES = 3
"""Tries on a disk that says it is full when there is nothing to delete."""


class ShardCache:
    """Shards in ``folder``: at most ``max_bytes``, and what its disk has room for.

    Args:
        hold_seconds: how long a shard that could not be fetched is left alone; doubled each time.
    """

    def __init__(self, folder: Path, *, max_bytes: int, hold_seconds: float = 60.0) -> None:
        self.folder, self.max_bytes, self.hold_seconds = folder, max_bytes, hold_seconds
        for name in (".", "locks", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._forget()

    def _forget(self) -> None:
        """State of one process."""
        self._pid, self._root = os.getpid(), os.fspath(self.folder)
        self._threads: dict[str, threading.Lock] = {}
        self._used: dict[str, float] = {}

    def __getstate__(self) -> dict[str, object]:
        return {k: getattr(self, k) for k in ("folder", "hold_seconds", "max_bytes")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def room(self) -> int:
        """Bytes that the disk lets the cache hold now: what is in it, and what is free."""
        held = 0
        for _, _, path in self._files(".tar") + self._files(".part"):
            with contextlib.suppress(FileNotFoundError):
                held += path.stat().st_size
        return held + self._free()

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def forgive(self, names: Iterable[str]) -> None:
        """Try ``names`` anew, whatever failed before."""
        for name in set(os.listdir(self.folder / "failed")).intersection(names):
            (self.folder / "failed" / name).unlink(missing_ok=True)

    def open(self, name: str, size: int, fetch: Callable[[Path, bool], None]) -> int:
        """A descriptor of the shard ``name`` of ``size`` bytes; the caller closes it.

        Args:
            fetch: ``fetch(part, again)`` makes the file ``part`` whole, which may hold its
                beginning; ``again``: it failed not long ago.

        Raises:
            OSError: as ``fetch``, or it failed a while ago; no room on the disk; the run ends.
        """
        if self._pid != os.getpid():
            self._forget()
        fd = self._take(name, size)
        if fd is not None:
            return fd
        self._refuse(name)
        path = self.folder / f"{name}-{size}.tar"
        with self._lock(name):
            fd = self._take(name, size)  # another process fetched it meanwhile
            if fd is not None:
                return fd
            failed = self._refuse(name)
            part = path.with_suffix(".part")
            self._make_room(part, size)
            try:
                self._fill(part, size, partial(fetch, part, failed > 0))
                if part.stat().st_size != size:
                    raise OSError(errno.EIO, f"{name} has another size than {size} bytes")
            except OSError as error:
                if error.errno in (*FULL, errno.ECANCELED):
                    raise
                why = error.strerror or str(error)
                note = json.dumps({"times": failed + 1, "why": why})
                write_atomic(self.folder / "failed" / name, note.encode())
                text = f"{why}{_later(self._hold(failed + 1))}"
                raise OSError(error.errno or errno.EIO, text) from None
            fd = os.open(part, os.O_RDONLY)
            os.replace(part, path)
            (self.folder / "failed" / name).unlink(missing_ok=True)
            return fd

    def holds(self, name: str, size: int) -> bool:
        """Whether the shard is here; if so, that counts as a use."""
        fd = self._take(name, size)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _take(self, name: str, size: int) -> int | None:
        try:
            fd = os.open(f"{self._root}/{name}-{size}.tar", os.O_RDONLY)  # each read comes by here
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

    def _refuse(self, name: str) -> int:
        """How often ``name`` has failed; ``OSError`` where the last time is not long ago."""
        path = self.folder / "failed" / name
        try:
            past = time.time() - path.stat().st_mtime
            note = json.loads(path.read_text())
            times, why = int(note["times"]), str(note["why"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        hold = self._hold(times)
        if 0 <= past < hold:
            raise OSError(errno.EIO, f"{why}{_later(hold - past)}")
        return times

    def _hold(self, times: int) -> float:
        """Seconds for which what failed so often is left alone."""
        return min(self.hold_seconds * 2.0 ** min(times - 1, 20), LONGEST_HOLD_SECONDS)

    def _fill(self, part: Path, size: int, fetch: Callable[[], None]) -> None:
        """``fetch``, again where the disk was full and there was something to delete."""
        idle = 0
        while True:
            try:
                return fetch()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                gained = self._squeeze(part, size)
                idle += not gained
                if not gained and (idle == FULL_TRIES or self._free() < size - part.stat().st_size):
                    text = (
                        f"the disk of the cache {self.folder} is full ({self._free()} bytes free, "
                        f"a shard has {size}): make room there, or set data.cache to another disk"
                    )
                    raise OSError(error.errno, text) from None

    def _squeeze(self, part: Path, size: int) -> bool:
        """Give ``part`` more of the disk, if anything here can be deleted or waited for."""
        with self._lock("room"):
            need = size - part.stat().st_size
            if self._evict(part, need, reserved=False):
                return True
            busy = self._busy(part)
            if busy:  # those may wait for this one
                os.truncate(part, 0)
        waits = bool(busy)
        while busy:
            go_on()
            time.sleep(POLL_SECONDS)
            busy = self._busy(part)
        return waits

    def _busy(self, part: Path) -> list[Path]:
        """The other unfinished fetches that hold some of the disk."""
        found = []
        for _, _, path in self._files(".part"):
            with contextlib.suppress(FileNotFoundError):
                if path != part and path.stat().st_size and not self._drop_part(path):
                    found.append(path)
        return found

    def _files(self, suffix: str) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes when whole, path), the longest unused first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                stem, ending = os.path.splitext(entry.name)
                whole = stem.rpartition("-")[2]
                if ending == suffix and whole.isdigit():
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime, int(whole), Path(entry.path)))
        return sorted(found)

    def _make_room(self, part: Path, size: int) -> None:
        """Reserve ``size`` bytes as ``part``; waits for fetches that hold what room there is.

        The disk is to have as much again left for others, if deleting here can give it.
        """
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes do not fit in a cache of {self.max_bytes}")
        while True:
            with self._lock("room"):
                taken = self._files(".part") + self._files(".tar")
                others = sum(whole for _, whole, path in taken if path != part)
                over = size + others - self.max_bytes
                if over <= 0 or self._evict(part, over, reserved=True) >= over:
                    part.touch()
                    need = 2 * size - part.stat().st_size - self._free()
                    self._evict(part, need, reserved=False)
                    return
            go_on()
            time.sleep(POLL_SECONDS)

    def _evict(self, part: Path, need: int, *, reserved: bool) -> int:
        """Delete dead fetches, then what is longest unused, until ``need`` bytes are gained.

        Args:
            reserved: count the bytes set aside for a file, not those it has on the disk.
        """
        gained = 0
        for _, whole, path in self._files(".part") + self._files(".tar") if need > 0 else ():
            if gained >= need:
                break
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                if path.suffix == ".tar":
                    path.unlink()
                elif path == part or not self._drop_part(path):
                    continue
                gained += whole if reserved else size
        return gained

    def _drop_part(self, path: Path) -> bool:
        """Delete an unfinished fetch unless somebody is at it."""
        with self._lock(path.stem.rpartition("-")[0], wait=False) as got:
            if got:
                path.unlink(missing_ok=True)
            return got

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock ``name`` of all threads and processes; yields whether it was got."""
        threads = self._threads.setdefault(name, threading.Lock())
        while not (got := threads.acquire(blocking=False)) and wait:
            go_on()
            time.sleep(POLL_SECONDS)
        if not got:
            yield False
            return
        try:
            with (self.folder / "locks" / name).open("a") as file:
                while got:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError as error:
                        if error.errno not in (errno.EACCES, errno.EAGAIN):
                            raise
                        if not wait:
                            got = False
                            break
                        go_on()
                        time.sleep(POLL_SECONDS)
                yield got  # closing the file gives the lock back
        finally:
            threads.release()


def _later(seconds: float) -> str:
    return f"; tried again after {seconds:.0f} s, or by the next run"
