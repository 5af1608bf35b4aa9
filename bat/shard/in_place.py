"""Indexes foreign shards where they lie: a table beside each, a manifest for the folder.

Published WebDataset shards (docs/data.md) seldom give the length of a clip and never the hash of
their tar. ``index_in_place`` reads each tar once: its hash, its headers and JSON, and the header of
every clip whose length is unknown. The shards themselves are not changed. A second run keeps the
tables that still describe their shard.

For a folder that cannot be written, the tables go to ``index_dir`` and no manifest is made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from bat.audio.decode import DecodeError
from bat.audio.decode import probe as read_header
from bat.data.manifest import Counts, Manifest, ShardInfo, joint_vocabulary
from bat.data.table import ShardTable, ask_clips, scan, table_places
from bat.data.tar import sample_key
from bat.errors import UserError
from bat.shard.info import load_table, local_shards
from bat.shard.pool import ordered_map


@dataclass
class Indexed:
    """The result of ``index_in_place``."""

    shards: int = 0
    clips: int = 0
    written: int = 0
    """Number of tables made or completed; the others were valid."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """``{"key", "file", "reason"}`` of clips that do not open; they stay in their shard."""
    manifests: list[Path] = field(default_factory=list)
    """Paths of the manifests written."""
    notes: list[str] = field(default_factory=list)


def index_in_place(
    source: Path, *, index_dir: Path | None = None, jobs: int = 1, progress: bool = False
) -> Indexed:
    """Write the tables of the shards at ``source`` and, for whole folders, ``manifest.json``.

    Args:
        source: a folder of tars, of folders of tars, one tar, or a glob (tables only).
        index_dir: folder for the tables, instead of beside the shards; no manifest then.
        jobs: processes; each takes a shard at a time.

    Raises:
        UserError: nothing found, not plain tars, a folder that cannot be written, a shard that
            differs from its manifest, folders with different vocabularies.
    """
    tars = [Path(shard.place) for shard in local_shards(source)]
    folders = list(dict.fromkeys(tar.parent for tar in tars))
    for folder in folders if index_dir is None else ():
        if not os.access(folder, os.W_OK):
            raise UserError(_cannot_write(folder, "it is read-only"))
    manifests = {folder: Manifest.load(folder) for folder in folders}
    whole = source.is_dir() and index_dir is None
    known = {
        folder / entry.name: entry for folder, m in manifests.items() if m for entry in m.shards
    }
    jobs_of = [(tar, known.get(tar), whole and not known.get(tar)) for tar in tars]
    done, tables, entries = Indexed(shards=len(tars)), [], []
    results = ordered_map(
        partial(_index, index_dir=index_dir), jobs_of, jobs=jobs, progress=progress, unit="shard"
    )
    with closing(results):
        for tar, (table, written, unreadable) in zip(tars, results, strict=True):
            tables.append(table)
            done.clips += len(table.clips)
            done.written += written
            done.unreadable += unreadable
            entries.append([*unreadable, *_left_out(tar, table)])
    if whole:
        _write_manifests(done, tars, tables, entries, manifests)
    elif index_dir is not None:
        done.notes.append(f"no manifest.json: the tables are in {index_dir}, the shards untouched")
    else:
        done.notes.append("no manifest.json: these are not the whole of a folder")
    return done


def _index(
    job: tuple[Path, ShardInfo | None, bool], *, index_dir: Path | None
) -> tuple[ShardTable, bool, list[dict[str, str]]]:
    """Returns the table of one tar, True if it was written, and the clips that do not open."""
    tar, entry, hashed = job
    if entry is not None and tar.stat().st_size != entry.bytes:
        raise UserError(
            f"{tar} has {tar.stat().st_size} bytes, its manifest.json says {entry.bytes}: "
            f"copy it again"
        )
    table = load_table(tar, index_dir)
    written = table is None or (entry is not None and table.sha256 not in ("", entry.sha256))
    sha256 = entry.sha256 if entry else "" if table is None or written else table.sha256
    if (hashed and not sha256) or (sha256 and table is None):
        with tar.open("rb") as file:
            now, written = hashlib.file_digest(file, "sha256").hexdigest(), True
        if sha256 not in ("", now):
            raise UserError(
                f"{tar} was changed since its manifest.json was written: copy it again, or remove "
                f"the manifest"
            )
        sha256 = now
    if table is None:
        table = scan(tar, probe=True)
    else:
        written |= ask_clips(tar, table.clips) > 0
    table.sha256 = sha256 or table.sha256
    if written:
        place = table_places(tar, index_dir)[-1]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            table.save(place)
        except OSError as error:
            raise UserError(_cannot_write(place.parent, error.strerror)) from error
    keys = table.key_list()
    unknown = (table.clips["frames"] < 0) | (table.clips["rate"] == 0)
    unreadable = []
    for i in np.flatnonzero(unknown).tolist():
        reason = f"{_why(tar, table, i)}; it stays in its shard and is skipped when read"
        unreadable.append({"key": keys[i], "file": tar.name, "reason": reason})
    return table, written, unreadable


def _why(tar: Path, table: ShardTable, i: int) -> str:
    size, offset = int(table.clips["size"][i]), int(table.clips["offset"][i])
    with tar.open("rb") as file:
        try:
            info = read_header(os.pread(file.fileno(), size, offset))
        except DecodeError as error:
            return f"{error.kind}: {error}"
    return f"empty: {info.frames} frames"


def _left_out(tar: Path, table: ShardTable) -> list[dict[str, str]]:
    return [
        {"key": sample_key(name), "file": f"{tar.name}/{name}", "reason": reason}
        for name, reason in table.left_out.items()
    ]


def _write_manifests(
    done: Indexed,
    tars: Sequence[Path],
    tables: Sequence[ShardTable],
    entries: Sequence[list[dict[str, str]]],
    manifests: dict[Path, Manifest | None],
) -> None:
    """Write ``manifest.json`` to each folder that has none; one vocabulary for all."""
    given = [m.vocabulary for m in manifests.values() if m and m.vocabulary]
    vocabulary = joint_vocabulary(tables, given)
    for folder, manifest in manifests.items():
        if manifest is not None:
            continue
        if (folder / "manifest.json").exists():
            done.notes.append(f"{folder / 'manifest.json'} is another program's: left as it is")
            continue
        mine = [k for k, tar in enumerate(tars) if tar.parent == folder]
        counts = Counts(vocabulary)
        for k in mine:
            counts.add(tars[k].name, tables[k])
        digest = hashlib.sha256("\n".join(tables[k].sha256 for k in mine).encode())
        left_out = [entry for k in mine for entry in entries[k]]
        counts.manifest(left_out=left_out, source=digest.hexdigest()).save(folder)
        done.manifests.append(folder / "manifest.json")


def _cannot_write(folder: Path, why: str | None) -> str:
    return f"{folder} cannot be written ({why}): give --index-dir FOLDER for the tables"
