"""Opens a source of any supported layout as rows: detects it, reads its clips and labels.

``open_rows`` detects the layout of a source, reads it with its module of ``bat.tasks`` (shards are
read here) and names the labels. Layouts are tested in this order:

==========  ============================================================================
shards      ``.tar``: in the folder or its sub-folders (then these are the splits), a tar, a glob
audioset    ``*_segments.csv``: in the folder, or the file itself
hsn ...     ``HSN_metadata_train.parquet`` (BirdSet): in the folder, before shards
eat         ``X.tsv`` with ``path<TAB>samples`` lines: in the folder, or the file itself
parquet     ``.parquet``: in the folder or up to two levels below, the file itself, a glob
esc50 ...   ``meta.csv`` or ``meta/esc50.csv`` beside ``audio/``, with the published classes
scv2 ...    what ``Task.layout`` names, of a task of ``bat.tasks``: in the folder
csv         a ``.csv``
folder      any other folder
==========  ============================================================================
"""

from __future__ import annotations

import glob
import math
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bat import registry
from bat.data.clip_json import parse_labels
from bat.data.manifest import Manifest, joint_vocabulary, label_pairs
from bat.data.sources import find
from bat.data.table import read_contents, tabulate
from bat.data.tar import escape_key, sample_key
from bat.errors import UserError
from bat.io import missing
from bat.tasks import audioset, birdset, eat, folder, parquet
from bat.tasks.base import LeftOut, Reading, Row, load_task
from bat.tasks.labels import Labels, doubts, held_out_alone, labels_of, named
from bat.tasks.tables import read_csv

SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""A split that can be the name of a folder."""


@dataclass(frozen=True)
class Rows(Reading):
    """The clips of a source. ``vocabulary`` is that of the whole source, whatever ``split``;
    ``left_out`` is of ``split`` alone."""

    kind: str = ""
    """``folder, csv, audioset, eat, parquet, shards``, or the task that read it."""


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
            if re.match(r"(recipe|task|data\.\w+)=", str(source)):
                raise UserError(
                    f"{str(source)!r} is a setting of a run: say bat-shard DIR OUT, and --task "
                    "NAME where the task is not known by its files"
                )
            raise UserError(f"{missing(source)}: give a folder, a CSV, parquet or shards")
    kind = detect(source) if task is None else task
    found = _read(source, kind, labels_of(labels) if labels is not None else None, split)
    if kind == "folder" and source.is_file():
        kind = "csv"
    notes = found.notes + _layout_notes(source, kind, task) + doubts(found.vocabulary)
    notes += held_out_alone(found.rows) + _unicode_notes(found.rows)
    rows, left_out = found.rows, found.left_out
    splits = sorted({row.split for row in rows if row.split is not None})
    for name in splits:
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(
                f"{source}: split {name!r} cannot be the name of a folder: use letters, digits, "
                f"_, - and dots"
            )
    if split is not None:
        if split not in splits and folder.split_of(split) in splits:
            split = folder.split_of(split)  # the name of the folder's split
        rows = [row for row in rows if row.split == split]
        left_out = [entry for entry in left_out if entry.split in (None, split)]
        if not rows:
            known = ", ".join(splits) or "no splits"
            raise UserError(f"{source} has no split {split!r}: it has {known}")
    if not rows:
        raise UserError(f"{source} holds no clips")
    return Rows(_unique(rows, source), found.vocabulary, notes, left_out, kind)


def _read(source: Path, kind: str, labels: Labels | None, split: str | None) -> Reading:
    """Reads ``source`` as ``kind``; ``split`` spares EAT's manifests of other splits."""
    if kind == "shards":
        return _read_shards(source, labels)
    if kind == "audioset":
        return audioset.read(source, labels)
    if kind == "eat":
        return eat.read(source, labels, split=split)
    if kind in ("folder", "csv"):
        return folder.read(source, labels)
    if kind == "parquet":
        paths = None if source.exists() else [Path(p) for p in sorted(glob.glob(str(source)))]
        if paths == []:
            raise UserError(f"no parquet file at {source}")
        return parquet.read(source, labels, paths=paths)
    found = load_task(kind).open(source)
    if labels is None:
        return found
    return replace(named(found.rows, labels, source), left_out=found.left_out)


