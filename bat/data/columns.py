"""Gathers the tables of shards into the columns of an index: arrays in memory, or mapped files.

A large index is written once, to a folder of raw arrays (``offset.bin``, ...) and a ``head.json``;
every process of the machine then maps these files. Opening them takes the same time for any number
of clips, and their pages belong to the page cache, which all processes share. The folder appears
whole: it is written under another name, flushed and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from bat.data.sources import Shard, names_of
from bat.data.table import ShardTable
from bat.errors import UserError
from bat.io import replacing, write_json

MAX_MEMORY_BYTES = 1 << 26
"""Bytes of columns that are held in memory: about a million clips; more are mapped."""
PIECE = 1 << 18
"""Rows that are looked at together where a column is gone through."""
OF_TABLES = ("offset", "size", "frames", "rate", "codec", "fold", "header")
"""Columns that are fields of ``bat.data.table.CLIP``."""
HASHED = (
    *("key_bytes", "key_ptr", "size", "frames", "rate", "fold"),
    *("split", "label_ids", "label_ptr", "starts"),
)
"""Arrays that are content; the others say where it lies."""
Columns = dict[str, np.ndarray]
log = logging.getLogger("bat")


class Mapped(NamedTuple):
    """An array in a file, which is mapped anew where it is sent to another process."""

    path: Path
    dtype: str
    rows: int

    def open(self) -> np.ndarray:
        if not self.rows:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(self.path, self.dtype, "r", shape=(self.rows,)))


def portable(value: Any) -> Any:
    """Returns ``value``, or the ``Mapped`` that it was opened from."""
    base = getattr(value, "base", None)
    if not isinstance(base, np.memmap) or base.shape != value.shape:
        return value
    return Mapped(Path(str(base.filename)), base.dtype.str, len(base))


def joined(pieces: Iterable[np.ndarray], *, beside: np.ndarray, name: str) -> np.ndarray:
    """Returns the concatenation of ``pieces`` int64; if the column ``beside`` is mapped, mapped
    too, from a file ``name`` in its folder that the first process writes."""
    column = portable(beside)
    if not isinstance(column, Mapped):
        return np.concatenate(list(pieces))
    path = column.path.with_name(f"{name}.bin")
    if not path.exists():
        try:
            with replacing(path) as part, part.open("wb") as file:
                for piece in pieces:
                    file.write(piece.data)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): make room there, or set data.cache "
                "to a folder that you can write"
            ) from None
    return Mapped(path, "<i8", path.stat().st_size // 8).open()


class Writer:
    """Collects columns part by part, in memory up to ``MAX_MEMORY_BYTES``, then in files.

    Args:
        begin: called once before files are written; returns their folder, or None to go on in
            memory.
    """

    def __init__(self, begin: Callable[[], Path | None] = lambda: None) -> None:
        self.folder: Path | None = None
        self._begin: Callable[[], Path | None] | None = begin
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)
        self._written: dict[str, int] = defaultdict(int)
        self._bytes = 0

    def add(self, **columns: np.ndarray) -> None:
        """Append rows to some columns."""
        for name, values in columns.items():
            self._parts[name].append(np.ascontiguousarray(values))
            self._bytes += values.nbytes
        if self._bytes > MAX_MEMORY_BYTES and self._begin is not None:
            self.folder, self._begin = self._begin(), None
        if self._bytes > MAX_MEMORY_BYTES and self.folder is not None:
            self._write(self.folder)

    def _write(self, folder: Path) -> None:
        for name, parts in self._parts.items():
            with (folder / f"{name}.bin").open("ab") as file:
                for part in parts:
                    file.write(part.data)
                    self._written[name] += len(part)
            parts[:] = [parts[0][:0].copy()]  # keeps the type
        self._bytes = 0

    def finish(self) -> Columns:
        """Returns the columns, which may still be changed."""
        if self.folder is None:
            return {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._write(self.folder)
        types = {name: parts[0].dtype for name, parts in self._parts.items()}
        return {
            name: np.memmap(self.folder / f"{name}.bin", types[name], "r+", shape=(rows,))
            if rows
            else np.empty(0, types[name])
            for name, rows in self._written.items()
        }


def gather(
    shards: Sequence[Shard],
    sources: Sequence[int],
    tables: Iterable[ShardTable],
    *,
    vocabulary: Callable[[set[tuple[str, int]]], list[str]] | None,
    writer: Writer,
) -> tuple[dict[str, Any], Columns]:
    """Returns what is said of a data set as a whole, and its columns (see ``Index``).

    Args:
        sources, tables: of each of ``shards``. One table is held at a time.
        vocabulary: returns the class names from the (name, number) of all labels; None: the labels
            are dropped, with events and texts.
    """
    head: dict[str, Any] = {"vocabulary": [], "left_out": {}, "events": {}, "texts": {}}
    labels: dict[str, int] = {}
    pairs: set[tuple[str, int]] = set()
    splits: dict[str, int] = {}
    occur: set[int] = set()
    clips_before = labels_before = keys_before = most = 0
    zero = np.zeros(1, np.int64)
    writer.add(key_ptr=zero, label_ptr=zero, label_ids=np.empty(0, np.int32))
    each = zip(names_of(shards), shards, sources, tables, strict=True)
    for number, (name, shard, source, table) in enumerate(each):
        clips, count = table.clips, len(table.clips)
        head["left_out"] |= {f"{name}/{member}": why for member, why in table.left_out.items()}
        listed = [*table.splits, shard.split]  # the sub-folder where a clip's JSON names none
        to_all = np.array([splits.setdefault(name, len(splits)) for name in listed], np.int16)
        split = to_all[clips["split"]]  # -1: the last
        occur.update(np.unique(split).tolist())
        writer.add(
            shard=np.full(count, number, np.int32),
            source=np.full(count, source, np.int16),
            split=split,
            key_bytes=table.keys,
            key_ptr=keys_before + np.cumsum(clips["key"], dtype=np.int64),
            shard_bytes=np.array([table.tar_bytes], np.int64),
            **{field: clips[field] for field in OF_TABLES},
        )
        keys_before += len(table.keys)
        if vocabulary is None:
            writer.add(label_ptr=np.zeros(count, np.int64))
        else:
            pairs.update(zip(table.names, table.ids, strict=True))
            to_all = np.array([labels.setdefault(n, len(labels)) for n in table.names], np.int32)
            writer.add(
                label_ids=to_all[table.labels],
                label_ptr=labels_before + np.cumsum(clips["labels"], dtype=np.int64),
            )
            labels_before += len(table.labels)
            most = max(most, int(clips["labels"].max(initial=0)))
            keys = table.key_list() if table.events or table.texts else ()
            for i, key in enumerate(keys, start=clips_before):
                if key in table.events:
                    head["events"][i] = table.events[key]
                if key in table.texts:
                    head["texts"][i] = table.texts[key]
        clips_before += count
    columns = writer.finish()
    head["splits"] = sorted(name for name, i in splits.items() if name and i in occur)
    head["most_labels"] = most
    _renumber(columns["split"], splits, head["splits"])
    if vocabulary is not None:
        head["vocabulary"] = vocabulary(pairs)
        _renumber(columns["label_ids"], labels, head["vocabulary"])
    return head, columns


def _renumber(column: np.ndarray, numbers: dict[str, int], names: Sequence[str]) -> None:
    """Replace the ``numbers`` of names in ``column`` by their places in ``names``; others by -1."""
    places = {name: i for i, name in enumerate(names)}
    to = np.array([places.get(name, -1) for name in numbers], column.dtype)
    for start in range(0, len(column), PIECE):
        column[start : start + PIECE] = to[column[start : start + PIECE]]


def content_hash(found: dict[str, Any]) -> str:
    """Returns a hash of the content of an index, given its head and columns by name."""
    names = "\0".join([*found["vocabulary"], "", *found["splits"]])
    digest = hashlib.sha256(names.encode())
    for name in HASHED:
        if found.get(name) is not None:
            digest.update(np.ascontiguousarray(found[name]).data)
    return digest.hexdigest()


def shared(
    cache: Path | None,
    name: str,
    *,
    state: Callable[[], str],
    make: Callable[[Writer], tuple[dict[str, Any], Columns]],
) -> tuple[dict[str, Any], Columns]:
    """Returns what ``make(writer)`` returns; mapped from ``cache`` if it is large.

    One process makes a large index while the others wait; where ``cache`` cannot be written each
    holds it in memory.

    Args:
        name: of the data set; files in ``cache`` begin with it.
        state: returns what the index depends on, as it is now. That of another state is replaced.
    """
    if cache is None:
        return make(Writer())
    if found := load(cache / f"{name}-{state()}"):
        return found
    lock, part = FileLock(cache / f"{name}.lock"), cache / f"{name}.tmp"

    def begin() -> Path | None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            if load(cache / f"{name}-{state()}"):
                raise _MadeMeanwhile
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): each process holds the index in its memory; set "
                "data.cache to another folder",
                cache,
                error.strerror,
            )
            return None
        log.info("writing the index to %s, once", cache)
        return part

    writer = Writer(begin)
    try:
        head, columns = make(writer)
        if writer.folder is None:
            return head, columns
        _save(part, head | {"hash": content_hash(head | columns)}, columns)
        for old in cache.glob(f"{name}-*"):
            shutil.rmtree(old)
        os.rename(part, cache / f"{name}-{state()}")
    except _MadeMeanwhile:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{cache} has no room for the index of the shards, about a hundred bytes a clip: make "
            "room there, or set data.cache to another disk"
        ) from None
    finally:
        if writer.folder is not None:
            shutil.rmtree(part, ignore_errors=True)
        lock.release()
    found = load(cache / f"{name}-{state()}")
    if found is None:
        raise UserError(f"{cache}: the index was removed or its shards changed meanwhile: retry")
    return found


class _MadeMeanwhile(Exception):  # noqa: N818
    """Another process has made the index."""


def _save(folder: Path, head: dict[str, Any], columns: Columns) -> None:
    """Complete ``folder``, in which a ``Writer`` has written ``columns``, on the disk."""
    for name, column in columns.items():
        if isinstance(column, np.memmap):
            column.flush()
        with (folder / f"{name}.bin").open("ab") as file:
            os.fsync(file.fileno())
    types = {name: [column.dtype.str, len(column)] for name, column in columns.items()}
    write_json(folder / "head.json", head | {"columns": types})


def load(folder: Path) -> tuple[dict[str, Any], Columns] | None:
    """Opens what ``save`` wrote to ``folder``; None if it is not there or not whole."""
    try:
        head = json.loads((folder / "head.json").read_bytes())
        columns = {
            name: Mapped(folder / f"{name}.bin", dtype, rows).open()
            for name, (dtype, rows) in head.pop("columns").items()
        }
    except (OSError, ValueError):
        return None
    for name in ("events", "texts"):  # JSON has no numbers as keys
        head[name] = {int(i): value for i, value in head[name].items()}
    return head, columns
