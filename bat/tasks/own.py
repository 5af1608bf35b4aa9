"""Reads custom data with labels: a CSV with a line a clip, or a line an event.

Columns; any other is an error, so that misspelt ones are noticed (``labels.ALSO_CALLED`` lists
accepted synonyms):

=================  ===============================================================================
path               of the audio file, relative to the CSV, or absolute
label, or labels   one, unchanged; or several, separated by ``;``, or by ``,`` where the
                   column has no ``;``; either may be a list (``['dog', 'cat']``). Mids become
                   names where a label file lies beside the CSV. Or, without such a column, columns
                   of 0 and 1, a class each. If several are possible a clip may have none
fold, or split     optional: whole numbers; or train, test and valid (or synonyms of ``SPLITS``)
text               optional: the transcript, unchanged; a column of labels is then not needed
onset, offset      optional: seconds; then a line is an event, and a clip has any number of them.
                   A line with a path alone is a clip without events. A clip's labels are the
                   union of those of its events
=================  ===============================================================================

Every mistake is an error that names its line: a missing file or label would silently change what
is evaluated. (Files that do not decode are found later, ``run_folder.open_own``.)
The labels determine whether the task is multi-label (``Task.settle``).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import Row, Task, other_form
from bat.tasks.events import Event, Events
from bat.tasks.folder import SPLITS, keys_of, split_of
from bat.tasks.labels import Line, listed_clips, named

SHOWN = 5
"""Greatest number of missing files that a message names."""
MAX_FOLD = (1 << 15) - 1
FLAG, BESIDE_IT = "--labels class_labels_indices.csv", "class_labels_indices.csv beside the CSV"
"""Ways to give names to mids: an option of ``bat-shard``, and a file beside the CSV."""


@dataclass(frozen=True)
class Own:
    """The clips and labels that a CSV lists."""

    rows: list[Row]
    vocabulary: list[str]
    """Class names in the order of their indices."""
    events: Events | None
    """Events by the rows' keys; None: the CSV has no onsets."""
    notes: list[str]
    """Notes for the user on how it was read."""
    lines: dict[str, int]
    """Number of the line that first lists each clip, by the rows' keys."""


def read(path: Path) -> Own:
    """Reads the clips that the CSV at ``path`` lists, in its order.

    Raises:
        UserError: for every mistake described above, with its line.
    """
    columns, lines, labels, said = listed_clips(path)
    _check_columns(columns, path)
    spoken = "text" in columns
    if spoken and "onset" in columns:
        raise UserError(f"{path} line 1: both 'text' and 'onset': a text belongs to a whole clip")
    if not (spoken or {"label", "labels"} & set(columns) or any(labels)):
        raise UserError(
            f"{path} line 1: no column 'label' (one a line) or 'labels' (several, 'a;b'), nor "
            "columns of 0 and 1, a class each"
        )
    timed = "onset" in columns
    places = [os.path.abspath(path.parent / line["path"]) for _, line in lines]
    _check_files(places, lines, path)
    each = [
        _row(number, line, names, timed, path)
        for (number, line), names in zip(lines, labels, strict=True)
    ]
    if not timed:
        _refuse_twice(places, lines, path)
    reading = named(each, None, path.parent)
    clips = _joined(reading.rows, places, lines, path)
    keys = dict(zip(clips, _keys(list(clips)), strict=True))
    rows = [replace(row, key=keys[place]) for place, row in clips.items()]
    if len(reading.vocabulary) < 2 and not spoken:
        only = f"one class, {reading.vocabulary[0]!r}" if reading.vocabulary else "no labels"
        raise UserError(f"{path} has {only}: a classifier needs two classes or more")
    notes = said + [note.replace(FLAG, BESIDE_IT) for note in reading.notes]
    events: dict[str, list[Event]] = {keys[place]: [] for place in clips}
    for place, row, (number, line) in zip(places, reading.rows, lines, strict=True):
        if timed and line["onset"]:
            span = float(line["onset"]), float(line["offset"])
            events[keys[place]].append(Event(*span, row.labels, number))
    found = {key: tuple(several) for key, several in events.items()} if timed else None
    if found is not None:
        rows = [replace(row, events=found[row.key]) for row in rows]
    first = dict(zip(reversed(places), (number for number, _ in reversed(lines)), strict=True))
    return Own(rows, reading.vocabulary, found, notes, {keys[p]: first[p] for p in clips})


def _check_columns(columns: list[str], path: Path) -> None:
    head = f"{path} line 1"
    if {"fold", "split"} <= set(columns):
        raise UserError(f"{head}: both 'fold' and 'split': keep one of them")
    if ("onset" in columns) != ("offset" in columns):
        here, lacks = ("onset", "offset") if "onset" in columns else ("offset", "onset")
        raise UserError(f"{head}: column {here!r} without {lacks!r}: events need both, in seconds")


