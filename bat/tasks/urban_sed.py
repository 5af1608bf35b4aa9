"""URBAN-SED v2 (Salamon et al. 2017): 10 classes of synthetic urban scenes of 10 s, with events.

Reads ``audio/{train,validate,test}/NAME.wav`` (6,000, 2,000 and 2,000 as published) and
``annotations/{train,validate,test}/NAME.txt``, a line an event of the foreground: onset and offset
in seconds and the class, separated by tabs, without a header. (The ``.jams`` beside them are not
read.) ``validate`` is the split ``valid``. A clip's labels are the union of its events'.
"""

from __future__ import annotations

from pathlib import Path

from bat.tasks.base import Reading, Row
from bat.tasks.published import MISSING, Mistakes, event_task, find_root, row_of
from bat.tasks.tables import csv_cells

PUBLISHED = "urban_sed (URBAN-SED v2.0.0, Zenodo 1324404)"
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
CLASSES = (
    *("air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling"),
    *("gun_shot", "jackhammer", "siren", "street_music"),
)
UNLISTED = "audio file(s) have no table of events: complete the download"
COLUMNS = "line(s) are not 'onset<TAB>offset<TAB>class': mend or remove them"


def rows(root: Path) -> Reading:
    needed = [f"{kind}/{split}" for kind in ("annotations", "audio") for split in SPLITS]
    root = find_root(root, needed, PUBLISHED)
    mistakes = Mistakes(root, PUBLISHED)
    found: list[Row] = []
    for folder, split in SPLITS.items():
        audio = {path.stem: path for path in sorted((root / "audio" / folder).glob("*.wav"))}
        tables = {p.stem: p for p in sorted((root / "annotations" / folder).glob("*.txt"))}
        for name in sorted(tables.keys() - audio.keys()):
            mistakes.add(MISSING, f"audio/{folder}/{name}.wav")
        for name in sorted(audio.keys() - tables.keys()):
            mistakes.add(UNLISTED, f"audio/{folder}/{name}.wav")
        for name in sorted(audio.keys() & tables.keys()):
            events = []
            for number, cells in csv_cells(tables[name], delimiter="\t"):
                at = f"annotations/{folder}/{name}.txt line {number}"
                if len(cells) != 3:
                    mistakes.add(COLUMNS, at)
                elif event := mistakes.event(*cells, known=CLASSES, at=at):
                    events.append(event)
            found.append(row_of(audio[name], f"{split}-{name}", events, split=split))
    mistakes.check()
    return Reading(found, list(CLASSES))


TASK = event_task("urban_sed", rows, CLASSES, layout=("annotations/validate", "audio/validate"))
