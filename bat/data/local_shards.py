"""Reads shards on this machine by ``pread``, and their tables, checked against manifests."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from bat.data.manifest import Manifest, ShardInfo
from bat.data.sources import Shard
from bat.data.table import ShardTable, scan
from bat.data.table_sets import place_of, recall, remember
from bat.errors import UserError

MAX_OPEN_FILES = 256


class Files:
    """File descriptors by path, for each process its own; the least recently used one is closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._pid = os.getpid()

    def pread(self, path: Path, size: int, offset: int) -> bytes:
        if self._pid != os.getpid():  # after a fork: two processes must not share evictions
            self._open, self._pid = OrderedDict(), os.getpid()
        fd = self._open.get(path)
        if fd is None:
            fd = self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        return os.pread(fd, size, offset)

    def __reduce__(self) -> tuple[type[Files], tuple[()]]:
        return type(self), ()


def local_tables(
    shards: Sequence[Shard], *, whole: Sequence[Path], cache: Path | None
) -> tuple[dict[int, ShardTable], list[list[str]]]:
    """Returns ``{number: table}`` of the local ones of ``shards``, and their manifests'
    vocabularies.

    Args:
        whole: folders that must hold all shards listed in their manifests, or in those below them.
        cache: folder for a table that cannot be written beside its shard.

    Raises:
        UserError: a shard that is missing, not a tar, or different from its manifest.
    """
    local = [(i, shard.place) for i, shard in enumerate(shards) if isinstance(shard.place, Path)]
    vocabularies, entries = [], {}
    for folder in dict.fromkeys(place.parent for _, place in local):
        manifest = Manifest.load(folder)
        if manifest is None:
            continue
        if manifest.vocabulary:
            vocabularies.append(manifest.vocabulary)
        for entry in manifest.shards:
            path = folder / entry.name
            if (folder in whole or folder.parent in whole) and not path.exists():
                raise UserError(
                    f"{folder} lacks {entry.name}, which its manifest.json lists: copy it again, "
                    f"or remove the folder and run the bat-shard command that made it"
                )
            entries[path] = entry
    sizes = {place: place.stat().st_size for _, place in local}
    for place, entry in entries.items():
        if sizes.get(place, entry.bytes) != entry.bytes:
            raise UserError(
                f"{place} has {sizes[place]} bytes, its manifest.json says {entry.bytes}: "
                f"copy it again"
            )
    merged = place_of(cache, [str(place.resolve()) for _, place in local])
    stamp = [_stamp(place, entries.get(place)) for _, place in local] if merged else []
    tables = recall(merged, stamp)
    if tables is None:
        tables = [_table(place, entries.get(place), cache) for _, place in local]
        if merged and stamp == [_stamp(place, entries.get(place)) for _, place in local]:
            remember(merged, stamp, tables)
    for (_, place), table in zip(local, tables, strict=True):
        listed = entries.get(place)
        if listed is not None and len(table.clips) != listed.clips:
            raise UserError(
                f"{place} has {len(table.clips)} clips, its manifest.json says {listed.clips}: "
                f"copy it again"
            )
    return {i: table for (i, _), table in zip(local, tables, strict=True)}, vocabularies


def _stamp(path: Path, entry: ShardInfo | None) -> list[object]:
    """Returns a value that changes when a shard, its table or its hash does."""
    tar = path.stat()
    found: list[object] = [tar.st_size, tar.st_mtime_ns, entry.sha256 if entry else ""]
    try:
        table = path.with_suffix(".idx.npz").stat()
    except OSError:
        return found
    return [*found, table.st_size, table.st_mtime_ns]


def table_places(tar: Path, folder: Path | None) -> list[Path]:
    """Returns the possible places of the table of ``tar``: beside it, then in a folder for
    read-only shards."""
    places = [tar.with_suffix(".idx.npz")]
    if folder is not None:
        digest = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:12]
        places.append(folder / f"{tar.stem}-{digest}.idx.npz")
    return places


def _table(path: Path, entry: ShardInfo | None, cache: Path | None) -> ShardTable:
    """Returns the table of a local shard, read or made.

    If the tar has another modification time (a copy) but the same content, the lengths of the old
    table are kept.
    """
    places = table_places(path, cache)
    for place in places:
        table = ShardTable.load(place, path)
        if table is not None and (entry is None or table.sha256 in ("", entry.sha256)):
            return table
    table = scan(path, entry.sha256 if entry else "")
    before = next(filter(None, (ShardTable.load(place, None) for place in places)), None)
    if before is not None and before.agrees(table):
        for name in ("frames", "rate"):
            unknown = table.clips[name] <= 0
            table.clips[name][unknown] = before.clips[name][unknown]
    elif before is not None and entry is not None and before.sha256 == entry.sha256:
        raise UserError(
            f"{path} was changed since its manifest.json was written: copy it again, or remove the "
            f"manifest and run bat-shard {path.parent}"
        )
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            table.save(place)
            break
        except OSError:
            continue
    return table