def _check_files(places: list[str], lines: list[Line], path: Path) -> None:
    there = {place: os.path.isfile(place) for place in dict.fromkeys(places)}
    files = sum(not found for found in there.values())
    if not files:
        return
    missing = [
        (number, line["path"])
        for place, (number, line) in zip(places, lines, strict=True)
        if not there[place]
    ]
    shown = ", ".join(f"line {number}: {name!r}" for number, name in missing[:SHOWN])
    more = ", ..." if len(missing) > SHOWN else ""
    why = f"paths are relative to {path.parent.resolve()}, or absolute"
    if any("\\" in name for _, name in missing):
        why += ", and have / for \\"
    elif remark := next(filter(None, (other_form(path.parent / n) for _, n in missing)), ""):
        why += remark
    elif os.path.isdir(path.parent / missing[0][1]):
        why = f"{missing[0][1]!r} is a folder, and a line names a file"
    raise UserError(
        f"{path}: {files} of its {len(there)} audio files do not exist ({shown}{more}): {why}. "
        "Mend the paths, or remove the lines"
    )


def _row(
    number: int, line: dict[str, str], labels: tuple[str, ...], timed: bool, path: Path
) -> Row:
    """Returns the row of one line, with all numbers checked; its key is set later."""
    at = f"{path} line {number}"
    fold, split = line.get("fold"), line.get("split")
    for name, value in (("fold", fold), ("split", split)):
        if value == "":
            raise UserError(f"{at}: no {name}: give every line one, or remove the column")
    if fold is not None and not (fold.isascii() and fold.isdigit() and int(fold) <= MAX_FOLD):
        raise UserError(f"{at}: fold {fold!r} is not a whole number: number the folds from 1 on")
    if split is not None and split_of(split) not in SPLITS.values():
        raise UserError(f"{at}: split {split!r} is not known: train, valid or test")
    if timed and (labels or line["onset"] or line["offset"]):
        _check_times(line["onset"], line["offset"], at)
    if not labels and (line["onset"] if timed else "label" in line):
        bare = "; a clip without events has a path alone" if timed else (
            " (where clips may have none, call the column 'labels')")  # fmt: skip
        raise UserError(f"{at}: no label: give it one, or remove the line{bare}")
    if line.get("text") == "":
        raise UserError(f"{at}: no text: give it one, or remove the line")
    return Row(
        path=path.parent / line["path"],
        key=line["path"],
        labels=labels,
        fold=None if fold is None else int(fold),
        split=None if split is None else split_of(split),
        text=line.get("text"),
    )


def _check_times(onset: str, offset: str, at: str) -> None:
    seconds = []
    for name, text in (("onset", onset), ("offset", offset)):
        if not text:
            raise UserError(
                f"{at}: no {name}: an event needs onset and offset (a clip without events has "
                "neither, and no label)"
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
            f"{at}: offset {offset} is not after onset {onset}: both are seconds from the clip's "
            "start (offset is the end, not the duration)"
        )


def _refuse_twice(places: list[str], lines: list[Line], path: Path) -> None:
    first: dict[str, int] = {}
    for place, (number, line) in zip(places, lines, strict=True):
        if place in first:
            raise UserError(
                f"{path} line {number}: {line['path']!r} is there already, in line {first[place]}: "
                "keep one line a clip (several labels: column 'labels', 'a;b'; events: columns "
                "'onset' and 'offset')"
            )
        first[place] = number


def _joined(rows: list[Row], places: list[str], lines: list[Line], path: Path) -> dict[str, Row]:
    """Returns ``{place: row}``, one row a clip, with the labels of all its lines."""
    clips: dict[str, Row] = {}
    first: dict[str, int] = {}
    for place, row, (number, line) in zip(places, rows, lines, strict=True):
        before = clips.setdefault(place, row)
        at = f"line {first.setdefault(place, number)}"
        name = line["path"]
        for what in ("fold", "split"):
            here, there = getattr(row, what), getattr(before, what)
            if here != there:
                raise UserError(
                    f"{path} line {number}: {what} {here} of {name!r}, which has {what} {there} in "
                    f"{at}: give all lines of a clip the same"
                )
        if row is not before and not (row.labels and before.labels):
            raise UserError(
                f"{path} line {number}: {name!r} is in {at} too, and one of the two is without an "
                "event: that is for clips that have none"
            )
        if row is not before:
            labels = tuple(dict.fromkeys(before.labels + row.labels))
            mids = tuple(dict.fromkeys(before.mids + row.mids))
            clips[place] = replace(before, labels=labels, mids=mids)
    return clips


def _keys(places: list[str]) -> list[str]:
    """Returns keys of absolute paths: their parts below the common parent folder."""
    common = os.path.commonpath([os.path.dirname(place) for place in places])
    return keys_of([os.path.relpath(place, common) for place in places])


TASK = Task(
    name="own",
    rows=lambda path: read(path).rows,
    vocabulary=lambda path: read(path).vocabulary,
    target="class",
    adapts=True,
)
