"""Reads remote shards and their tables through the local cache.

Sizes and hashes come from ``manifest.json``, else from the server. A table is the ``.idx.npz``
beside the remote shard; where there is none and the cache holds the whole set, the shard is fetched
and scanned. Both are kept in the cache under a name that changes with the shard's place, size and
hash, so a set that changed is not taken for the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from bat.data.cache import Prefetcher, ShardCache
from bat.data.manifest import remote_manifest
from bat.data.remote import download, read, stat
from bat.data.sources import NotIndexable, RetryPolicy, Shard, identity, shown
from bat.data.table import MAX_TABLE_BYTES, ShardTable, scan
from bat.data.table_sets import place_of, recall, remember
from bat.data.tar import escape_key, is_tar, write_atomic
from bat.errors import UserError

ASKERS, FETCHERS = 16, 4
"""Threads that read tables and that fetch shards at start-up."""
log = logging.getLogger(__name__)


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


class RemoteShards:
    """The remote ones of ``shards``.

    Raises:
        NotIndexable: a server that does not report a shard's size.
        UserError: a shard that does not exist, an unreachable server, a disk that cannot hold two
            shards, a cache that cannot be written.
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

        def ask(item: tuple[int, str]) -> RemoteShard:
            number, url = item
            name = shards[number].name
            entry = entries.get((_folder(url), name))
            if entry is not None:
                size, tag, sha, clips = entry.bytes, "", entry.sha256, entry.clips
            else:
                found = self._asked(url)
                size, tag, sha, clips = found[0], found[1], "", -1
            what = f"{identity(url)}\n{size}\n{sha or tag}"
            digest = hashlib.sha256(what.encode()).hexdigest()[:16]
            file = f"{escape_key(Path(name).stem)}-{digest}"
            return RemoteShard(url, name, size, tag, sha, clips, file)

        with ThreadPoolExecutor(ASKERS) as pool:
            self.shards = dict(zip(urls, pool.map(ask, urls.items()), strict=True))
        sizes = [shard.size for shard in self.shards.values()]
        if max(sizes) > self.cache.max_bytes:
            raise NotIndexable(
                f"a shard of {max(sizes)} bytes does not fit in the cache {self.folder} "
                f"({self.cache.max_bytes} bytes): raise data.cache_gb"
            )
        self.bytes = sum(sizes)
        self.fits = self.bytes <= self.cache.max_bytes  # not the disk: this sets the order
        self._check_disk(max(sizes))
        self._prefetcher = Prefetcher(self.have)

    def _check_disk(self, largest: int) -> None:
        room, most = self.cache.room(), self.cache.max_bytes
        text = (
            f"the disk of the cache {self.folder} has room for {room} bytes, data.cache_gb="
            f"{most / 1e9:g} is more"
        )
        if room < min(2 * largest, self.bytes, most):
            raise UserError(
                f"{text}, and two shards of {largest} bytes do not fit: make room there, or set "
                f"data.cache to a folder on a larger disk"
            )
        if room < min(self.bytes, most):
            log.warning("%s: shards will be fetched again more often", text)

    def _asked(self, url: str) -> tuple[int, str]:
        try:
            size, tag = stat(url, self.policy)
        except FileNotFoundError:
            raise UserError(f"no shard at {shown(url)}") from None
        except OSError as error:
            raise UserError(error.strerror) from None
        if size is None:
            raise NotIndexable(f"the server does not tell the size of {shown(url)}")
        return size, tag

    def tables(self) -> dict[int, ShardTable]:
        """Returns ``{number: table}`` of all remote shards.

        Raises:
            NotIndexable: a shard without a table beside it, and the cache cannot hold the set.
            UserError: a shard that is not a tar, differs from its manifest, or cannot be reached.
        """
        stamp = [shard.file for shard in self.shards.values()]
        merged = place_of(self.folder / "tables", stamp)
        known = recall(merged, stamp)
        if known is not None:
            return dict(zip(self.shards, known, strict=True))
        with ThreadPoolExecutor(ASKERS) as pool:
            found = dict(zip(self.shards, pool.map(self._table, self.shards.values()), strict=True))
        missing = {i: self.shards[i] for i, table in found.items() if table is None}
        if missing and not self.fits:
            shard, need = next(iter(missing.values())), sum(f.size for f in self.shards.values())
            raise NotIndexable(
                f"{shown(shard.url)} has no {Path(shard.name).stem}.idx.npz of this bat beside it, "
                f"and the cache "
                f"({self.cache.max_bytes / 1e9:.3g} GB) cannot hold the set ({need / 1e9:.3g} GB) "
                f"to make it: run bat-shard where the shards lie, or raise data.cache_gb"
            )
        if missing:
            gb = sum(shard.size for shard in missing.values()) / 1e9
            log.warning("fetching %d remote shards (%.3g GB) to index them", len(missing), gb)
        with ThreadPoolExecutor(FETCHERS) as pool:
            made = dict(zip(missing, pool.map(self._scan, missing.values()), strict=True))
        tables = {i: table or made[i] for i, table in found.items()}
        for i, shard in self.shards.items():
            if shard.clips not in (-1, len(tables[i].clips)):
                raise UserError(
                    f"{shown(shard.url)} has {len(tables[i].clips)} clips, its manifest.json says "
                    f"{shard.clips}: copy it there again"
                )
        remember(merged, stamp, list(tables.values()))
        return tables

    def _table(self, shard: RemoteShard) -> ShardTable | None:
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
        try:
            os.close(self._open(shard))
        except OSError as error:
            raise UserError(f"{shard.name} cannot be indexed: {error.strerror}") from None
        path = self.folder / f"{shard.file}-{shard.size}.tar"
        try:
            table = scan(path, shard.sha256)
        except UserError as error:
            raise UserError(str(error).replace(str(path), shown(shard.url))) from None
        table.save(self.folder / "tables" / f"{shard.file}.idx.npz")
        return table

    def _open(self, shard: RemoteShard) -> int:
        return self.cache.open(shard.file, shard.size, partial(self._fetch, shard))

    def _fetch(self, shard: RemoteShard, path: Path) -> None:
        """Fetch ``shard`` whole to ``path`` and check its content."""
        download(shard.url, path, size=shard.size, tag=shard.tag, policy=self.policy)
        with path.open("rb") as file:
            good = (
                hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
                if shard.sha256
                else is_tar(file)
            )
        if not good:
            said = (
                "sha256 than its manifest.json says" if shard.sha256 else "content than a tar has"
            )
            raise OSError(5, f"{shown(shard.url)} has another {said}: copy it there again")

    def pread(self, number: int, size: int, offset: int) -> bytes:
        """Reads bytes of shard ``number``, fetching it if necessary; raises ``OSError``."""
        fd = self._open(self.shards[number])
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Prefetch as ``Index.prefetch``; half the cache (the rest is in use) for larger sets."""
        room = min(self.cache.max_bytes, self.cache.room())
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

    def have(self, shard: RemoteShard) -> None:
        """Fetch ``shard`` into the cache, if possible."""
        with contextlib.suppress(OSError):  # the error is raised when a clip of it is read
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
