"""Speech Commands v0.02 (Warden 2018), 12 classes: ten words, ``unknown`` and ``silence``.

Layout read, as ``speech_commands_v0.02.tar.gz`` unpacks: a folder per word (35 of them, clips of at
most 1 s), ``_background_noise_/`` (recordings of about a minute), ``validation_list.txt`` and
``testing_list.txt`` (lines ``word/file.wav``).

Split of a word's clip: ``valid`` or ``test`` if a list names it, else ``train``; words other than
the ten are ``unknown``, all of them. A noise recording of d seconds gives ``floor(d)`` clips
``silence``: second i is ``train`` where i < 0.8 n, ``valid`` where i < 0.9 n, else ``test``. They
are read by seeking; nothing is copied.
"""

from __future__ import annotations

import wave
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import Reading, Row, Task

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES = (*WORDS, "unknown", "silence")
"""Class names in the order of their indices."""
NOISE = "_background_noise_"
LISTS = {"validation_list.txt": "valid", "testing_list.txt": "test"}
SHOWN = 3


def rows(root: Path) -> Reading:
    wanted = [root / name for name in (*LISTS, NOISE)]
    if missing := [path.name for path in wanted if not path.exists()]:
        raise UserError(
            f"{root} lacks {', '.join(missing)}: give the folder that "
            "speech_commands_v0.02.tar.gz (Speech Commands v0.02) was unpacked into"
        )
    split_of: dict[str, str] = {}
    for name, split in LISTS.items():
        for line in (root / name).read_text(encoding="utf-8").split():
            split_of.setdefault(line, split)
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name.startswith(("_", ".")):
            continue
        label = folder.name if folder.name in WORDS else "unknown"
        for path in sorted(folder.glob("*.wav")):
            split = split_of.pop(f"{folder.name}/{path.name}", "train")
            found.append(Row(path, f"{folder.name}__{path.stem}", (label,), split=split))
    if split_of:
        shown = ", ".join(sorted(split_of)[:SHOWN])
        raise UserError(
            f"{len(split_of)} files of {' and '.join(LISTS)} do not exist in {root} (the first: "
            f"{shown}): unpack the archive again"
        )
    for path in sorted((root / NOISE).glob("*.wav")):
        found += _silence(path)
    return Reading(found, list(CLASSES))


def _silence(path: Path) -> list[Row]:
    """Returns the seconds of a noise recording, each a clip."""
    try:
        with wave.open(str(path)) as file:
            n = file.getnframes() // file.getframerate()
    except (wave.Error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): unpack the archive again") from error
    return [
        Row(
            path,
            f"silence__{path.stem}__{i:02d}",
            ("silence",),
            split="train" if 10 * i < 8 * n else "valid" if 10 * i < 9 * n else "test",
            start_seconds=float(i),
            seconds=1.0,
        )
        for i in range(n)
    ]


TASK = Task(
    name="scv2",
    rows=rows,
    target="class",
    metrics=("accuracy", "map", "f1"),
    frames=112,
    classes=len(CLASSES),
    vocabulary=CLASSES,
    label_sets=(frozenset(CLASSES),),
    statistics="speechcommands",
    layout=(*LISTS, NOISE),
)
