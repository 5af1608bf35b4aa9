"""Mixes clips of ESC-10 into scenes with events, in the layout of URBAN-SED.

    python tools/make_scenes.py ESC10 OUT [--scenes 60,20,40] [--seconds 10] [--seed 0]

Every scene has two to six sounds at random times over weak noise, each the loudest 0.8 to 2.0 s of
a clip of ESC-10, 6 to 24 dB above it; sounds of one class do not overlap. Folds are kept apart:
training scenes are made of folds 1 to 3, validation scenes of fold 4, test scenes of fold 5. The
same arguments write the same files: ``audio/{train,validate,test}/*.wav`` (16 kHz),
``annotations/{train,validate,test}/*.txt`` (``onset<TAB>offset<TAB>class``), and ``events.csv``
with all of them for ``bat-probe data.csv=OUT/events.csv level=frame``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where bat is only checked out

from bat.audio.decode import decode
from bat.tasks.base import Row, load_task
from bat.tasks.synthetic import SAMPLE_RATE, generator, write_bytes, write_wav

FOLDS = {"train": (1, 2, 3), "validate": (4,), "test": (5,)}
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
NOISE_RMS = 0.003


def loudest(wave: np.ndarray, seconds: float) -> np.ndarray:
    """Returns the ``seconds`` of a wave (S,) with most energy, faded in and out over 10 ms."""
    size = min(round(seconds * SAMPLE_RATE), len(wave))
    energy = np.concatenate([[0.0], np.cumsum(wave**2)])
    start = int(np.argmax(energy[size:] - energy[:-size]))
    fade = np.minimum(1.0, np.arange(1, size + 1) / (0.01 * SAMPLE_RATE))
    part: np.ndarray = wave[start : start + size] * fade * fade[::-1]
    return part


def scene(
    rows: Sequence[Row], *, seconds: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """Returns the wave (S,) of a scene, and its events in order of time."""
    wave = NOISE_RMS * rng.standard_normal(round(seconds * SAMPLE_RATE))
    events: list[tuple[float, float, str]] = []
    for _ in range(int(rng.integers(2, 7))):
        row = rows[int(rng.integers(len(rows)))]
        label, length = row.labels[0], float(rng.uniform(0.8, 2.0))
        onset = round(float(rng.uniform(0, seconds - length)), 3)
        snr_db = float(rng.uniform(6, 24))
        if any(name == label and onset < b and a < onset + length for a, b, name in events):
            continue
        sound = loudest(decode(row.path.read_bytes(), sample_rate=SAMPLE_RATE), length)
        gain = NOISE_RMS * 10 ** (snr_db / 20) / max(float(np.sqrt(np.mean(sound**2))), 1e-6)
        at = round(onset * SAMPLE_RATE)
        wave[at : at + len(sound)] += gain * sound
        events.append((onset, round(onset + len(sound) / SAMPLE_RATE, 3), label))
    return wave, sorted(events)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("esc10", type=Path, help="folder of ESC-10 (audio/ and meta.csv)")
    parser.add_argument("out", type=Path, help="folder for the scenes")
    parser.add_argument("--scenes", default="60,20,40", help="of train, validate and test")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a scene")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    clips = load_task("esc10").open(given.esc10).rows
    lines = ["path,split,label,onset,offset"]
    counts = [int(n) for n in given.scenes.split(",")]
    for (split, folds), count in zip(FOLDS.items(), counts, strict=True):
        rows = [row for row in clips if row.fold in folds]
        for number in range(count):
            rng = generator(8 * given.seed + folds[0], number)
            wave, events = scene(rows, seconds=given.seconds, rng=rng)
            name = f"scene_{split}_{number:04d}"
            write_wav(given.out / f"audio/{split}/{name}.wav", wave)
            table = "".join(f"{a}\t{b}\t{label}\n" for a, b, label in events)
            write_bytes(given.out / f"annotations/{split}/{name}.txt", table.encode())
            where = f"audio/{split}/{name}.wav,{SPLITS[split]}"
            lines += [f"{where},{label},{a},{b}" for a, b, label in events]
    write_bytes(given.out / "events.csv", ("\n".join(lines) + "\n").encode())
    print(f"{sum(counts)} scenes and {len(lines) - 1} events in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
