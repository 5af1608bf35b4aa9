"""LibriSpeech-100 (Panayotov et al. 2015): read English, transcribed by CTC over characters.

Layouts read:

* OpenSLR 12: ``{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac``
  and ``SPEAKER-CHAPTER.trans.txt`` beside them (lines ``ID TEXT``), in the folder or in
  ``LibriSpeech/`` below it;
* the hub's parquet files of configuration ``clean``: splits ``train.100``, ``validation``,
  ``test``, columns ``id``, ``audio``, ``text``.

Splits: ``train``, ``valid`` (dev-clean) and ``test``; other parts of LibriSpeech are left alone,
with a note. Clips are whole utterances of 1.3 to 35 s. Outputs: blank 0, space 1, ``'`` 2,
``a`` to ``z`` 3 to 28; texts are lower-cased and all else in them is dropped.
"""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

from bat.errors import UserError
from bat.tasks import parquet
from bat.tasks.base import LeftOut, Reading, Row, Task

PARTS = {"train-clean-100": "train", "dev-clean": "valid", "test-clean": "test"}
"""Splits by the folders of OpenSLR."""
ON_HUB = {
    **dict.fromkeys(("train.100", "train.clean.100", "train-clean-100"), "train"),
    **dict.fromkeys(("valid", "validation.clean", "dev.clean", "dev-clean"), "valid"),
    **dict.fromkeys(("test", "test.clean", "test-clean"), "test"),
}
"""Splits by those of the parquet files."""
PUBLISHED = (
    "LibriSpeech is published as OpenSLR 12: train-clean-100.tar.gz, dev-clean.tar.gz and "
    "test-clean.tar.gz; unpack them into one folder and give that"
)
SHOWN = 3


def rows(root: Path) -> Reading:
    if parquet.parquet_files(root):
        return _from_parquet(root)
    top = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    if missing := [part for part in PARTS if not (top / part).is_dir()]:
        raise UserError(f"{top} lacks {', '.join(missing)}. {PUBLISHED}")
    found: list[Row] = []
    left_out: list[LeftOut] = []
    absent: list[str] = []
    for part, split in PARTS.items():
        texts = _transcripts(top / part)
        files = {path.stem: path for path in sorted((top / part).glob("*/*/*.flac"))}
        absent += [f"{part}/{key}.flac" for key in texts if key not in files]
        for key, path in files.items():
            if key in texts:
                found.append(Row(path, key, (), split=split, text=texts[key]))
            else:
                left_out.append(LeftOut(key, str(path), "no line in its .trans.txt", split))
    if absent:
        shown = ", ".join(absent[:SHOWN])
        raise UserError(
            f"{len(absent)} utterances have a transcript in {top} and no file (the first: "
            f"{shown}): unpack the archives again, or remove the lines"
        )
    notes = []
    if left_out:
        first = left_out[0].file
        notes.append(f"{len(left_out)} files have no transcript (the first: {first}): left out")
    others = [path.name for path in sorted(top.iterdir()) if path.is_dir() and "-" in path.name]
    if others := [name for name in others if name not in PARTS]:
        notes.append(f"not part of this task, left alone: {', '.join(others)}")
    return Reading(found, [], notes, left_out)


def _transcripts(folder: Path) -> dict[str, str]:
    """Returns the texts of a part by utterance; raises ``UserError`` for those that are empty."""
    texts: dict[str, str] = {}
    empty: list[str] = []
    for path in sorted(folder.glob("*/*/*.trans.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            key, _, text = line.strip().partition(" ")
            if key and not text.strip():
                empty.append(f"{path} line {number}")
            elif key:
                texts[key] = text.strip()
    if empty:
        raise UserError(
            f"{len(empty)} transcripts are empty ({', '.join(empty[:SHOWN])}): write what is said "
            "after the key, or remove the lines and their files"
        )
    return texts


def _from_parquet(root: Path) -> Reading:
    read = parquet.read(root)
    found = [
        replace(row, split=ON_HUB[row.split], labels=(), mids=())
        for row in read.rows
        if row.split in ON_HUB
    ]
    there = {row.split for row in found}
    if missing := sorted({"train", "valid", "test"} - there):
        names = {"train": "train.100", "valid": "validation", "test": "test"}
        raise UserError(
            f"{root} has no parquet files of {', '.join(names[name] for name in missing)}: give "
            "the folder of configuration clean, with train.100, validation and test"
        )
    without = [row for row in found if not (row.text or "").strip()]
    if without:
        raise UserError(
            f"{len(without)} clips have no text (the first: {without[0].name}): the files need the "
            "column text"
        )
    others = sorted({str(row.split) for row in read.rows} - set(ON_HUB))
    notes = [f"not part of this task, left alone: {', '.join(others)}"] if others else []
    return Reading(found, [], notes)


TASK = Task(
    name="librispeech",
    rows=rows,
    target="tokens",
    metrics=("wer", "cer", "token_error_rate"),
    symbols=f" '{string.ascii_lowercase}",
    statistics="librispeech",
    layout=tuple(PARTS),
)