def detect(source: Path) -> str:
    """Detects the layout of ``source``; see the module docstring."""
    if not source.exists():  # a glob or braces
        return "parquet" if source.suffix == ".parquet" else "shards"
    if source.is_file() and source.suffix.lower() in (".tar", ".gz", ".tgz"):
        return "shards"
    bird_set = birdset.set_in(source)  # its shards beside it are no WebDataset
    if bird_set is not None:
        return bird_set
    depths = _depths(source) if source.is_dir() else set()
    if {("tar", 0), ("tar", 1)} & depths:
        return "shards"
    if audioset.segment_tables(source):
        return "audioset"
    if source.suffix.lower() == ".tsv" or eat.manifests(source):
        return "eat"
    if source.suffix.lower() == ".parquet" or any(suffix == "parquet" for suffix, _ in depths):
        return "parquet"
    return _published(source) or "folder"


def _depths(root: Path) -> set[tuple[str, int]]:
    """Returns ``(suffix, folders below root)`` of the ``tar`` and ``parquet`` files, to depth 2."""
    found = set()
    for place, names, files in os.walk(root, followlinks=True):  # two levels: links cannot loop
        depth = len(Path(place).relative_to(root).parts)
        names[:] = [n for n in names if not n.startswith(".")] if depth < 2 else []
        for suffix in ("tar", "parquet"):
            if any(n.endswith(f".{suffix}") and n[0] != "." for n in files):
                found.add((suffix, depth))
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
    if source.is_dir():
        for name in registry.known("tasks"):
            layout = load_task(name).layout
            if layout and all(source.absolute().match(p) or any(source.glob(p)) for p in layout):
                return name
    return None


def _layout_notes(source: Path, kind: str, task: str | None) -> list[str]:
    """Returns notes on label files in a folder that were found, or were not used."""
    by_layout = kind != "shards" and (kind in ("esc50", "esc10") or load_task(kind).layout)
    if task is None and by_layout:
        return [f"labels and splits are those of task {kind}; --task folder reads it plainly"]
    if kind != "folder":
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


def _unicode_notes(rows: list[Row]) -> list[str]:
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
    files: set[tuple[object, ...]] = set()
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


def _read_shards(source: Path, labels: Labels | None) -> Reading:
    """Returns the clips of local WebDataset shards, each a span of its tar.

    From a clip's JSON it reads the labels (``parse_labels``), ``mid``, ``id``, ``fold``, ``split``,
    ``start_seconds``, ``events``, ``text``; other fields are dropped.

    Raises:
        UserError: no shards, no audio in them, an unknown label, manifests that disagree.
    """
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    tables = []
    shards = [(Path(shard.place), folder.split_of(shard.split) or None) for shard in find(source)]
    for tar, split in shards:
        contents = read_contents(tar)
        tables.append(tabulate(contents))
        left_out += [
            LeftOut(sample_key(name), f"{tar.name}/{name}", why, split)
            for name, why in contents.left_out.items()
        ]
        for key, (member, suffix) in contents.audio.items():
            row = _row_of(contents.metas.get(key, {}), key, split)
            span = (member.offset, member.size)
            rows.append(replace(row, path=tar, span=span, codec=suffix))
    if not rows:
        raise UserError(f"{source}: its {len(shards)} shards hold no audio")
    found = named(rows, labels, shards[0][0].parent)
    if found.rows is rows:  # the names are those of the shards
        manifests = [Manifest.load(place) for place in dict.fromkeys(t.parent for t, _ in shards)]
        given = [m.vocabulary for m in manifests if m is not None and m.vocabulary]
        found = replace(found, vocabulary=joint_vocabulary(label_pairs(tables), given))
    reasons = Counter(entry.reason for entry in left_out).most_common()
    notes = [f"{n} members of the shards left out: {reason}" for reason, n in reasons]
    return replace(found, notes=notes + found.notes, left_out=left_out)


def _row_of(meta: dict[str, Any], key: str, split: str | None) -> Row:
    """Returns a row with the fields of a clip's JSON, those of another type left away."""
    name, fold, mids = meta.get("id"), meta.get("fold"), meta.get("mid")
    labels = tuple(label for label, _ in parse_labels(meta))
    mids = tuple(x for x in (mids if isinstance(mids, list) else [mids]) if isinstance(x, str))
    start = meta.get("start_seconds", 0.0)
    if not isinstance(start, (int, float)) or not math.isfinite(start) or start < 0:
        start = 0.0
    return Row(
        path=Path(),
        key=name if isinstance(name, str) and escape_key(name) == key else key,
        labels=labels,
        fold=fold if isinstance(fold, int) and 0 <= fold < 1 << 15 else None,
        split=meta["split"] if isinstance(meta.get("split"), str) else split,
        start_seconds=float(start),
        mids=mids if len(mids) == len(labels) else (),
        events=tuple(meta["events"]) if "events" in meta else None,
        text=meta.get("text"),
    )
