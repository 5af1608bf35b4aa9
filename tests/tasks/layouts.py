"""Small files in the public layouts of the event tasks, with a planted tone for each class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bat.tasks import dcase16, desed, urban_sed
from bat.tasks.synthetic import write_bytes, write_wav

RATE = 16_000
Sound = tuple[float, float, str]
"""Onset and offset in seconds, class."""
SCENES = ("Market", "Park", "Square", "Street", "Waterfront")


def wave_of(events: Sequence[Sound], classes: Sequence[str], seconds: float) -> np.ndarray:
    """A tone of its own pitch for each class over weak noise: (S,)."""
    rng = np.random.default_rng(len(events))
    wave = 1e-3 * rng.standard_normal(round(seconds * RATE))
    for onset, offset, label in events:
        at = np.arange(round(onset * RATE), min(round(offset * RATE), len(wave)))
        wave[at] += 0.3 * np.sin(2 * np.pi * (300 + 450 * classes.index(label)) * at / RATE)
    return wave


def text(path: Path, lines: Sequence[str]) -> None:
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def sounds(number: int, classes: Sequence[str]) -> list[Sound]:
    """Two events, of classes that change with ``number``."""
    one, other = (classes[(number + k) % len(classes)] for k in (0, 1))
    return [(0.32, 0.96, one), (1.28, 1.76, other)]


def make_dcase16(root: Path, *, clips: int = 3, seconds: float = 2.0) -> Path:
    folder = root / "tasks/dcase2016_task2-hear2021-full"
    names = dcase16.CLASSES
    text(folder / "labelvocabulary.csv", ["idx,label", *(f"{i},{n}" for i, n in enumerate(names))])
    for s, split in enumerate(dcase16.SPLITS):
        listed = {}
        for i in range(clips):
            events = sounds(2 * (s + i), names[:4])
            write_wav(folder / f"48000/{split}/{i}.wav", wave_of(events, names, seconds))
            listed[f"{i}.wav"] = [
                {"label": label, "start": 1000 * a, "end": 1000 * b} for a, b, label in events
            ]
        write_wav(folder / f"48000/{split}/silent.wav", wave_of([], names, seconds))
        write_bytes(folder / f"{split}.json", json.dumps(listed).encode())
    return root


def make_urban_sed(root: Path, *, clips: int = 4) -> Path:
    for s, split in enumerate(urban_sed.SPLITS):
        for i in range(clips):
            events = sounds(2 * (s + i), urban_sed.CLASSES[:4])
            name = f"soundscape_{split}_uniform{i}"
            write_wav(root / f"audio/{split}/{name}.wav", wave_of(events, urban_sed.CLASSES, 2.0))
            table = [f"{a}\t{b}\t{label}" for a, b, label in events]
            text(root / f"annotations/{split}/{name}.txt", table)
            write_bytes(root / f"annotations/{split}/{name}.jams", b"{}")
    return root


def make_desed(root: Path) -> Path:
    """Synthetic soundscapes for training and validation, weak clips, and ``validation.tsv``."""
    names = desed.CLASSES
    places = {
        "train/synthetic21_train/soundscapes": "train/synthetic21_train/soundscapes",
        "validation/synthetic21_validation/soundscapes": "validation/synthetic21_validation",
        "validation/validation": "validation/validation",
        "eval/public": "eval/public",
    }
    for p, (table, folder) in enumerate(places.items()):
        lines = ["filename\tonset\toffset\tevent_label"]
        for i in range(4):
            events = sounds(2 * (p + i), names[:4])
            write_wav(root / f"audio/{folder}/{i}.wav", wave_of(events, names, 2.0))
            lines += [f"{i}.wav\t{a}\t{b}\t{label}" for a, b, label in events]
        write_wav(root / f"audio/{folder}/none.wav", wave_of([], names, 2.0))
        text(root / f"metadata/{table}.tsv", [*lines, "none.wav\t\t\t", "gone.wav\t0\t1\tDog"])
    for i in range(2):
        events = sounds(i, names[:4])
        write_wav(root / f"audio/train/weak/{i}.wav", wave_of(events, names, 2.0))
    weak = ["0.wav\tAlarm_bell_ringing,Blender", "1.wav\tCat"]
    text(root / "metadata/train/weak.tsv", ["filename\tevent_labels", *weak])
    text(root / "metadata/train/unlabel_in_domain.tsv", ["filename", "0.wav"])
    text(root / "metadata/validation/test_dcase2018.tsv", ["filename", "0.wav"])
    return root


FSD50K = [f"Sound_{c:03d}" for c in range(200)]


def make_fsd50k(root: Path) -> Path:
    truth = root / "FSD50K.ground_truth"
    text(truth / "vocabulary.csv", [f"{i},{n},/m/{i}" for i, n in enumerate(FSD50K)])
    tables = {"dev": ["fname,labels,mids,split"], "eval": ["fname,labels,mids"]}
    for i, split in enumerate(["train"] * 6 + ["val"] * 2 + ["eval"] * 3):
        table = "eval" if split == "eval" else "dev"
        labels = [FSD50K[c] for c in (i % 3, 3)][: 1 + i % 2]  # the second is an ancestor
        events = [(0.1, 0.9, label) for label in labels[:1]]
        write_wav(root / f"FSD50K.{table}_audio/{100 + i}.wav", wave_of(events, FSD50K, 1.0))
        more = f",{split}" if table == "dev" else ""
        tables[table].append(f'{100 + i},"{",".join(labels)}","/m/1"{more}')
    for table, lines in tables.items():
        text(truth / f"{table}.csv", lines)
    return root


SPASS = [f"source {c:02d}" for c in range(28)]


def make_spass(root: Path) -> Path:
    for s, scene in enumerate(SCENES):
        lines = ["audio_filename,class"]
        for i in range(10):
            labels = [SPASS[(6 * s + i) % 28], SPASS[(i + 1) % 28], SPASS[(i + 1) % 28]]
            write_wav(root / f"{scene} audio files/{i}.wav", wave_of([], SPASS, 0.5))
            lines += [f"{i}.wav,{label}" for label in labels]
        text(root / f"{s + 1}_MatrixLabels{scene}.csv", lines)
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "dcase16": make_dcase16,
    "desed": make_desed,
    "fsd50k": make_fsd50k,
    "spass": make_spass,
    "urban_sed": make_urban_sed,
}
