"""Reads remote shards and their tables through a bounded folder that all processes share.

``ShardCache`` keeps whole shards: one process fetches a shard while the others wait for it (a file
lock), and the file appears whole. The least recently used shards are deleted to make room; a
process that has one open keeps it. ``RemoteShards`` knows the shards of a run: sizes and hashes
come from ``manifest.json``, else from the server; a table is the ``.idx.npz`` beside the remote
shard, and where there is none and the cache holds the whole set, the shard is fetched and scanned.
Names in the cache change with a shard's place, size and hash, so a set that changed is not taken
for the old one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from bat.data.manifest import remote_manifest
from bat.data.remote import FULL, download, read, read_part, stat
from bat.data.sources import NotIndexable, RetryPolicy, Shard, identity, shown
from bat.data.table import MAX_TABLE_BYTES, ShardTable, scan
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.io import write_atomic

THREADS = 16
"""Threads that ask for the sizes of shards that no manifest lists."""
FETCHERS, PREFETCHERS = 4, 2
"""Shards that are fetched at a time at the start, and threads that fetch during training."""
POLL_SECONDS = 0.05
log = logging.getLogger(__name__)


class ShardCache:
    """Shards in ``folder``: at most ``max_bytes``, and at most what its disk has room for.

    Args:
        hold_seconds: time for which a shard that could not be fetched is not tried again by this
            process, so that reading of the other data continues.
    """

    def __init__(self, folder: Path, *, max_bytes: int, hold_seconds: float = 60.0) -> None:
        self.folder, self.max_bytes, self.hold_seconds = folder, max_bytes, hold_seconds
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        self._failed: dict[str, tuple[float, str]] = {}

    def open(self, name: str, size: int, fetch: Callable[[Path], None]) -> int:
        """Returns a descriptor of the shard ``name`` of ``size`` bytes; the caller closes it.

        Args:
            fetch: ``fetch(path)`` makes the file ``path``.

        Raises:
            OSError: as ``fetch``; the fetch failed less than ``hold_seconds`` ago; a full disk.
        """
        found = self._opened(name, size)
        if found is not None:
            return found
        until, reason = self._failed.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise OSError(errno.EIO, reason)
        part = self.folder / f"{name}-{size}.part"
        with self._lock(name):
            found = self._opened(name, size)  # another process may have fetched it meanwhile
            if found is not None:
                return found
            try:
                self._make_room(part, size)
                fetch(part)
                if part.stat().st_size != size:
                    raise OSError(errno.EIO, f"{name} has another size than {size} bytes")
                os.replace(part, part.with_suffix(".tar"))
                return os.open(part.with_suffix(".tar"), os.O_RDONLY)
            except OSError as error:
                part.unlink(missing_ok=True)
                if error.errno in FULL:
                    raise OSError(
                        errno.ENOSPC,
                        f"the disk of the cache {self.folder} is full (a shard has {size} bytes): "
                        "make room there, or set data.cache to another disk",
                    ) from None
                text = f"{error.strerror or error}; tried again after {self.hold_seconds:.0f} s"
                self._failed[name] = time.monotonic() + self.hold_seconds, text
                raise OSError(error.errno or errno.EIO, text) from None

    def holds(self, name: str, size: int) -> bool:
        """Return True if the shard is in the cache; this counts as a use."""
        found = self._opened(name, size)
        if found is not None:
            os.close(found)
        return found is not None

    def capacity(self) -> int:
        """Returns the bytes that the cache may hold, as its disk is now."""
        held = sum(size for _, size, _ in self._files(".tar"))
        return min(self.max_bytes, held + shutil.disk_usage(self.folder).free)

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", poll_interval=POLL_SECONDS)

    def _opened(self, name: str, size: int) -> int | None:
        try:
            fd = os.open(f"{self.folder}/{name}-{size}.tar", os.O_RDONLY)  # called for each read
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size != size:
            os.close(fd)
            return None
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
                reserved, unwritten = self._under_way(part)
                shards = self._files(".tar")
                held = sum(n for _, n, _ in shards)
                free = shutil.disk_usage(self.folder).free
                over = size + max(reserved + held - self.max_bytes, unwritten - free)
                for _, n, path in shards:
                    if over <= 0:
                        break
                    path.unlink(missing_ok=True)
                    over -= n
                if over <= 0:
                    part.touch()
                    return
                if not reserved:
                    raise OSError(errno.ENOSPC, "no room")
            time.sleep(POLL_SECONDS)

    def _under_way(self, part: Path) -> tuple[int, int]:
        """Returns the bytes of other fetches, and how many of them are not yet on the disk; removes
        abandoned ones."""
        reserved = unwritten = 0
        for _, size, path in self._files(".part"):
            name, _, wanted = path.stem.rpartition("-")
            if path == part or not wanted.isdigit():
                continue
            try:
                with self._lock(name).acquire(blocking=False):
                    path.unlink(missing_ok=True)
            except Timeout:
                reserved, unwritten = reserved + int(wanted), unwritten + int(wanted) - size
        return reserved, unwritten


@dataclass(frozen=True)
class RemoteShard:
    """A remote shard of known size."""

    url: str
    name: str
    size: int
    tag: str
    """Tag of the version that is read; empty if the shard is identified by a hash."""
    sha256: str
    clips: int
    """Number of clips; -1 if no manifest gives it."""
    file: str
    """Name in the cache."""


class Prefetcher:
    """Calls ``fetch`` on each shard of the latest list in background threads, in order."""

    def __init__(self, fetch: Callable[[RemoteShard], None]) -> None:
        self.fetch = fetch
        self._wanted: deque[RemoteShard] = deque()
        self._threads: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type[Prefetcher], tuple[object]]:
        return Prefetcher, (self.fetch,)

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Fetch ``shards``, in order; replaces those of an earlier call that have not begun."""
        self._wanted = deque(shards)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(len(shards), PREFETCHERS) - len(self._threads)):
            thread = threading.Thread(target=self._work, name="bat-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            try:
                shard = self._wanted.popleft()
            except IndexError:
                return
            with contextlib.suppress(OSError):  # raised when a clip of it is read
                self.fetch(shard)


class RemoteShards:
    """The remote ones of ``shards``.

    Raises:
        NotIndexable: a server that does not report a shard's size; a shard beyond the cache.
        UserError: a shard that does not exist, an unreachable server, a cache that cannot be
            written.
    """

    def __init__(
        self, shards: Sequence[Shard], *, cache: Path | None, cache_bytes: int, policy: RetryPolicy
    ) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bat"
        self.folder, self.policy = Path(cache or default) / "remote", policy
        try:
            self.cache = ShardCache(self.folder, max_bytes=cache_bytes)
            (self.folder / "tables").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}): set data.cache to another "
                "folder"
            ) from error
        urls = {i: shard.place for i, shard in enumerate(shards) if isinstance(shard.place, str)}
        folders = dict.fromkeys(_folder(url) for url in urls.values())
        manifests = {folder: remote_manifest(folder, policy) for folder in folders}
        self.vocabularies = [m.vocabulary for m in manifests.values() if m and m.vocabulary]
        entries = {
            (folder, entry.name): entry
            for folder, manifest in manifests.items()
            for entry in (manifest.shards if manifest else ())
        }

        listed = {i: entries.get((_folder(url), shards[i].name)) for i, url in urls.items()}
        unlisted = [i for i, entry in listed.items() if entry is None]
        with ThreadPoolExecutor(THREADS) as pool:
            sizes_and_tags = pool.map(self._size_and_tag, (urls[i] for i in unlisted))
            asked = dict(zip(unlisted, sizes_and_tags, strict=True))

        def remote_shard(number: int, url: str) -> RemoteShard:
            name, entry = shards[number].name, listed[number]
            if entry is not None:
                size, tag, sha, clips = entry.bytes, "", entry.sha256, entry.clips
            else:
                size, tag = asked[number]
                sha, clips = "", -1
            what = f"{identity(url)}\n{size}\n{sha or tag}"
            digest = hashlib.sha256(what.encode()).hexdigest()[:16]
            file = f"{escape_key(Path(name).stem)}-{digest}"
            return RemoteShard(url, name, size, tag, sha, clips, file)

        self.shards = {number: remote_shard(number, url) for number, url in urls.items()}
        sizes = [shard.size for shard in self.shards.values()]
        if max(sizes) > cache_bytes:
            raise NotIndexable(
                f"a shard of {max(sizes)} bytes does not fit in the cache {self.folder} "
                f"({cache_bytes} bytes): raise data.cache_gb"
            )
        self.bytes = sum(sizes)
        self.fits = self.bytes <= cache_bytes  # whatever the disk has: this sets the order
        self.by_clip = False
        """Reads clips from the server one by one, not through whole shards in the cache."""
        self._prefetcher = Prefetcher(self._have)
        self._fetching, self._warned = threading.Semaphore(FETCHERS), False

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_fetching"}

    def _size_and_tag(self, url: str) -> tuple[int, str]:
        try:
            size, tag = stat(url, self.policy)
        except FileNotFoundError:
            raise UserError(f"no shard at {shown(url)}") from None
        except OSError as error:
            raise UserError(error.strerror) from None
        if size is None:
            raise NotIndexable(f"the server does not tell the size of {shown(url)}")
        return size, tag

    def table(self, number: int) -> ShardTable:
        """Returns the table of remote shard ``number``; the shard is fetched and scanned if there
        is none beside it.

        Raises:
            NotIndexable: a shard without a table beside it, and the cache cannot hold the set.
            UserError: a shard that is not a tar, differs from its manifest, or cannot be reached.
        """
        shard = self.shards[number]
        table = self._table(shard)
        if table is None and not self.fits:
            raise NotIndexable(
                f"{shown(shard.url)} has no {Path(shard.name).stem}.idx.npz of this bat beside it, "
                f"and the cache ({self.cache.max_bytes / 1e9:.3g} GB) cannot hold the set "
                f"({self.bytes / 1e9:.3g} GB) to make it: run bat-shard where the shards lie, or "
                f"raise data.cache_gb"
            )
        if table is None:
            if not self._warned:
                log.warning("fetching remote shards that have no table beside them, to index them")
                self._warned = True
            with self._fetching:
                table = self._scan(shard)
        if shard.clips not in (-1, len(table.clips)):
            raise UserError(
                f"{shown(shard.url)} has {len(table.clips)} clips, its manifest.json says "
                f"{shard.clips}: copy it there again"
            )
        return table

    def _table(self, shard: RemoteShard) -> ShardTable | None:
        """Returns the table of ``shard``: from the cache, else from beside it; None if there is
        none."""
        path = self.folder / "tables" / f"{shard.file}.idx.npz"
        table = _load(path, shard)
        if table is None:
            try:
                parts = urlsplit(shard.url)
                beside = parts.path.removesuffix(".tar") + ".idx.npz"
                url = urlunsplit(parts._replace(path=beside))
                write_atomic(path, read(url, limit=MAX_TABLE_BYTES, policy=self.policy))
                table = _load(path, shard)
            except (FileNotFoundError, PermissionError):
                return None
            except OSError as error:
                raise UserError(error.strerror) from None
        return table

    def _scan(self, shard: RemoteShard) -> ShardTable:
        path = self.folder / f"{shard.file}-{shard.size}.tar"
        try:
            os.close(self._open(shard))
            table = scan(path, shard.sha256)
        except OSError as error:
            raise UserError(f"{shard.name} cannot be indexed: {error.strerror}") from None
        except UserError as error:
            raise UserError(str(error).replace(str(path), shown(shard.url))) from None
        table.save(self.folder / "tables" / f"{shard.file}.idx.npz")
        return table

    def _open(self, shard: RemoteShard) -> int:
        return self.cache.open(shard.file, shard.size, partial(self._fetch, shard))

    def _fetch(self, shard: RemoteShard, path: Path) -> None:
        """Fetch ``shard`` whole to ``path`` and check its hash, where it is known."""
        download(shard.url, path, size=shard.size, tag=shard.tag, policy=self.policy)
        if shard.sha256:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                said = f"{shown(shard.url)} has another sha256 than its manifest.json says"
                raise OSError(errno.EIO, f"{said}: copy it there again")

    def pread(self, number: int, size: int, offset: int) -> bytes:
        """Reads bytes of shard ``number``, fetching it (``by_clip``: only these bytes) if it is not
        in the cache; raises ``OSError``."""
        shard = self.shards[number]
        if self.by_clip and not self.cache.holds(shard.file, shard.size):
            data = read_part(shard.url, offset=offset, size=size, policy=self.policy)
            if len(data) <= size:
                return data
            self.by_clip = False  # the server sends whole files only
        fd = self._open(shard)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Prefetch as ``Index.prefetch``; half the cache (the rest is in use) for larger sets."""
        if self.by_clip:
            return
        room = self.cache.capacity()
        room //= 1 if room >= self.bytes else 2
        wanted = []
        for number in dict.fromkeys(int(n) for n in numbers):
            shard = self.shards.get(number)
            if shard is not None:
                room -= shard.size
                if room < 0:
                    break
                wanted.append(shard)
        with contextlib.suppress(OSError):  # a shard in the cache counts as used, so it stays
            wanted = [shard for shard in wanted if not self.cache.holds(shard.file, shard.size)]
        self._prefetcher.want(wanted)

    def _have(self, shard: RemoteShard) -> None:
        os.close(self._open(shard))


def _load(path: Path, shard: RemoteShard) -> ShardTable | None:
    table = ShardTable.load(path, None)  # its shard is not available locally
    if table is None or table.tar_bytes != shard.size:
        return None
    return table if not shard.sha256 or table.sha256 in ("", shard.sha256) else None


def _folder(url: str) -> str:
    """Returns the folder that ``url`` lies in."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0], query="", fragment=""))
