"""Reads parquet files with the audio inside, as on the Hugging Face hub (docs/data.md).

Columns: ``audio`` (bytes, or a struct with ``bytes`` and optionally ``path``); ``labels``,
``label`` or ``label_id`` (names, mids or numbers, one or a list); where labels are mids,
``human_labels`` are their names; ``text`` (a transcript); a key from ``id``, ``video_id``, ``key``,
``filename``; optionally ``fold`` and ``split``. Others are not read. Numbers are named by the
ClassLabel that the hub's own libraries write into the schema, or by a label file
(``bat.tasks.labels``).

A file called ``train-00000-of-00042.parquet``, or in a folder of its own (``data/eval/``), has
that split (``folder.SPLITS``: ``eval`` and ``validation`` are ``test`` and ``valid``).
Needs pyarrow: the extra ``parquet``.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, Reading, Row, Task
from bat.tasks.folder import find_files, split_of
from bat.tasks.labels import Labels, by_number, is_mid, labels_beside, named, names_of

LABELS = ("labels", "label", "label_id")
KEYS = ("id", "video_id", "key", "filename", "file_name", "name")
MAX_BATCH_BYTES = 32 << 20


def _pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'bat-audio[parquet]'") from error


def parquet_files(source: Path) -> list[Path]:
    """Returns ``source`` itself, or the ``.parquet`` files anywhere below it, sorted."""
    if source.is_file():
        return [source] if source.suffix.lower() == ".parquet" else []
    return find_files(source, (".parquet",))[0]


def _audio_column(schema: Any, path: Path) -> str:
    """Returns the leaf column that holds the bytes: ``audio`` or ``audio.bytes``."""
    types = _pyarrow().types
    if "audio" not in schema.names:
        raise UserError(f"{path} lacks column 'audio'; it has: {', '.join(schema.names)}")
    kind = schema.field("audio").type
    leaf = "audio"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, leaf = kind.field("bytes").type, "audio.bytes"
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise UserError(f"{path}: column 'audio' is {kind}: encoded files (bytes) are read")
    return leaf


def _class_names(schema: Any, column: str | None) -> list[str] | None:
    """Returns names of a ClassLabel column, from the hub's own entry in the schema."""
    try:
        entry = json.loads((schema.metadata or {})[b"huggingface"])
        feature = entry["info"]["features"][column]
        for _ in range(4):  # a label, or a sequence of labels
            feature = feature[0] if isinstance(feature, list) else feature
            if feature.get("_type") == "ClassLabel":
                return [one_line(str(name)) for name in feature["names"]]
            feature = feature["feature"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _listed(value: Any) -> list[str]:
    """Returns a cell's labels as text; ``"/m/1,/m/2"`` is two."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        value = parts if all(map(is_mid, parts)) else [value.strip()]
    return [name for name in names_of(value) if name != "-1"]


def _sniff(data: bytes | None) -> str:
    """Returns the suffix for the first bytes of a file; empty: unknown."""
    head = (data or b"")[:64]
    if head[:4] == b"OggS":
        return "opus" if b"OpusHead" in head else "ogg"
    for magic, suffix in ((b"fLaC", "flac"), (b"RIFF", "wav"), (b"ID3", "mp3")):
        if head.startswith(magic):
            return suffix
    if head[4:8] == b"ftyp":
        return "m4a"
    return "mp3" if head[:1] == b"\xff" and head[1:2] >= b"\xe0" else ""


def _split(path: Path, source: Path) -> str | None:
    shard = re.fullmatch(r"([\w.]+?)-\d+-of-\d+(-[0-9a-f]+)?", path.stem, re.ASCII)
    if shard:
        return split_of(shard[1])
    folder = path.parent.name
    apart = source.is_dir() and path.parent != source and folder != "data"
    return split_of(folder) if apart else None


class Cells(NamedTuple):
    """A row, and the other cells that may name its labels."""

    row: Row
    numbers: list[str]
    """``label_id``"""
    human: list[str]
    """``human_labels``"""


def _read_file(path: Path, source: Path) -> tuple[list[Cells], list[str] | None]:
    """Returns the clips of one parquet file, and the names of its ClassLabel."""
    with _pyarrow().parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        leaf = _audio_column(schema, path)
        label = next((c for c in LABELS if c in schema.names), None)
        key = next((c for c in KEYS if c in schema.names), None)
        wanted = (label, key, "label_id", "human_labels", "fold", "split", "text")
        columns = [c for c in dict.fromkeys(wanted) if c in schema.names]
        if leaf != "audio" and schema.field("audio").type.get_field_index("path") >= 0:
            columns.append("audio.path")
        classes = _class_names(schema, label)
        codec = _sniff(read_cell(path, 0, 0)) if file.metadata.num_rows else ""
        split = _split(path, source)
        found = []
        for group in range(file.num_row_groups):
            table: list[dict[str, Any]] = [{}] * file.metadata.row_group(group).num_rows
            if columns:
                table = file.read_row_group(group, columns=columns).to_pylist()
            for i, cells in enumerate(table):
                labels = _listed(cells.get(label or ""))
                if classes is not None:
                    labels = [_class(classes, number, path) for number in labels]
                inner = Path(str((cells.get("audio") or {}).get("path") or ""))
                suffix, fold = inner.suffix[1:].lower(), cells.get("fold")
                name = cells.get(key or "")
                row = Row(
                    path=path,
                    key=str(name or inner.stem or f"{path.stem}-{group}-{i}"),
                    labels=tuple(dict.fromkeys(labels)),
                    fold=fold if isinstance(fold, int) else None,
                    split=str(cells.get("split") or "") or split,
                    cell=(group, i),
                    codec=suffix if suffix in (*AUDIO_SUFFIXES, *UNDECODED_SUFFIXES) else codec,
                    text=text if isinstance(text := cells.get("text"), str) else None,
                )
                numbers, human = _listed(cells.get("label_id")), _listed(cells.get("human_labels"))
                found.append(Cells(row, numbers, human))
    return found, classes


def _class(classes: list[str], number: str, path: Path) -> str:
    if not number.isdecimal() or int(number) >= len(classes):
        raise UserError(f"{path}: label {number} is not among its {len(classes)} classes")
    return classes[int(number)]


def _by_human_labels(found: list[Cells]) -> list[Row] | None:
    """Returns rows with mids named by ``human_labels``; None if these do not match one to one."""
    names: dict[str, str] = {}
    for row, _, human in found:
        if len(row.labels) != len(human):
            return None
        for mid, name in zip(row.labels, human, strict=True):
            if not is_mid(mid) or names.setdefault(mid, name) != name:
                return None
    if not names or len(set(names.values())) < len(names):
        return None
    return [replace(row, labels=tuple(human), mids=row.labels) for row, _, human in found]


def read(
    source: Path, labels: Labels | None = None, *, paths: Sequence[Path] | None = None
) -> Reading:
    """Returns the clips of a parquet file, of all below a folder, or of ``paths``; reads no audio.

    Raises:
        UserError: pyarrow missing, no parquet, a damaged one, no audio column, an unknown label.
    """
    paths = parquet_files(source) if paths is None else paths
    if not paths:
        raise UserError(f"{source} has no .parquet file")
    arrow, classes = _pyarrow(), []
    found: list[Cells] = []
    for path in paths:
        try:
            cells, names = _read_file(path, source)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file ({error})") from error
        found += cells
        classes.append(names)
    rows = [cells.row for cells in found]
    folder = source if source.is_dir() else source.parent
    if labels is None and labels_beside(folder) is None:
        rows = _by_human_labels(found) or rows
    reading = named(rows, labels, folder)
    if labels is not None:
        return reading
    order = classes[0]
    if order is None or any(names != order for names in classes):
        numbered = [cells for cells in found if len(cells.row.labels) == len(cells.numbers)]
        pairs = [zip(c.row.labels, map(int, c.numbers), strict=True) for c in numbered]
        order = by_number({pair for several in pairs for pair in several})
    fits = order is not None and set(reading.vocabulary) <= set(order)
    return replace(reading, vocabulary=order) if order and fits else reading


def read_columns(
    path: Path, columns: Sequence[str], *, label: str
) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Returns the rows of some columns of a table, and the names of the ClassLabel ``label``.

    Raises:
        UserError: pyarrow missing, a damaged file, a column that it lacks.
    """
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            missing = [name for name in columns if name not in schema.names]
            if missing:
                has = ", ".join(schema.names)
                raise UserError(f"{path} lacks column {missing[0]!r}; it has: {has}")
            return file.read(columns=list(columns)).to_pylist(), _class_names(schema, label)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


class _Cells:
    """The cells of one row group, read in parts: memory for ``MAX_BATCH_BYTES`` or one cell."""

    def __init__(self, path: Path, group: int) -> None:
        self.arrow = _pyarrow()
        self.at, self.batch = 0, None
        self.file = self.arrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        leaf = _audio_column(self.file.schema_arrow, path)
        info = self.file.metadata.row_group(group)
        sizes = [info.column(i) for i in range(info.num_columns)]
        total = sum(c.total_uncompressed_size for c in sizes if c.path_in_schema == leaf)
        step = max(1, min(1024, MAX_BATCH_BYTES * info.num_rows // max(1, total)))
        self.batches = self.file.iter_batches(step, [group], [leaf], use_threads=False)

    def get(self, row: int) -> bytes | None:
        while self.batch is None or row >= self.at + len(self.batch):
            self.at += 0 if self.batch is None else len(self.batch)
            self.batch = next(self.batches).column(0)
        cell = self.batch[row - self.at].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell

    def close(self) -> None:
        self.file.close()


_cells: dict[tuple[int, Path, int], _Cells] = {}
"""One open row group of this process (its id is in the key, so a fork opens its own)."""


def read_cell(path: Path, group: int, row: int) -> bytes | None:
    """Reads the audio of one cell; None if it is null. Fast for rows in ascending order.

    Raises:
        OSError: missing, damaged, or no such cell.
        UserError: pyarrow missing, or no audio column.
    """
    arrow, place = _pyarrow(), (os.getpid(), path, group)
    try:
        if place not in _cells or row < _cells[place].at:
            while _cells:
                _cells.popitem()[1].close()
            _cells[place] = _Cells(path, group)
        return _cells[place].get(row)
    except (arrow.ArrowException, StopIteration, IndexError) as error:
        _cells.clear()
        raise OSError(errno.EIO, f"no cell {row} of row group {group}: {error}") from error


TASK = Task(name="parquet", rows=read, target="class", adapts=True)
