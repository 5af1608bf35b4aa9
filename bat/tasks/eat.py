"""Reads manifests of EAT and SSLAM (fairseq's form), in which ``X.tsv`` lists the clips.

``X.tsv``: a line with the root of the clips, then ``path<TAB>samples`` each. ``X.lbl`` beside it:
``id<TAB>mid,mid``; without it the clips are unlabelled. The id is the path, with or without its
folders and its suffix. ``label_descriptors.csv`` beside them names the mids
(``bat.tasks.labels``). The split of a clip is the X that lists it: ``train``, ``eval``, ...

A root that does not exist here belongs to another machine: then the clips are searched for below
the manifest's own folder. The sample counts are not used: clips are measured when decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, Reading, Row, Task
from bat.tasks.folder import keys_of
from bat.tasks.labels import Labels, cell_names, named

MAX_LINE = 1 << 16


def manifests(source: Path) -> list[Path]:
    """Returns the ``.tsv`` files of a folder that are manifests, or the one given; may be empty."""
    tables = sorted(source.glob("*.tsv")) if source.is_dir() else [source]
    return [t for t in tables if t.suffix.lower() == ".tsv" and t.is_file() and _is_manifest(t)]


def _is_manifest(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            root, first = file.readline(MAX_LINE), file.readline(MAX_LINE).rstrip("\n").split("\t")
    except UnicodeDecodeError:
        return False
    known = (*AUDIO_SUFFIXES, *UNDECODED_SUFFIXES)
    return "\t" not in root and len(first) == 2 and Path(first[0]).suffix[1:].lower() in known


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error})") from error


def _labels_by_id(path: Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for line in _lines(path):
        name, tab, labels = line.partition("\t")
        if not tab:
            raise UserError(f"{path}: {line!r} is not 'id<TAB>mid,mid'")
        try:
            found[name.strip()] = cell_names(labels.strip(), ",")
        except ValueError as error:
            raise UserError(f"{path}: {name.strip()!r}: {error}") from None
    return found


def _rows_of_table(table: Path, notes: list[str]) -> list[Row]:
    lines = _lines(table)
    root = Path(next(lines, ""))
    names = [line.partition("\t")[0].strip() for line in lines]
    if not root.is_dir():
        notes.append(f"{table.name}: its root {root} is not here; looking below {table.parent}")
        root = table.parent
    lbl = table.with_suffix(".lbl")
    labels = _labels_by_id(lbl) if lbl.is_file() else None
    rows, unlabelled = [], 0
    for name, key in zip(names, keys_of(names), strict=True):
        base = name.rpartition("/")[2]
        ids = (name, os.path.splitext(name)[0], base, os.path.splitext(base)[0])
        label = next((labels[i] for i in ids if i in labels), None) if labels is not None else ()
        unlabelled += label is None
        rows.append(Row(path=root / name, key=key, labels=label or (), split=table.stem))
    if not any(row.path.is_file() for row in rows):
        raise UserError(
            f"none of the {len(rows)} files of {table} exists (the first: {rows[0].path}): write "
            f"the folder of the clips into its first line"
        )
    if unlabelled:
        first = next(row for row in rows if not row.labels)
        if unlabelled == len(rows):
            raise UserError(f"{lbl} has no line for any clip of {table.name}, as {first.name!r}")
        notes.append(f"{lbl.name} has no line for {unlabelled} of {len(rows)} clips: unlabelled")
    return rows


def read(source: Path, labels: Labels | None = None, *, split: str | None = None) -> Reading:
    """Reads the clips of a folder of manifests or of one ``X.tsv``; only those of ``split`` if
    given.

    Raises:
        UserError: no manifest, none of its files, damaged lines, an unknown label.
    """
    tables = manifests(source)
    if not tables:
        raise UserError(
            f"{source} is no EAT manifest: X.tsv holds a line with the root of the clips, then "
            f"'path<TAB>samples' each"
        )
    wanted = [table for table in tables if split in (None, table.stem)]
    if not wanted:
        known = ", ".join(table.stem for table in tables)
        raise UserError(f"{source} has no split {split!r}: it has {known}")
    notes: list[str] = []
    rows = [row for table in wanted for row in _rows_of_table(table, notes)]
    folder = source if source.is_dir() else source.parent
    found = named(rows, labels, folder)
    return replace(found, notes=notes + found.notes)


TASK = Task(name="eat", rows=read, target="tags", loss="asl", frames=1024)
