"""Toy transcription: the sequence of tones in a clip, of four tones.

Forty synthetic clips of 2 to 4 s, each three to five tones of 0.35 s with short pauses; a tone is a
letter from ``a`` (300 Hz) to ``d`` (2.4 kHz). Written if no data are given, in the layout that
``rows`` reads: ``audio/*.wav`` and ``texts.csv``, custom data (``bat.tasks.csv``) with columns
``path,split,text``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bat.tasks import csv
from bat.tasks.base import Row, Task
from bat.tasks.synthetic import SAMPLE_RATE, generator, sound, write_bytes, write_wav

CLIPS = {"train": 24, "valid": 8, "test": 8}
PITCHES_HZ = {"a": 300.0, "b": 600.0, "c": 1_200.0, "d": 2_400.0}


def clip(number: int) -> tuple[np.ndarray, str]:
    """Returns the wave (S,) and the text of clip ``number``."""
    rng = generator(2, number)
    text = "".join(rng.choice(list(PITCHES_HZ), rng.integers(3, 6)))
    parts = [np.zeros(round(rng.uniform(0.1, 0.3) * SAMPLE_RATE))]
    for letter in text:
        parts.append(0.5 * sound(PITCHES_HZ[letter] * rng.uniform(0.97, 1.03), 0.35))
        parts.append(np.zeros(round(rng.uniform(0.2, 0.3) * SAMPLE_RATE)))
    wave = np.concatenate(parts)
    return wave + 1e-3 * rng.standard_normal(len(wave)), text


def make(root: Path) -> None:
    lines = ["path,split,text"]
    for number, split in enumerate(s for s, count in CLIPS.items() for _ in range(count)):
        wave, text = clip(number)
        path = f"audio/{split}-{number:02d}.wav"
        write_wav(root / path, wave)
        lines.append(f"{path},{split},{text}")
    write_bytes(root / "texts.csv", ("\n".join(lines) + "\n").encode())


def rows(root: Path) -> list[Row]:
    return csv.read(root / "texts.csv").rows


TASK = Task(name="toy_tokens", rows=rows, target="tokens", make=make)
