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
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from bat.audio.decode import DecodeError, probe
from bat.data.manifest import Counts, Manifest, ShardInfo, joint_vocabulary, label_pairs
from bat.data.table import ShardTable, ask_clips, load_table, scan, table_places
from bat.data.tar import sample_key
from bat.errors import UserError
from bat.shard.info import plain_shards
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
    from tqdm import tqdm

    tars = [Path(shard.place) for shard in plain_shards(source)]
    manifests = {folder: Manifest.load(folder) for folder in dict.fromkeys(t.parent for t in tars)}
    for folder in manifests if index_dir is None else ():
        if not os.access(folder, os.W_OK):
            raise _cannot_write(folder, "it is read-only")
    is_whole = source.is_dir() and index_dir is None
    entries = {f / shard.name: shard for f, m in manifests.items() if m for shard in m.shards}
    work = [(tar, entries.get(tar)) for tar in tars]
    index = partial(_index, index_dir=index_dir, hashed=is_whole)
    done, tables, left_out = Indexed(shards=len(tars)), {}, {}
    with closing(ordered_map(index, work, jobs=jobs)) as results:
        shown = tqdm(results, total=len(tars), unit="shard", disable=not progress)
        for tar, (table, is_new, unreadable) in zip(tars, shown, strict=True):
            tables[tar] = table
            done.clips += len(table.clips)
            done.written += is_new
            done.unreadable += unreadable
            left_out[tar] = unreadable + [
                {"key": sample_key(name), "file": f"{tar.name}/{name}", "reason": reason}
                for name, reason in table.left_out.items()
            ]
    if index_dir is not None:
        done.notes.append(f"no manifest.json: the tables are in {index_dir}, the shards untouched")
    elif not is_whole:
        done.notes.append("no manifest.json: these are not the whole of a folder")
    given = [m.vocabulary for m in manifests.values() if m and m.vocabulary]
    vocabulary = joint_vocabulary(label_pairs(tables.values()), given) if is_whole else []
    for folder, manifest in manifests.items() if is_whole else ():
        path = folder / "manifest.json"
        if manifest is None and path.exists():
            done.notes.append(f"{path} is another program's: left as it is")
        elif manifest is None:
            counts = Counts(vocabulary)
            mine = [tar for tar in tars if tar.parent == folder]
            for tar in mine:
                counts.add(tar.name, tables[tar])
            hashes = "\n".join(tables[tar].sha256 for tar in mine)
            counts.manifest(
                left_out=[entry for tar in mine for entry in left_out[tar]],
                source=hashlib.sha256(hashes.encode()).hexdigest(),
            ).save(folder)
            done.manifests.append(path)
    return done


def _index(
    work: tuple[Path, ShardInfo | None], *, index_dir: Path | None, hashed: bool
) -> tuple[ShardTable, bool, list[dict[str, str]]]:
    """Returns the table of one tar, True if it was written, and the clips that do not open.

    Args:
        work: the tar, and its entry in the manifest, with which it is compared.
        hashed: the table needs the tar's hash also if no manifest has it.
    """
    tar, entry = work
    if entry is not None and tar.stat().st_size != entry.bytes:
        size = tar.stat().st_size
        raise UserError(
            f"{tar} has {size} bytes, its manifest.json says {entry.bytes}: copy it again"
        )
    table = load_table(tar, index_dir)
    sha256, known = table.sha256 if table else "", entry.sha256 if entry else ""
    is_new = table is None
    if (known and sha256 != known) or (hashed and not sha256):
        is_new = True
        with tar.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if known not in ("", sha256):
            raise UserError(
                f"{tar} was changed since its manifest.json was written: copy it again, or remove "
                f"the manifest"
            )
    table = scan(tar) if table is None else table
    table.sha256 = sha256
    is_new |= ask_clips(tar, table.clips) > 0
    if is_new:
        place = table_places(tar, index_dir)[-1]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            table.save(place)
        except OSError as error:
            raise _cannot_write(place.parent, error.strerror) from error
    unknown = np.flatnonzero((table.clips["frames"] < 0) | (table.clips["rate"] == 0))
    return table, is_new, _unreadable(tar, table, unknown) if len(unknown) else []


def _unreadable(tar: Path, table: ShardTable, clips: np.ndarray) -> list[dict[str, str]]:
    entries, keys = [], table.key_list()
    with tar.open("rb") as file:
        for i in clips.tolist():
            size, offset = int(table.clips["size"][i]), int(table.clips["offset"][i])
            try:
                info = probe(os.pread(file.fileno(), size, offset))
                why = f"empty: {info.frames} frames"
            except DecodeError as error:
                why = f"{error.kind}: {error}"
            reason = f"{why}; it stays in its shard and is skipped when read"
            entries.append({"key": keys[i], "file": tar.name, "reason": reason})
    return entries


def _cannot_write(folder: Path, why: str | None) -> UserError:
    return UserError(f"{folder} cannot be written ({why}): give --index-dir FOLDER for the tables")
