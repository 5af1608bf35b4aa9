"""ESC-10 (Piczak 2015): 10 classes, 400 clips of 5 s, 5 folds of 80.

Reads its own folder (``audio/`` + ``meta.csv``) or the rows of an ESC-50 folder whose column
``esc10`` is true.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bat.errors import UserError
from bat.tasks import esc50
from bat.tasks.base import Row
from bat.tasks.tables import read_csv

OWN = """
baby_cry chainsaw clock_tick dog_bark fire_crackling helicopter person_sneeze rain rooster sea_waves
"""
IN_ESC50 = """
crying_baby chainsaw clock_tick dog crackling_fire helicopter sneezing rain rooster sea_waves
"""
"""The ten classes in the spelling of ESC-10's own file and in that of ESC-50's."""


def rows(root: Path) -> list[Row]:
    meta = esc50.find_meta(root)
    lines = read_csv(meta, ("filename", "fold", "category"))
    if lines and "esc10" in lines[0]:
        lines = [line for line in lines if line["esc10"].lower() == "true"]
        if not lines:
            raise UserError(f"no line of {meta} has esc10 = True: this is not ESC-50's own file")
    return esc50.read_esc(root, lines, meta)


TASK = replace(
    esc50.TASK,
    name="esc10",
    rows=rows,
    classes=10,
    label_sets=(frozenset(OWN.split()), frozenset(IN_ESC50.split())),
)
