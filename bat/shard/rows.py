"""Opens a source of any supported layout as rows: detects it, reads its clips and labels.

``open_rows`` detects the layout of a source, reads it with its module of ``bat.tasks`` (foreign
shards are read here) and names the labels. Layouts are tested in this order:

==========  ============================================================================
shards      ``.tar``: in the folder or its sub-folders (then these are the splits), a tar, a glob
audioset    ``*_segments.csv``: in the folder, or the file itself
eat         ``X.tsv`` with ``path<TAB>samples`` lines: in the folder, or the file itself
parquet     ``.parquet``: in the folder or up to two levels below, the file itself, a glob
esc50 ...   ``meta.csv`` or ``meta/esc50.csv`` beside ``audio/``, with the published classes
csv         a ``.csv``
folder      any other folder
==========  ============================================================================
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bat.errors import UserError
from bat.shard import shard_rows
from bat.tasks import audioset, eat, folder, parquet
from bat.tasks.base import LeftOut, Reading, Row, load_task
from bat.tasks.labels import Labels, doubts, held_out_alone, labels_of, named
from bat.tasks.tables import read_csv


@dataclass(frozen=True)
class Rows:
    """The clips of a source."""

    rows: list[Row]
    vocabulary: list[str]
    """Class names in the order of their indices; of the whole source, whatever ``split``."""
    kind: str
    """``folder, csv, audioset, eat, parquet, shards``, or the task that read it."""
    notes: list[str]
    """Notes for the user on how it was read."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Clips that the source lists and does not hold; only those of ``split`` if it is given."""


def open_rows(
    source: Path,
    *,
    task: str | None = None,
    labels: Path | None = None,
    split: str | None = None,
) -> Rows:
    """Returns the clips of ``source``, in its own order, with unique keys.

    Args:
        task: a task or dotted import path (see ``bat.tasks.base``), or ``csv`` or ``shards``;
            None: detected, see ``detect``.
        labels: a file that names the classes (``bat.tasks.labels``): the labels of the source are
            its names, mids or numbers, and the vocabulary is its own.
        split: only the clips of this split; None: all.

    Raises:
        UserError: nothing found, nothing readable, an unknown label or split, a duplicate key.
    """
    if not source.exists():
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(source)):
            raise UserError(f"{str(source)!r} is not a path of this machine: download it first")
        if not glob.has_magic(str(source)) and "{" not in str(source):
            raise UserError(f"{source} does not exist: give a folder, a CSV, parquet or shards")
    kind = detect(source) if task is None else task
    names = labels_of(labels) if labels is not None else None
    if kind in _READERS:
        found = _READERS[kind](source, names, split)
        kind = "csv" if kind == "folder" and source.is_file() else kind
    else:
        found = load_task(kind).open(source)
        if names is not None:
            found = replace(named(found.rows, names, source), left_out=found.left_out)
    notes = found.notes + _layout_notes(source, kind, task) + doubts(found.vocabulary)
    notes += held_out_alone(found.rows) + _twin_names(found.rows)
    rows, left_out = found.rows, found.left_out
    for name in sorted({row.split for row in rows if row.split is not None}):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name, re.ASCII):
            raise UserError(
                f"{source}: split {name!r} cannot be the name of a folder: use letters, digits, "
                f"_, - and dots"
            )
    if split is not None:
        known = sorted({row.split for row in rows if row.split is not None})
        if split not in known and folder.split_of(split) in known:
            split = folder.split_of(split)  # the name of the folder's split
        rows = [row for row in rows if row.split == split]
        left_out = [entry for entry in left_out if entry.split in (None, split)]
        if not rows:
            raise UserError(
                f"{source} has no split {split!r}: it has {', '.join(known) or 'no splits'}"
            )
    if not rows:
        raise UserError(f"{source} holds no clips")
    return Rows(_unique(rows, source), found.vocabulary, kind, notes, left_out)


def detect(source: Path) -> str:
    """Detects the layout of ``source``; see the module docstring."""
    if not source.exists():  # a glob or braces
        return "parquet" if source.suffix == ".parquet" else "shards"
    if source.is_file() and source.suffix.lower() in (".tar", ".gz", ".tgz"):
        return "shards"
    held = _held(source) if source.is_dir() else set()
    if {"tar", "*/tar"} & held:
        return "shards"
    if audioset.segment_tables(source):
        return "audioset"
    if source.suffix.lower() == ".tsv" or eat.manifests(source):
        return "eat"
    if source.suffix.lower() == ".parquet" or {"parquet", "*/parquet", "*/*/parquet"} & held:
        return "parquet"
    return _published(source) or "folder"


