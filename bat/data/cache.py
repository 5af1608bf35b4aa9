"""A bounded folder of whole remote shards, shared by all processes of a machine.

``open`` gives a file descriptor of a shard, fetching it first where it is missing. One process
fetches a shard (a lock), the others wait; the file appears whole (``os.replace``); what was used
longest ago is deleted to make room, which takes nothing from a process that has it open. A fetch
that was cut off leaves a ``.part`` to go on from. A shard that could not be fetched is left alone
for a while by every process, longer each time, so that the rest of the data goes on.

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
from collections.abc import Callable, Iterator
from pathlib import Path

from bat.data.tar import write_atomic

POLL_SECONDS = 0.02
TOUCH_SECONDS = 5.0
"""A use is noted on disk at most this often."""
LONGEST_HOLD_SECONDS = 3600.0


class ShardCache:
    """Shards in ``folder``: at most ``max_bytes``, or nine tenths of what its disk has room for.

    Args:
        hold_seconds: how long a shard that could not be fetched is left alone; doubled each time.
    """

    def __init__(self, folder: Path, *, max_bytes: int, hold_seconds: float = 60.0) -> None:
        self.folder, self.hold_seconds = folder, hold_seconds
        for name in (".", "locks", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        held = sum(size for _, size, _ in self._files(".tar"))
        self.max_bytes = min(max_bytes, held + shutil.disk_usage(folder).free * 9 // 10)
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

    def open(self, name: str, size: int, fetch: Callable[[Path, bool], None]) -> int:
        """A descriptor of the shard ``name`` of ``size`` bytes; the caller closes it.

        Args:
            fetch: ``fetch(part, again)`` makes the file ``part`` whole, which may hold its
                beginning; ``again``: it failed not long ago.

        Raises:
            OSError: as ``fetch``, or it failed a while ago; no room on the disk.
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
                fetch(part, failed > 0)
                if part.stat().st_size != size:
                    raise OSError(errno.EIO, f"{name} has another size than {size} bytes")
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    text = f"the disk of the cache {self.folder} is full: give it room"
                    raise OSError(error.errno, text) from None
                note = json.dumps({"times": failed + 1, "why": error.strerror or str(error)})
                write_atomic(self.folder / "failed" / name, note.encode())
                raise
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
        hold = min(self.hold_seconds * 2.0 ** min(times - 1, 20), LONGEST_HOLD_SECONDS)
        if 0 <= past < hold:
            raise OSError(errno.EIO, why)
        return times

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
        """Reserve ``size`` bytes as ``part``; waits for fetches that hold what room there is."""
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes do not fit in a cache of {self.max_bytes}")
        while True:
            with self._lock("room"):
                parts = [entry for entry in self._files(".part") if entry[2] != part]
                tars = self._files(".tar")
                over = size + sum(whole for _, whole, _ in parts + tars) - self.max_bytes
                for _, whole, path in parts + tars if over > 0 else ():
                    if path.suffix == ".tar":
                        path.unlink(missing_ok=True)
                    elif not self._drop_part(path):
                        continue
                    over -= whole
                    if over <= 0:
                        break
                if over <= 0:
                    part.touch()
                    return
            time.sleep(POLL_SECONDS)

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
                        time.sleep(POLL_SECONDS)
                yield got  # closing the file gives the lock back
        finally:
            threads.release()
