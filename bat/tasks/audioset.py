"""AudioSet (Gemmeke et al. 2017): 527 classes, multi-label, clips of 10 s.

The folder holds AudioSet's own files as they are downloaded: one or more segments CSVs
(``*_segments.csv``: comment lines, then ``YTID, start_seconds, end_seconds, "mid,mid"``),
``class_labels_indices.csv`` (``index,mid,display_name``: names and the official order) and the
clips, anywhere below: ``YTID.ext``, ``YYTID.ext`` or either with ``_START`` (seconds, or
milliseconds as some downloaders write) before the suffix. Segments without a file are left out
(much of AudioSet is gone); none at all is an error.

Split: ``test`` for rows of ``eval_segments.csv``, ``train`` for the others.
"""

from __future__ import annotations

import csv
from pathlib import Path

from bat.shapes import UserError
from bat.tasks.base import Row, Task, read_csv, whole_number
from bat.tasks.folder import find_audio


def class_table(root: Path) -> dict[str, str]:
    """``{mid: display name}`` in the official order."""
    path = root / "class_labels_indices.csv"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: put AudioSet's class_labels_indices.csv beside its segments "
            f"(it is on AudioSet's download page)"
        )
    lines = read_csv(path, ("index", "mid", "display_name"))
    lines.sort(key=lambda line: whole_number(line["index"], column="index", path=path))
    table = {line["mid"]: line["display_name"] for line in lines}
    if len(set(table.values())) != len(lines):
        raise UserError(f"{path} lists a mid or a name twice: download it again")
    return table


def vocabulary(root: Path) -> list[str]:
    return list(class_table(root).values())


def read_segments(path: Path) -> list[tuple[str, float, list[str]]]:
    """``[(YTID, start_seconds, mids), ...]`` of a segments CSV."""
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.reader(file, skipinitialspace=True):
            if not line or line[0].startswith("#"):
                continue
            try:
                name, start, _end, mids = line
                found.append((name, float(start), [m.strip() for m in mids.split(",")]))
            except ValueError:
                raise UserError(
                    f"{path}: {','.join(line)!r} is not 'YTID, start, end, \"mid,mid\"'"
                ) from None
    return found


def rows(root: Path) -> list[Row]:
    tables = sorted(root.glob("*_segments.csv"))
    if not tables:
        raise UserError(
            f"{root} has no *_segments.csv: put balanced_train_segments.csv, "
            f"eval_segments.csv or unbalanced_train_segments.csv there"
        )
    names = class_table(root)
    files: dict[str, Path] = {}
    for path in find_audio(root):
        files.setdefault(path.stem, path)
    found: dict[str, Row] = {}
    listed = 0
    for table in tables:
        split = "test" if table.name.startswith("eval") else "train"
        for name, start, mids in read_segments(table):
            listed += 1
            unknown = [m for m in mids if m not in names]
            if unknown:
                raise UserError(f"{table}: mid {unknown[0]!r} is not in class_labels_indices.csv")
            tails = ("", f"_{start:g}", f"_{start:.3f}", f"_{round(start * 1000)}")
            stems = (f"{y}{name}{tail}" for tail in tails for y in ("Y", ""))
            stem = next((s for s in stems if s in files), None)
            if stem is not None and f"Y{name}" not in found:
                found[f"Y{name}"] = Row(
                    path=files[stem],
                    key=f"Y{name}",
                    labels=tuple(names[m] for m in mids),
                    split=split,
                    start_seconds=start,
                    mids=tuple(mids),
                )
    if not found:
        raise UserError(
            f"none of the {listed} segments of {root} has an audio file below it: clips are "
            f"called YTID.ext, YYTID.ext or YTID_START.ext"
        )
    return list(found.values())


TASK = Task(
    name="audioset",
    rows=rows,
    multi_label=True,
    loss="asl",
    metric="map",
    frames=1024,
    classes=527,
    vocabulary=vocabulary,
)
