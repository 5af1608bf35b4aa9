"""AudioSet (Gemmeke et al. 2017): 527 classes, multi-label, clips of 10 s.

The folder holds AudioSet's own files as they are downloaded: one or more segments CSVs
(``*_segments.csv``: comment lines, then ``YTID, start_seconds, end_seconds, "mid,mid"``), the names
of the classes and the clips, anywhere below: ``YTID.ext``, ``YYTID.ext`` or either with ``_START``
(seconds, or milliseconds as some downloaders write) before the suffix. Segments without a file are
left out and listed (much of AudioSet is no longer available); no file at all is an error.
``bat-shard`` also writes which clips are damaged or shorter than their segment.

Names: ``class_labels_indices.csv`` (``index,mid,display_name``), which has the official order; with
``ontology.json`` alone the classes are those that the segments name, sorted.

Split: ``train-balanced`` for ``balanced_train_segments.csv``, ``train-unbalanced`` for
``unbalanced_train_segments.csv``, ``test`` for ``eval_segments.csv``, NAME for
``NAME_segments.csv``. A clip that two tables list has the split of the first by name (with a note).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import LeftOut, Reading, Row, Task
from bat.tasks.folder import find_audio, split_of
from bat.tasks.labels import Labels, labels_beside
from bat.tasks.tables import csv_cells

NO_FILE = "no file"
"""Reason given for a segment that is left out."""


def read_segments(path: Path) -> list[tuple[str, float, float, list[str]]]:
    """Reads ``[(YTID, start_seconds, end_seconds, mids), ...]`` from a segments CSV."""
    found = []
    for number, line in csv_cells(path):
        if line[0].startswith("#"):
            continue
        try:
            name, start, end, mids = line
            found.append((name, float(start), float(end), [m.strip() for m in mids.split(",")]))
        except ValueError:
            raise UserError(
                f"{path} line {number}: {','.join(line)!r} is not 'YTID, start, end, \"mid,mid\"'"
            ) from None
    return found


def segment_tables(source: Path) -> list[Path]:
    """Returns the ``*_segments.csv`` of a folder, or the one given; empty if there is none."""
    if source.is_dir():
        return sorted(source.glob("*_segments.csv"))
    return [source] if source.name.endswith("_segments.csv") and source.is_file() else []


def split_of_table(path: Path) -> str:
    """Returns the split whose clips the segments CSV at ``path`` lists."""
    name = path.name.removesuffix("_segments.csv")
    if name in ("balanced_train", "unbalanced_train"):
        return f"train-{name.removesuffix('_train')}"
    return "test" if name.startswith("eval") else split_of(name)


def read(source: Path, labels: Labels | None = None) -> Reading:
    """Reads the clips of AudioSet's folder, or of one of its segments CSVs.

    Raises:
        UserError: no segments, none of their clips, no names, a mid without a name.
    """
    tables = segment_tables(source)
    root = source if source.is_dir() else source.parent
    if not tables:
        raise UserError(
            f"{root} has no *_segments.csv: put balanced_train_segments.csv, "
            f"eval_segments.csv or unbalanced_train_segments.csv there"
        )
    labels = labels or labels_beside(root)
    if labels is None or not labels.mids:
        raise UserError(
            f"{root / 'class_labels_indices.csv'} does not exist: put AudioSet's there, beside its "
            f"segments, or its ontology.json (both are on AudioSet's download page)"
        )
    files: dict[str, Path] = {}
    for path in find_audio(root)[0]:
        files.setdefault(path.stem, path)
    found: dict[str, Row] = {}
    absent: dict[str, LeftOut] = {}
    again: set[str] = set()
    met: set[str] = set()
    listed = 0
    for table in tables:
        split = split_of_table(table)
        for name, start, end, mids in read_segments(table):
            listed += 1
            met.update(mids)
            key = f"Y{name}"
            tails = ("", f"_{start:g}", f"_{start:.3f}", f"_{round(start * 1000)}")
            stems = (f"{y}{name}{tail}" for tail in tails for y in ("Y", ""))
            file = next((files[stem] for stem in stems if stem in files), None)
            if file is None:
                absent.setdefault(key, LeftOut(key, key, NO_FILE, split))
            elif key not in found:
                row = Row(file, key, tuple(mids), split=split, start_seconds=start)
                found[key] = replace(row, listed_seconds=max(0.0, end - start))
            elif found[key].split != split:
                again.add(key)
    if not found:
        raise UserError(
            f"none of the {listed} segments of {root} has an audio file below it: clips are "
            f"called YTID.ext, YYTID.ext or YTID_START.ext"
        )
    left_out = [entry for key, entry in absent.items() if key not in found]
    notes = []
    if left_out:
        notes.append(f"{len(left_out)} of {listed} segments have no audio file: left out")
    if again:
        first = found[min(again)]
        notes.append(
            f"{len(again)} clips are in two tables: they have the split of the first "
            f"({first.key}: {first.split})"
        )
    if not labels.numbers:
        notes.append(
            f"{labels.path.name} has no order of classes: they are the {len(met)} that the "
            f"segments name, sorted; class_labels_indices.csv has the official order"
        )
    rows = labels.translate(found.values())
    # classes of absent clips too
    classes = labels.translate([Row(tables[0], "", tuple(sorted(met)))])
    return Reading(rows, labels.vocabulary(classes), notes, left_out)


TASK = Task(
    name="audioset", rows=read, target="tags", loss="asl", frames=1024, classes=527, per_class=10
)
