"""Reads custom data: a CSV with a line a clip, or a line an event.

Columns; any other is an error, so that misspelt ones are noticed (``ALSO_CALLED`` lists accepted
synonyms):

=================  ===============================================================================
path               of the audio file, relative to the CSV, or absolute
label, or labels   one, unchanged; or several, separated by ``;``, or by ``,`` where the
                   column has no ``;``; either may be a list (``['dog', 'cat']``). Mids become
                   names where a label file lies beside the CSV. Or, without such a column, columns
                   of 0 and 1, a class each. If several are possible a clip may have none
fold, or split     optional: whole numbers; or train, test and valid (or synonyms of ``SPLITS``)
text               optional: the transcript, unchanged; a column of labels is then not needed
clip_start,        optional: seconds; the clip is this part of the file, read by seeking, and a file
clip_end           may have any number of them. A line without both is the whole file
onset, offset      optional: seconds; then a line is an event, and a clip has any number of them.
                   A line with a path alone is a clip without events. A clip's labels are the
                   union of those of its events
=================  ===============================================================================

Every mistake is an error that names its line: a missing file or label would silently change what
is evaluated. (Files that do not decode are found later.) To make shards and to pre-train, labels
are optional, and files that do not exist are left out. The labels determine whether the task is
multi-label (``Task.settle``).
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import Reading, Row, Task
from bat.tasks.events import Event
from bat.tasks.folder import SPLITS, keys_of, split_of
from bat.tasks.labels import MISSING, Labels, cell_names, items_of, named
from bat.tasks.tables import numbered_lines, whole_number

PART = ("clip_start", "clip_end")
COLUMNS = ("path", "label", "labels", "fold", "split", "onset", "offset", "text", *PART)
ALSO_CALLED = {
    **dict.fromkeys(("file", "filename", "filepath", "audio", "wav", "clip", "fname"), "path"),
    **dict.fromkeys(("class", "category", "target", "tag", "eventlabel", "classname"), "label"),
    **dict.fromkeys(("classes", "categories", "targets", "tags"), "labels"),
    **dict.fromkeys(("transcript", "transcription", "sentence"), "text"),
    **dict.fromkeys(("set", "subset", "partition"), "split"),
    **dict.fromkeys(("start", "begin", "starttime", "onsettime", "startseconds"), "onset"),
    **dict.fromkeys(("end", "stop", "endtime", "offsettime", "endseconds"), "offset"),
    **dict.fromkeys(("clipstart", "segmentstart", "partstart"), "clip_start"),
    **dict.fromkeys(("clipend", "segmentend", "partend"), "clip_end"),
}
"""Other names of the columns, in lower case without ``_``, ``-`` and blanks."""
ZEROS, ONES = ("0", "0.0", "false"), ("1", "1.0", "true")
"""Cells of a one-hot column, in lower case."""
SHOWN = 5
"""Greatest number of missing files that a message names."""
MAX_FOLD = (1 << 15) - 1


class Line(NamedTuple):
    """A line of the CSV, its columns called as in ``COLUMNS``."""

    number: int
    cells: dict[str, str]
    labels: tuple[str, ...]
    file: str
    """Absolute path of the clip."""


def read(path: Path, labels: Labels | None = None, *, labelled: bool = True) -> Reading:
    """Reads the clips that the CSV at ``path`` lists, in its order.

    Args:
        path: the CSV.
        labels: names of the classes; None: a label file beside the CSV if the labels are mids.
        labelled: False: labels are optional, a fold and a split may have any value, and files may
            be missing, if not all are. A table of events is always held to all of it.

    Raises:
        UserError: for every mistake, with its line.
    """
    columns, lines, notes = _read_lines(path)
    parts = _check_parts(columns, path)
    if parts and not {"fold", "split"} & set(columns):
        notes.append("a column 'fold' or 'split' keeps parts of one file on one side of a test")
    timed = "onset" in columns
    strict = labelled or timed
    if strict:
        _check_columns(columns, lines, path)
    _check_files(lines, path, strict=strict)
    names = [line.cells["path"] for line in lines]
    if strict:  # the part below the folder that holds all of them
        common = os.path.commonpath([os.path.dirname(line.file) for line in lines])
        names = [os.path.relpath(line.file, common) for line in lines]
    unique = list(dict.fromkeys(names)) if timed or parts else names
    keys = dict(zip(unique, keys_of(unique), strict=True))
    rows = [
        _row(line, keys[name], path, strict=strict) for line, name in zip(lines, names, strict=True)
    ]
    reading = named(rows, labels, path.parent)
    rows = reading.rows
    if strict:
        rows = _join(lines, rows, path, timed=timed)
        if len(reading.vocabulary) < 2 and "text" not in columns:
            only = f"one class, {reading.vocabulary[0]!r}" if reading.vocabulary else "no labels"
            raise UserError(
                f"{path} has {only}: a classifier needs two classes or more; add clips of another"
            )
    return replace(reading, rows=rows, notes=notes + reading.notes)


def _read_lines(path: Path) -> tuple[list[str], list[Line], list[str]]:
    """Returns the columns, the lines with their labels, and notes on how they were read.

    Without a column of labels, two or more columns of 0 and 1 are read as one class each.
    """
    given, raw = numbered_lines(path)
    columns, notes = _columns(given, path)
    classes = _one_hot(given, columns, [cells for _, cells in raw])
    unknown = next((c for c in given if c not in columns and c not in classes), None)
    if unknown is not None:
        raise UserError(f"{path} line 1: {_unknown(unknown)}")
    if "path" not in columns.values():
        raise UserError(
            f"{path} line 1: no column 'path' (it has: {', '.join(given) or 'nothing'}): name the "
            "audio files in one"
        )
    if {"label", "labels"} <= set(columns.values()):
        raise UserError(f"{path} line 1: both 'label' and 'labels': keep one of them")
    if not raw:
        raise UserError(f"{path} lists no clips: below its header, give a line a clip")
    lines = [(n, {new: cells[old] for old, new in columns.items()}) for n, cells in raw]
    bare = next((number for number, cells in lines if not cells["path"]), None)
    if bare is not None:
        raise UserError(f"{path} line {bare}: no path")
    if classes:
        found = [tuple(c for c in classes if cells[c].lower() in ONES) for _, cells in raw]
        notes.append(f"columns of 0 and 1 are classes: {', '.join(classes)}")
        never = set(classes).difference(*found)
        if never:
            absent = ", ".join(c for c in classes if c in never)
            notes.append(f"no clip is of {absent}: left out of the classes")
        labels = [tuple(map(one_line, names)) for names in found]
    else:
        labels, said = _labels(lines, path)
        notes += said
    return (
        list(columns.values()),
        [
            Line(number, cells, names, os.path.abspath(path.parent / cells["path"]))
            for (number, cells), names in zip(lines, labels, strict=True)
        ],
        notes,
    )


def _columns(given: Sequence[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """Returns ``{name in the file: name in COLUMNS}`` of the columns that are known, and notes."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(given) == 1 and separator in given[0]:
            raise UserError(
                f"{path} line 1: the columns are separated by {name} ({given[0]!r}): save the file "
                "with commas (Excel and LibreOffice: 'CSV UTF-8', field separator ',')"
            )
    found: dict[str, str] = {}
    for column in given:
        if given.count(column) > 1 and column:
            raise UserError(f"{path} line 1: column {column!r} is there twice: keep one of them")
        plain = _plain(column)
        name = plain if plain in COLUMNS else ALSO_CALLED.get(plain, "")
        if name in found.values():
            other = next(old for old, new in found.items() if new == name)
            raise UserError(
                f"{path} line 1: columns {other!r} and {column!r} are both read as {name!r}: "
                "keep one of them"
            )
        if name:
            found[column] = name
    renamed = [f"{old!r} as {new!r}" for old, new in found.items() if old != new]
    return found, [f"columns read: {', '.join(renamed)}"] if renamed else []


