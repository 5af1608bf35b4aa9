"""Reads the manifests and tables of local shards; makes and saves a table where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from bat.data.manifest import Manifest, ShardInfo
from bat.data.sources import Shard
from bat.data.table import ShardTable, scan, table_places
from bat.errors import UserError


def stamps(tar: Path | str) -> list[int]:
    """Returns size and modification time of a shard and of the table beside it, as far as they are
    there."""
    found = []
    for path in (tar, f"{str(tar).removesuffix('.tar')}.idx.npz"):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found += [status.st_size, status.st_mtime_ns]
    return found


def manifest_entries(
    shards: Sequence[Shard], *, whole: Sequence[Path]
) -> tuple[dict[str, ShardInfo], list[list[str]]]:
    """Returns the entries of local ``shards`` in the manifests of their folders, by path, and the
    vocabularies of these.

    Args:
        whole: folders that must hold all shards listed in their manifests, or in those below them.

    Raises:
        UserError: a shard that is missing.
    """
    local = dict.fromkeys(str(shard.place) for shard in shards if not shard.remote)
    vocabularies: list[list[str]] = []
    entries: dict[str, ShardInfo] = {}
    for name in dict.fromkeys(map(os.path.dirname, local)):
        folder = Path(name)
        manifest = Manifest.load(folder)
        if manifest is None:
            continue
        if manifest.vocabulary:
            vocabularies.append(manifest.vocabulary)
        listed = {os.path.join(name, entry.name): entry for entry in manifest.shards}
        entries |= listed
        if folder in whole or folder.parent in whole:
            for path, entry in listed.items():
                if path not in local and not os.path.exists(path):
                    raise UserError(
                        f"{folder} lacks {entry.name}, which its manifest.json lists: copy it "
                        f"again, or remove the folder and run the bat-shard command that made it"
                    )
    return entries, vocabularies


def local_table(path: Path, entry: ShardInfo | None, cache: Path | None) -> ShardTable:
    """Returns the table of a local shard, read or made, and held to its ``entry`` of a manifest.

    If the tar has another modification time (a copy) but the same content, the lengths of the old
    table are kept.
    """
    size = path.stat().st_size
    if entry is not None and size != entry.bytes:
        raise UserError(
            f"{path} has {size} bytes, its manifest.json says {entry.bytes}: copy it again"
        )
    places = table_places(path, cache)
    tables = (ShardTable.load(place, path) for place in places)
    table = next(
        (t for t in tables if t and (entry is None or t.sha256 in ("", entry.sha256))), None
    )
    if table is None:
        table = scan(path, entry.sha256 if entry else "")
        before = next(filter(None, (ShardTable.load(place, None) for place in places)), None)
        if before is not None and before.agrees(table):
            for name in ("frames", "rate"):
                unknown = table.clips[name] <= 0
                table.clips[name][unknown] = before.clips[name][unknown]
        elif before is not None and entry is not None and before.sha256 == entry.sha256:
            raise UserError(
                f"{path} was changed since its manifest.json was written: copy it again, or remove "
                f"the manifest and run bat-shard {path.parent}"
            )
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                table.save(place)
                break
            except OSError:
                continue
    if entry is not None and len(table.clips) != entry.clips:
        raise UserError(
            f"{path} has {len(table.clips)} clips, its manifest.json says {entry.clips}: copy it "
            "again"
        )
    return table
