"""Toy sound event detection: onsets and offsets of three sounds.

Thirty synthetic clips of 3 s with two to four events of 0.4 to 0.7 s in weak noise; classes are
``low`` (a tone around 300 Hz), ``high`` (around 2 kHz) and ``noise``. Written if no data are
given, in the layout that ``rows`` reads: ``audio/*.wav`` and ``events.csv``, a line an event as in
custom data (``bat.tasks.csv``): ``path,split,label,onset,offset``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bat.tasks import csv
from bat.tasks.base import Row, Task
from bat.tasks.synthetic import SAMPLE_RATE, generator, sound, write_bytes, write_wav

CLIPS = {"train": 16, "valid": 6, "test": 8}
SECONDS = 3.0
PITCHES_HZ = {"low": (250, 350), "high": (1_800, 2_400)}
CLASSES = ("high", "low", "noise")


def clip(number: int) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """Returns the wave (S,) and the events of clip ``number``, which do not overlap."""
    rng = generator(1, number)
    wave = 1e-3 * rng.standard_normal(round(SECONDS * SAMPLE_RATE))
    events = []
    at = rng.uniform(0.1, 0.6)
    for _ in range(rng.integers(2, 5)):
        seconds = rng.uniform(0.4, 0.7)
        if at + seconds > SECONDS:
            break
        label = CLASSES[rng.integers(len(CLASSES))]
        if label == "noise":
            made = rng.standard_normal(round(seconds * SAMPLE_RATE)) / 4
        else:
            made = sound(rng.uniform(*PITCHES_HZ[label]), seconds)
        start = round(at * SAMPLE_RATE)
        wave[start : start + len(made)] += 0.5 * made
        events.append((round(at, 4), round(at + seconds, 4), label))
        at += seconds + rng.uniform(0.2, 0.6)
    return wave, events


def make(root: Path) -> None:
    lines = ["path,split,label,onset,offset"]
    for number, split in enumerate(s for s, count in CLIPS.items() for _ in range(count)):
        wave, events = clip(number)
        path = f"audio/{split}-{number:02d}.wav"
        write_wav(root / path, wave)
        lines += [f"{path},{split},{label},{onset},{offset}" for onset, offset, label in events]
    write_bytes(root / "events.csv", ("\n".join(lines) + "\n").encode())


def rows(root: Path) -> list[Row]:
    return csv.read(root / "events.csv").rows


TASK = Task(name="toy_events", rows=rows, target="events", vocabulary=CLASSES, make=make)