def _plain(column: str) -> str:
    return re.sub("[_ -]", "", column.lower())


def _one_hot(
    given: Sequence[str], columns: dict[str, str], lines: Sequence[dict[str, str]]
) -> list[str]:
    """Returns the columns that are classes: all others, if they hold only 0 and 1."""
    others = [c for c in given if c not in columns]
    names = (*COLUMNS, *ALSO_CALLED)
    if {"label", "labels"} & set(columns.values()) or len(others) < 2 or not lines:
        return []
    plain = all(c and not difflib.get_close_matches(_plain(c), names, 1, 0.8) for c in others)
    cells = (line[c].lower() for line in lines for c in others)
    return others if plain and all(cell in (*ZEROS, *ONES) for cell in cells) else []


def _unknown(column: str) -> str:
    if not column or column.startswith("Unnamed:"):
        return (
            f"column {column!r} has no name: remove it (pandas: to_csv(..., index=False); a comma "
            "at the end of the header makes one too)"
        )
    meant = next(iter(difflib.get_close_matches(_plain(column), COLUMNS, n=1)), None)
    hint = f" (did you mean {meant!r}?)" if meant else ""
    return f"unknown column {column!r}{hint}; known are {', '.join(COLUMNS)}. Rename or remove it"


def _check_parts(columns: list[str], path: Path) -> bool:
    """Returns True if lines are parts of files; raises ``UserError`` for a column without its
    other, or beside those of events."""
    given = [column for column in PART if column in columns]
    if len(given) == 1:
        (lacks,) = set(PART) - set(given)
        raise UserError(
            f"{path} line 1: column {given[0]!r} without {lacks!r}: a part has both, in seconds"
        )
    if given and "onset" in columns:
        raise UserError(
            f"{path} line 1: {given[0]!r} beside 'onset': events are those of a whole file; "
            "remove one pair of columns"
        )
    return bool(given)