def _held(root: Path) -> set[str]:
    """Returns where ``tar`` and ``parquet`` files lie: in ``root`` (``tar``), below (``*/tar``,
    ...)."""
    found = set()
    for place, names, files in os.walk(root, followlinks=True):  # two levels: links cannot loop
        depth = len(Path(place).relative_to(root).parts)
        names[:] = [n for n in names if not n.startswith(".")] if depth < 2 else []
        for suffix in ("tar", "parquet"):
            if any(n.endswith(f".{suffix}") and n[0] != "." for n in files):
                found.add("*/" * depth + suffix)
    return found


def _published(source: Path) -> str | None:
    """Returns the task whose published files lie in ``source``."""
    for meta in (source / "meta/esc50.csv", source / "meta.csv"):
        if meta.is_file() and (source / "audio").is_dir():
            try:
                lines = read_csv(meta, ())
            except UserError:  # a custom file
                return None
            found = {line.get("category", "") for line in lines}
            complete = all({"filename", "fold"} <= set(line) for line in lines)
            tasks = (n for n in ("esc50", "esc10") if found in load_task(n).label_sets)
            return next(tasks, None) if complete else None
    return None


def _layout_notes(source: Path, kind: str, task: str | None) -> list[str]:
    """Returns notes on label files in a folder that were found, or were not used."""
    if kind in ("esc50", "esc10") and task is None:
        return [f"labels and folds are those of task {kind}; --task folder reads it plainly"]
    if kind != "folder" or not source.is_dir():
        return []
    for name in ("meta/esc50.csv", "meta.csv"):
        if (source / name).is_file():
            return [f"{source / name} exists: --task esc50 or esc10 reads labels from it"]
    for path in sorted(source.glob("*.csv")):
        with path.open("rb") as file:
            columns = file.readline(1 << 12).decode("utf-8", "replace").strip("\ufeff\r\n ")
        if "path" in [column.strip() for column in columns.split(",")]:
            return [f"{path} lists files: give it as the source to read labels from it"]
    return []


def _twin_names(rows: list[Row]) -> list[str]:
    """Returns a note if keys differ only in Unicode form (an accent as a character of its own)."""
    keys: dict[str, str] = {}
    for row in rows:
        other = keys.setdefault(unicodedata.normalize("NFC", row.key), row.key)
        if other != row.key:
            return [f"clips {other!a} and {row.key!a} differ in Unicode form alone (NFC, NFD)"]
    return []


def _unique(rows: list[Row], source: Path) -> list[Row]:
    """Returns ``rows``; adds split and shard in front of a key that several files have."""
    count = Counter(row.key for row in rows)
    if len(count) == len(rows):
        return rows
    files: set[tuple[Any, ...]] = set()
    keys: set[str] = set()
    found = []
    for row in rows:
        if count[row.key] > 1:
            file = (row.path, row.span, row.cell, row.start_seconds)
            inside = row.span is not None or row.cell is not None
            parts = (row.split, row.path.stem if inside else None, row.key)
            key = "__".join(part for part in parts if part)
            if file in files or key in keys:
                raise UserError(
                    f"{row.key!r} is listed twice in {source}: keep one of them, or choose one "
                    f"split with --split"
                )
            files.add(file)
            keys.add(key)
            row = replace(row, key=key)
        found.append(row)
    return found


def _parquet(source: Path, labels: Labels | None, split: str | None) -> Reading:
    if source.exists():
        return parquet.read(source, labels)
    paths = [Path(path) for path in sorted(glob.glob(str(source)))]
    if not paths:
        raise UserError(f"no parquet file at {source}")
    return parquet.read(source, labels, paths=paths)


_READERS: dict[str, Callable[[Path, Labels | None, str | None], Reading]] = {
    "shards": lambda source, labels, split: shard_rows.read(source, labels),
    "audioset": lambda source, labels, split: audioset.read(source, labels),
    "eat": lambda source, labels, split: eat.read(source, labels, split=split),
    "parquet": _parquet,
    "folder": lambda source, labels, split: folder.read(source, labels),
    "csv": lambda source, labels, split: folder.read(source, labels),
}
