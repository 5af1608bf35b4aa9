"""FSD50K (Fonseca et al. 2022): 200 classes, multi-label, clips of 0.3 to 30 s.

Reads ``FSD50K.dev_audio/FNAME.wav`` (40,966 as published), ``FSD50K.eval_audio/FNAME.wav``
(10,231), and ``FSD50K.ground_truth/`` with ``dev.csv`` (``fname,labels,mids,split``; split
``train`` 36,796, ``val`` 4,170), ``eval.csv`` (``fname,labels,mids``) and ``vocabulary.csv`` (no
header: index, label, mid; the order of the classes). The folders may also be called
``dev_audio, eval_audio, ground_truth`` or, as in a copy on the hub, ``clips/dev, clips/eval,
labels``. Labels hold their ancestors already. ``val`` is the split ``valid``, eval is ``test``.
"""

from __future__ import annotations

from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import Reading, Row, Task
from bat.tasks.folder import split_of
from bat.tasks.published import MISSING, UNKNOWN, Mistakes, find_root
from bat.tasks.tables import csv_cells, read_csv

PUBLISHED = "fsd50k (FSD50K, Zenodo 4060432)"
LAYOUTS = (
    ("FSD50K.ground_truth", "FSD50K.dev_audio", "FSD50K.eval_audio"),
    ("ground_truth", "dev_audio", "eval_audio"),
    ("labels", "clips/dev", "clips/eval"),
)
"""Folders of tables, of development and of evaluation clips."""
NO_LABEL = "line(s) have no label: mend or remove them"
CLASSES = 200


def read_classes(path: Path) -> list[str]:
    """Returns the names of ``vocabulary.csv`` in the order of their indices."""
    lines = [cells for _, cells in csv_cells(path)]
    names = [cells[1] for cells in lines if len(cells) == 3]
    if [cells[0] for cells in lines] != [str(i) for i in range(len(names))]:
        raise UserError(f"{path} is not 'index,label,mid' from 0 on: take the file of the data set")
    return names


def rows(root: Path) -> Reading:
    tables, dev, evaluation = next((x for x in LAYOUTS if (root / x[0]).is_dir()), LAYOUTS[0])
    needed = [*(f"{tables}/{n}.csv" for n in ("dev", "eval", "vocabulary")), dev, evaluation]
    root = find_root(root, needed, PUBLISHED)
    classes = read_classes(root / tables / "vocabulary.csv")
    known = set(classes)
    mistakes = Mistakes(root, PUBLISHED)
    found: list[Row] = []
    for table, audio, column in (("dev", dev, ("split",)), ("eval", evaluation, ())):
        there = {path.name for path in (root / audio).iterdir()}
        path = root / tables / f"{table}.csv"
        for number, line in enumerate(read_csv(path, ("fname", "labels", *column)), start=2):
            name, at = f"{line['fname']}.wav", f"{table}.csv line {number}"
            labels = tuple(label.strip() for label in line["labels"].split(",") if label.strip())
            if name not in there:
                mistakes.add(MISSING, f"{audio}/{name}")
            if not labels:
                mistakes.add(NO_LABEL, at)
            for label in (label for label in labels if label not in known):
                mistakes.add(UNKNOWN, f"{label!r}, {at}")
            split = split_of(line["split"]) if column else "test"
            found.append(Row(root / audio / name, f"{table}-{line['fname']}", labels, split=split))
    mistakes.check()
    return Reading(found, classes)


TASK = Task(
    name="fsd50k",
    rows=rows,
    target="tags",
    loss="asl",
    classes=CLASSES,
    layout=("FSD50K.ground_truth",),
)
