"""Strings spoken digits together to sentences, for transcription by CTC.

    python tools/make_digit_strings.py FSDD OUT [--seed 0] [--train 600] [--valid 80] [--test 120]

FSDD is the Free Spoken Digit Dataset with ``labels.csv`` (``path,label,fold``; a fold is a
speaker). A sentence is two to four recordings of one speaker with pauses of 0.05 to 0.3 s in weak
noise; speakers of ``test`` (the last) and ``valid`` (the one before) are in no training sentence.
OUT gets ``audio/*.flac`` (8 kHz, 16 bits) and ``strings.csv`` (``path,split,text``; a digit is a
figure, or with ``--spelled`` its English name), which ``bat-probe data.csv=OUT/strings.csv
level=frame`` reads. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOISE = 1e-3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("source", type=Path, help="folder with labels.csv")
    p.add_argument("out", type=Path, help="folder for the sentences")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--spelled", action="store_true", help="texts 'five two', not '5 2'")
    for split, count in (("train", 600), ("valid", 80), ("test", 120)):
        p.add_argument(f"--{split}", type=int, default=count, metavar="N")
    args = p.parse_args()
    by_speaker: dict[int, list[tuple[Path, int]]] = {}
    with (args.source / "labels.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = args.source / row["path"], int(row["label"])
            by_speaker.setdefault(int(row["fold"]), []).append(entry)
    *train, valid, test = sorted(by_speaker)
    speakers = {"train": train, "valid": [valid], "test": [test]}
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    lines = [["path", "split", "text"]]
    for number, (split, own) in enumerate(speakers.items()):
        for i in range(getattr(args, split)):
            rng = np.random.default_rng([args.seed, number, i])
            clips = by_speaker[own[rng.integers(len(own))]]
            wave, rate, digits = sentence(rng, clips)
            text = " ".join(WORDS[d] if args.spelled else str(d) for d in digits)
            path = f"audio/{split}-{i:04d}.flac"
            soundfile.write(args.out / path, wave, rate)
            lines.append([path, split, text])
    with (args.out / "strings.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    print(f"{len(lines) - 1} sentences: {args.out / 'strings.csv'}")


def sentence(
    rng: np.random.Generator, clips: list[tuple[Path, int]]
) -> tuple[np.ndarray, int, list[int]]:
    """Returns the wave (S,) of a sentence, its rate and its digits."""
    parts: list[np.ndarray] = []
    digits: list[int] = []
    rate = 0
    for k in rng.integers(len(clips), size=rng.integers(2, 5)):
        path, digit = clips[k]
        wave, rate = soundfile.read(path, dtype="float32")
        parts += [
            np.zeros(round(rng.uniform(0.05, 0.3) * rate)),
            wave / max(np.abs(wave).max(), 1e-3),
        ]
        digits.append(digit)
    wave = np.concatenate([*parts, np.zeros(round(0.1 * rate))])
    return 0.5 * wave + NOISE * rng.standard_normal(len(wave)), rate, digits


if __name__ == "__main__":
    main()
