"""DCASE 2016 task 2, sound event detection in offices, as processed for HEAR 2021: 11 classes.

Reads HEAR's folder ``tasks/dcase2016_task2-hear2021-full``: ``train.json``, ``valid.json`` and
``test.json`` (``{"file.wav": [{"label": str, "start": ms, "end": ms}, ...]}``),
``labelvocabulary.csv`` (``idx,label``, the order of the classes) and ``RATE/SPLIT/file.wav``:
``48000/`` as published, else the greatest rate that is there. Recordings that a JSON does not list
have no events; they are evaluated too (the reference leaves them out).

A recording is one clip of 120 s: log-mel and min-max over all of it, 12,000 frames (of the 12,001
the last is cut off the waveform), 750 time patches of 160 ms. A class is active in patch i if
``start <= 160 i <= end``. Test: sigmoid, median over 3 patches, 0.3; an event ends at the start of
its last patch. Selection is by micro mAP of all patches of ``valid`` (docs/method.md 5).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bat.errors import UserError
from bat.tasks.base import Reading, Row
from bat.tasks.events import Detection
from bat.tasks.published import MISSING, Mistakes, event_task, find_root, row_of
from bat.tasks.tables import read_csv, whole_number

PUBLISHED = "dcase16 (HEAR 2021, Zenodo 5887964, dcase2016_task2-hear2021-full)"
SPLITS = ("train", "valid", "test")
CLASSES = (
    *("clearthroat", "cough", "doorslam", "drawer", "keyboard", "keysDrop", "knock", "laughter"),
    *("pageturn", "phone", "speech"),
)


def read_classes(path: Path) -> list[str]:
    """Returns the class names of ``labelvocabulary.csv`` in the order of their indices.

    Raises ``UserError`` if they are not those of the data set.
    """
    lines = read_csv(path, ("idx", "label"))
    number = {x["label"]: whole_number(x["idx"], column="idx", path=path) for x in lines}
    names = sorted(number, key=number.__getitem__)
    if set(names) != set(CLASSES) or sorted(number.values()) != [*range(len(CLASSES))]:
        raise UserError(
            f"{path} has the classes {', '.join(names)}; dcase16 has {', '.join(CLASSES)}, idx 0 "
            f"to {len(CLASSES) - 1}: take the file of the data set"
        )
    return names


def audio_folder(root: Path) -> Path:
    """Returns ``48000/``, or of the other rates the greatest whose folder has all splits."""
    rates = [path for path in root.iterdir() if path.name.isdecimal()]
    whole = [path for path in rates if all((path / split).is_dir() for split in SPLITS)]
    if not whole:
        raise UserError(
            f"{root} lacks 48000/train, 48000/valid and 48000/test of {PUBLISHED}: unpack the "
            "audio there (or that of another rate); bat downloads nothing"
        )
    return max(whole, key=lambda path: (path.name == "48000", int(path.name)))


def read_events(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads a split's JSON; raises ``UserError`` if it is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert all(set(event) >= {"label", "start", "end"} for e in found.values() for event in e)
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f'{path} is not {{"file.wav": [{{"label": ..., "start": ms, "end": ms}}]}} '
            f"({error or 'a field is missing'}): take the file of the data set"
        ) from error
    return dict(found)


def rows(root: Path) -> Reading:
    needed = [*(f"{split}.json" for split in SPLITS), "labelvocabulary.csv"]
    root = find_root(root, needed, PUBLISHED)
    classes, audio = read_classes(root / "labelvocabulary.csv"), audio_folder(root)
    mistakes = Mistakes(root, PUBLISHED)
    found: list[Row] = []
    for split in SPLITS:
        listed = read_events(root / f"{split}.json")
        there = {path.name: path for path in (audio / split).glob("*.wav")}
        for name in sorted({*listed, *there}):
            if name not in there:
                mistakes.add(MISSING, f"{audio.name}/{split}/{name}")
                continue
            events = []
            for event in listed.get(name, ()):
                ms, at = (event["start"], event["end"]), f"{split}.json, {name}"
                start, end = (x / 1000 if isinstance(x, (int, float)) else str(x) for x in ms)
                made = mistakes.event(start, end, event["label"], known=classes, at=at)
                events += [made] if made else []
            key = f"{split}-{name.removesuffix('.wav')}"
            found.append(row_of(there[name], key, events, split=split))
    mistakes.check()
    return Reading(found, classes)


TASK = event_task(
    "dcase16",
    rows,
    CLASSES,
    metrics=("map_micro", "f1", "f1_micro"),
    selects="map_micro",
    frames=12_000,
    statistics="dcase16",
    layout=("tasks/dcase2016_task2-hear2021-full",),
    detection=Detection(threshold=0.3, median=3, edge="start"),
)
