"""Shards elsewhere: their tables, and reading them through the local cache.

Sizes and hashes come from ``manifest.json``, else the server is asked. A table is the
``.idx.npz`` beside the remote shard; where there is none and the cache holds the whole set, the
shard is fetched and scanned. Both are kept in the cache under a name that changes with the
shard's place, size and hash, so a set that changed is not mistaken for the old one.
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
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from bat.data.ahead import Ahead
from bat.data.cache import ShardCache
from bat.data.listing import manifest_of
from bat.data.merged import place_of, recall, remember
from bat.data.remote import ChangedError, fetch, stat, stream
from bat.data.sources import NotIndexable, Patience, Shard, identity, shown
from bat.data.table import MAX_TABLE_BYTES, ShardTable, scan
from bat.data.tar import BLOCK, escape_key, parse_header, write_atomic
from bat.errors import UserError

ASKERS, FETCHERS = 16, 4
"""Threads for tables and for shards at start-up."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Far:
    """A remote shard whose size is known."""

    url: str
    name: str
    size: int
    tag: str
    """Of the version that is read; empty where a hash tells it."""
    sha256: str
    clips: int
    """-1 where no manifest says it."""
    file: str
    """Name in the cache."""


class FarShards:
    """The remote ones of ``shards``.

    Raises:
        NotIndexable: a server that does not tell a shard's size.
        UserError: a shard that does not exist, a server out of reach, a disk that cannot hold two
            shards, a cache that cannot be written.
    """

    def __init__(
        self, shards: Sequence[Shard], *, cache: Path | None, cache_bytes: int, patience: Patience
    ) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bat"
        self.folder, self.patience = Path(cache or default) / "remote", patience
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
        manifests = {folder: manifest_of(folder, patience) for folder in folders}
        self.vocabularies = [m.vocabulary for m in manifests.values() if m and m.vocabulary]
        entries = {
            (folder, entry.name): entry
            for folder, manifest in manifests.items()
            for entry in (manifest.shards if manifest else ())
        }

        def ask(item: tuple[int, str]) -> Far:
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
            return Far(url, name, size, tag, sha, clips, f"{escape_key(Path(name).stem)}-{digest}")

        with ThreadPoolExecutor(ASKERS) as pool:
            self.shards = dict(zip(urls, pool.map(ask, urls.items()), strict=True))
        sizes = [far.size for far in self.shards.values()]
        if max(sizes) > self.cache.max_bytes:
            raise NotIndexable(
                f"a shard of {max(sizes)} bytes does not fit in the cache {self.folder} "
                f"({self.cache.max_bytes} bytes): raise data.cache_gb"
            )
        self.bytes = sum(sizes)
        self.fits = self.bytes <= self.cache.max_bytes  # not by the disk: it decides the order
        self._check_disk(max(sizes))
        self.cache.forgive(far.file for far in self.shards.values())
        self._ahead = Ahead(self.have)

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

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_ahead"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._ahead = Ahead(self.have)

    def _asked(self, url: str) -> tuple[int, str]:
        try:
            size, tag = stat(url, self.patience)
        except FileNotFoundError:
            raise UserError(f"no shard at {shown(url)}") from None
        except OSError as error:
            raise UserError(error.strerror) from None
        if size is None:
            raise NotIndexable(f"the server does not tell the size of {shown(url)}")
        return size, tag

    def tables(self) -> dict[int, ShardTable]:
        """``{number: table}`` of all.

        Raises:
            NotIndexable: a shard without a table beside it, and the cache cannot hold the set.
            UserError: a shard that is not a tar, or not what its manifest says, or out of reach.
        """
        stamp = [far.file for far in self.shards.values()]
        merged = place_of(self.folder / "tables", stamp)
        known = recall(merged, stamp)
        if known is not None:
            return dict(zip(self.shards, known, strict=True))
        with ThreadPoolExecutor(ASKERS) as pool:
            found = dict(zip(self.shards, pool.map(self._table, self.shards.values()), strict=True))
        missing = {i: self.shards[i] for i, table in found.items() if table is None}
        if missing and not self.fits:
            far, need = next(iter(missing.values())), sum(f.size for f in self.shards.values())
            raise NotIndexable(
                f"{shown(far.url)} has no {Path(far.name).stem}.idx.npz of this bat beside it, and "
                f"the cache "
                f"({self.cache.max_bytes / 1e9:.3g} GB) cannot hold the set ({need / 1e9:.3g} GB) "
                f"to make it: run bat-shard where the shards lie, or raise data.cache_gb"
            )
        if missing:
            gb = sum(far.size for far in missing.values()) / 1e9
            log.warning("fetching %d remote shards (%.3g GB) to index them", len(missing), gb)
        with ThreadPoolExecutor(FETCHERS) as pool:
            made = dict(zip(missing, pool.map(self._scan, missing.values()), strict=True))
        tables = {i: table or made[i] for i, table in found.items()}
        for i, far in self.shards.items():
            if far.clips not in (-1, len(tables[i].clips)):
                raise UserError(
                    f"{shown(far.url)} has {len(tables[i].clips)} clips, its manifest.json says "
                    f"{far.clips}: copy it there again"
                )
        remember(merged, stamp, list(tables.values()))
        return tables

    def _table(self, far: Far) -> ShardTable | None:
        path = self.folder / "tables" / f"{far.file}.idx.npz"
        table = _load(path, far)
        if table is None:
            try:
                parts = urlsplit(far.url)
                beside = parts.path.removesuffix(".tar") + ".idx.npz"
                url = urlunsplit(parts._replace(path=beside))
                write_atomic(path, fetch(url, limit=MAX_TABLE_BYTES, patience=self.patience))
                table = _load(path, far)
            except (FileNotFoundError, PermissionError):
                return None
            except OSError as error:
                raise UserError(error.strerror) from None
        return table

    def _scan(self, far: Far) -> ShardTable:
        try:
            os.close(self._open(far))
        except OSError as error:
            raise UserError(f"{far.name} cannot be indexed: {error.strerror}") from None
        path = self.folder / f"{far.file}-{far.size}.tar"
        try:
            table = scan(path, far.sha256)
        except UserError as error:
            raise UserError(str(error).replace(str(path), shown(far.url))) from None
        table.save(self.folder / "tables" / f"{far.file}.idx.npz")
        return table

    def _open(self, far: Far) -> int:
        return self.cache.open(far.file, far.size, partial(self._fetch, far))

    def _fetch(self, far: Far, part: Path, again: bool) -> None:
        """Make ``part`` whole, from where it ends."""
        patience = self.patience._replace(retries=1) if again else self.patience
        good = False
        for left in reversed(range(self.patience.retries)):
            start = part.stat().st_size
            with part.open("r+b") as file:
                start = start if start <= far.size else 0
                file.truncate(start)
                file.seek(start)
                how: dict[str, Any] = {"size": far.size, "tag": far.tag, "patience": patience}
                try:
                    for data in stream(far.url, start=start, **how):
                        file.write(data)
                except ChangedError:  # a hash would tell which one is meant
                    file.truncate(0)
                    if far.tag or not left:
                        raise
                    continue
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                good = (
                    hashlib.file_digest(file, "sha256").hexdigest() == far.sha256
                    if far.sha256
                    else parse_header(file.read(BLOCK), 0) is not None
                )
                if good or not start:
                    break
                file.truncate(0)  # its beginning may be of another version
        if not good:
            part.unlink()
            said = "sha256 than its manifest.json says" if far.sha256 else "content than a tar has"
            raise OSError(5, f"{shown(far.url)} has another {said}: copy it there again")

    def pread(self, number: int, size: int, offset: int) -> bytes:
        """Bytes of shard ``number``, which is fetched where the cache lacks it; ``OSError``."""
        fd = self._open(self.shards[number])
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """See ``Index.prefetch``. Half the cache where the set does not fit: the rest is in use."""
        room = min(self.cache.max_bytes, self.cache.room())
        room //= 1 if room >= self.bytes else 2
        wanted = []
        for number in dict.fromkeys(int(n) for n in numbers):
            far = self.shards.get(number)
            if far is not None:
                room -= far.size
                if room < 0:
                    break
                wanted.append(far)
        with contextlib.suppress(OSError):  # who is here counts as used, and stays
            wanted = [far for far in wanted if not self.cache.holds(far.file, far.size)]
        self._ahead.want(wanted)

    def have(self, far: Far) -> None:
        """Fetch ``far`` into the cache, if it can be had."""
        with contextlib.suppress(OSError):  # the cache remembers; who reads a clip of it is told
            os.close(self._open(far))


def _load(path: Path, far: Far) -> ShardTable | None:
    table = ShardTable.load(path, None)  # its shard is not at hand
    if table is None or table.tar_bytes != far.size:
        return None
    return table if not far.sha256 or table.sha256 in ("", far.sha256) else None


def _folder(url: str) -> str:
    """The folder that ``url`` lies in."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0], query="", fragment=""))
