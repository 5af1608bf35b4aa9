"""SPASS (Viveros-Muñoz et al. 2023): 28 classes in synthetic urban scenes of 10 s, multi-label.

Reads the folders ``SCENE audio files/`` of Market, Park, Square, Street and Waterfront and the
tables ``N_MatrixLabelsSCENE.csv`` with the columns ``audio_filename, class``, a line an event,
wherever both lie below the root. The classes are those that occur, sorted.

No split is published. Of each scene's clips 70 % are ``train`` and 30 % ``test``, dealt by a hash
of their names, so that they never change; *Unmute the Patch Tokens* trains on 70 % too, but on
which is not known. Validation clips are taken from the training part.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import Reading, Row, Task, in_order
from bat.tasks.published import MISSING, Mistakes
from bat.tasks.tables import read_csv

PUBLISHED = "spass (SPASS, a synthetic polyphonic dataset with spatiotemporal labels, Zenodo)"
SCENES = ("Market", "Park", "Square", "Street", "Waterfront")
TRAIN_SHARE = 0.7
CLASSES = 28
NO_CLASS = "line(s) have no class: mend or remove them"


def split_of(scene: str, name: str) -> str:
    """Returns ``train`` or ``test`` for a clip, by a hash of its scene and name."""
    share = int.from_bytes(hashlib.sha256(f"{scene}/{name}".encode()).digest()[:4]) / (1 << 32)
    return "train" if share < TRAIN_SHARE else "test"


def rows(root: Path) -> Reading:
    mistakes = Mistakes(root, PUBLISHED)
    found: list[Row] = []
    absent: list[str] = []
    for scene in SCENES:
        pattern = re.compile(rf"(\d+_)?MatrixLabels_?{scene}\.csv", re.IGNORECASE)
        tables = [path for path in sorted(root.rglob("*.csv")) if pattern.fullmatch(path.name)]
        folders = [path for path in sorted(root.rglob(f"{scene}*")) if path.is_dir()]
        audio = {p.name: p for folder in folders for p in sorted(folder.rglob("*.wav"))}
        absent += [f"MatrixLabels{scene}.csv"] if not tables else []
        absent += [f"{scene} audio files/"] if not audio else []
        clips: dict[str, list[str]] = {}
        for table in tables:
            lines = read_csv(table, ("audio_filename", "class"))
            for number, line in enumerate(lines, start=2):
                name = Path(line["audio_filename"]).name
                name += "" if name.lower().endswith(".wav") else ".wav"
                labels = clips.setdefault(name, [])
                if not line["class"]:
                    mistakes.add(NO_CLASS, f"{table.name} line {number}")
                elif line["class"] not in labels:
                    labels.append(line["class"])
        for name, labels in clips.items():
            if audio and name not in audio:
                mistakes.add(MISSING, f"{scene}: {name}")
            elif audio:
                key = f"{scene}-{name.removesuffix('.wav')}"
                split = split_of(scene, name)
                found.append(Row(audio[name], key, tuple(labels), split=split))
    if absent:
        raise UserError(
            f"{root} lacks {', '.join(absent)} of {PUBLISHED}: name the folder that holds them, "
            "data.root=DIR; bat downloads nothing"
        )
    mistakes.check()
    share = f"{100 * TRAIN_SHARE:g} % of each scene train"
    return Reading(
        found,
        in_order(label for row in found for label in row.labels),
        [f"no split is published: {share}, the rest test, dealt by a hash of the names"],
    )


TASK = Task(
    name="spass",
    rows=rows,
    target="tags",
    loss="asl",
    classes=CLASSES,
    layout=tuple(f"*MatrixLabels*{scene}.csv" for scene in SCENES),
)
