"""ESC-50 (Piczak 2015): 50 classes, 2,000 clips of 5 s, 5 folds; accuracy over the folds.

Layouts read: ``audio/`` with ``meta/esc50.csv`` (as published) or with ``meta.csv``; columns
``filename, fold, category`` (``target`` is not used: classes are the categories, sorted).
``bat.tasks.esc10`` reads the same files.
"""

from __future__ import annotations

from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import Row, Task
from bat.tasks.labels import names_of
from bat.tasks.tables import read_csv, whole_number

CATEGORIES = """
dog rooster pig cow frog cat hen insects sheep crow
rain sea_waves crackling_fire crickets chirping_birds water_drops wind pouring_water toilet_flush
thunderstorm
crying_baby sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring
drinking_sipping
door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine
vacuum_cleaner clock_alarm clock_tick glass_breaking
helicopter chainsaw siren car_horn engine train church_bells airplane fireworks hand_saw
"""
"""Class names as in ``meta/esc50.csv``, in the order of its targets."""


def find_meta(root: Path) -> Path:
    """Returns the CSV of an ESC-like folder; raises a UserError if there is none."""
    for name in ("meta/esc50.csv", "meta.csv"):
        if (root / name).is_file():
            return root / name
    raise UserError(
        f"{root} has neither meta/esc50.csv nor meta.csv: give the folder that holds one of them "
        f"beside audio/"
    )


def read_esc(root: Path, lines: list[dict[str, str]], meta: Path) -> list[Row]:
    """Returns rows for the ``lines`` of ``meta``; clips lie in ``root/audio``."""
    audio = root / "audio"
    if not audio.is_dir():
        raise UserError(f"{audio} does not exist: the clips of {meta} belong there")
    present = {p.name for p in audio.iterdir()}
    missing = [line["filename"] for line in lines if line["filename"] not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(lines)} clips of {meta} are not in {audio} (the first: "
            f"{missing[0]!r}): complete the download"
        )
    bare = next((line["filename"] for line in lines if not names_of(line["category"])), None)
    if bare is not None:
        raise UserError(f"{meta}: {bare!r} has no category: every clip of this task has one")
    return [
        Row(
            path=audio / line["filename"],
            key=Path(line["filename"]).stem,
            labels=tuple(names_of(line["category"])),
            fold=whole_number(line["fold"], column="fold", path=meta),
        )
        for line in lines
    ]


def rows(root: Path) -> list[Row]:
    meta = find_meta(root)
    return read_esc(root, read_csv(meta, ("filename", "fold", "category")), meta)


TASK = Task(
    name="esc50",
    rows=rows,
    target="class",
    frames=512,
    classes=50,
    label_sets=(frozenset(CATEGORIES.split()),),
    statistics="esc50",
)