def _part(line: Line, path: Path) -> tuple[float, float | None]:
    """Returns start and length, in seconds, of the part of the file that is the clip; None: all."""
    given = [line.cells.get(column, "") for column in PART]
    if not any(given):
        return 0.0, None
    try:
        start, end = map(float, given)
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end < math.inf:
        raise UserError(
            f"{path} line {line.number}: clip_start {given[0]!r}, clip_end {given[1]!r}: seconds "
            "from the start of the file, the end after the start"
        )
    return start, round(end - start, 6)


def _labels(
    lines: Sequence[tuple[int, dict[str, str]]], path: Path
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Returns the labels of each line, of column ``label`` or ``labels``, and notes."""
    column = "label" if "label" in lines[0][1] else "labels"
    texts = [cells.get(column, "") for _, cells in lines]
    joined = next((text for text in texts if ";" in text and items_of(text) is None), None)
    separator = None if column == "label" else ";" if joined else ","
    labels, absent = [], []
    for (number, _), text in zip(lines, texts, strict=True):
        try:
            labels.append(cell_names(text, separator))
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        if text and text.lower() in MISSING:
            absent.append(number)
    notes = []
    if joined is not None and column == "label":
        notes.append(f"column 'label' has one class a line: {joined!r} is one; else say 'labels'")
    if absent:
        notes.append(f"{len(absent)} lines say that the label is missing (nan; line {absent[0]})")
    return labels, notes


def _check_columns(columns: list[str], lines: Sequence[Line], path: Path) -> None:
    head = f"{path} line 1"
    if {"fold", "split"} <= set(columns):
        raise UserError(f"{head}: both 'fold' and 'split': keep one of them")
    if ("onset" in columns) != ("offset" in columns):
        here, lacks = ("onset", "offset") if "onset" in columns else ("offset", "onset")
        raise UserError(f"{head}: column {here!r} without {lacks!r}: events need both, in seconds")
    if {"text", "onset"} <= set(columns):
        raise UserError(f"{head}: both 'text' and 'onset': a text belongs to a whole clip")
    has_labels = {"label", "labels"} & set(columns) or any(line.labels for line in lines)
    if not has_labels and "text" not in columns:
        raise UserError(
            f"{head}: no column 'label' (one a line) or 'labels' (several, 'a;b'), nor columns of "
            "0 and 1, a class each: add one (bat-pretrain and bat-embed need no labels)"
        )


def _check_files(lines: Sequence[Line], path: Path, *, strict: bool) -> None:
    """Raises ``UserError`` if a file is missing; unless ``strict``, if all are."""
    there = {file: os.path.isfile(file) for file in {line.file for line in lines}}
    missing = [line for line in lines if not there[line.file]]
    count = sum(not found for found in there.values())
    if not missing or (not strict and count < len(there)):
        return
    names = [line.cells["path"] for line in missing]
    why = f"paths are relative to {path.parent.resolve()}, or absolute"
    if any("\\" in name for name in names):
        why += ", and have / for \\"
    elif os.path.isdir(missing[0].file):
        why = f"{names[0]!r} is a folder, and a line names a file"
    shown = ", ".join(f"line {line.number}: {line.cells['path']!r}" for line in missing[:SHOWN])
    more = ", ..." if len(missing) > SHOWN else ""
    raise UserError(
        f"{path}: {count} of its {len(there)} audio files do not exist ({shown}{more}): {why}. "
        "Mend the paths, or remove the lines"
    )


def _row(line: Line, key: str, path: Path, *, strict: bool) -> Row:
    """Returns the row of one line, with its values checked if ``strict``."""
    cells = line.cells
    if strict:
        _check_values(line, f"{path} line {line.number}")
    fold, split = cells.get("fold"), cells.get("split") or None
    start, seconds = _part(line, path)
    if seconds is not None:
        key += f"__{round(1000 * start)}-{round(1000 * (start + seconds))}ms"
    return Row(
        path=path.parent / cells["path"],
        key=key,
        start_seconds=start,
        seconds=seconds,
        labels=line.labels,
        fold=whole_number(fold, column="fold", path=path) if fold else None,
        split=split_of(split) if split and strict else split,
        text=cells.get("text") or None,
        line=line.number,
    )


def _check_values(line: Line, at: str) -> None:
    """Raises ``UserError`` for a value of the line that is missing or out of range."""
    cells = line.cells
    for name in ("fold", "split", "text"):
        if cells.get(name) == "":
            raise UserError(f"{at}: no {name}: give every line one, or remove the column")
    fold, split = cells.get("fold", "0"), cells.get("split", "train")
    if not (fold.isascii() and fold.isdigit() and int(fold) <= MAX_FOLD):
        raise UserError(f"{at}: fold {fold!r} is not a whole number: number the folds from 1 on")
    if split_of(split) not in SPLITS.values():
        raise UserError(f"{at}: split {split!r} is not known: train, valid or test")
    if "onset" not in cells:
        if not line.labels and "label" in cells:
            raise UserError(
                f"{at}: no label: give it one, or remove the line (where clips may have none, "
                "call the column 'labels')"
            )
        return
    if not (line.labels or cells["onset"] or cells["offset"]):
        return  # a clip without events
    seconds = []
    for name in ("onset", "offset"):
        text = cells[name]
        if not text:
            raise UserError(
                f"{at}: no {name}: an event needs onset and offset (a clip without events has a "
                "path alone)"
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise UserError(f"{at}: {name} {text!r} is not a time: give seconds from the start")
        seconds.append(value)
    if seconds[1] <= seconds[0]:
        raise UserError(
            f"{at}: offset {cells['offset']} is not after onset {cells['onset']}: both are seconds "
            "from the clip's start (offset is the end, not the duration)"
        )
    if not line.labels:
        raise UserError(f"{at}: no label: give the event one (a clip without has a path alone)")


def _join(lines: Sequence[Line], rows: list[Row], path: Path, *, timed: bool) -> list[Row]:
    """Returns one row a clip, with the labels and events of all its lines."""
    clips: dict[tuple[str, tuple[float, float] | None], Row] = {}
    for line, row in zip(lines, rows, strict=True):
        at, name = f"{path} line {line.number}", line.cells["path"]
        if timed:
            onset, offset = line.cells["onset"], line.cells["offset"]
            event = [Event(float(onset), float(offset), row.labels, line.number)] if onset else []
            row = replace(row, events=tuple(event))
        before = clips.setdefault((line.file, row.place), row)
        if before is row:
            continue
        if not timed:
            raise UserError(
                f"{at}: {name!r} is there already, in line {before.line}: keep one line a clip "
                "(several labels: column 'labels', 'a;b'; events: columns 'onset' and 'offset')"
            )
        for what in ("fold", "split"):
            here, there = getattr(row, what), getattr(before, what)
            if here != there:
                raise UserError(
                    f"{at}: {what} {here} of {name!r}, which has {what} {there} in line "
                    f"{before.line}: give all lines of a clip the same"
                )
        if not (row.events and before.events):
            raise UserError(
                f"{at}: {name!r} is in line {before.line} too, and one of the two is without an "
                "event: that is for clips that have none"
            )
        clips[line.file, row.place] = replace(
            before,
            labels=tuple(dict.fromkeys(before.labels + row.labels)),
            mids=tuple(dict.fromkeys(before.mids + row.mids)),
            events=before.events + row.events,
        )
    return list(clips.values())


TASK = Task(name="csv", rows=read, target="class", adapts=True)
