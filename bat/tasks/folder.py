"""Reads custom data: a folder of audio (recursive), or a CSV that lists files and labels.

Folder: every file with a suffix of ``AUDIO_SUFFIXES``, linked folders included (``find_files``).
If the audio lies in two or more sub-folders, the name of a file's parent folder is its label;
otherwise the clips are unlabelled (suitable for pre-training). If all of it lies below folders
called ``train``, ``Testing`` and the like (``SPLITS``), these are the splits ``train``, ``valid``
and ``test``, and each is read in that way.

CSV: see ``bat.tasks.csv``; labels are optional here, and not all files need exist.

The labels determine whether the task is multi-label (``Task.settle``).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, LeftOut, Reading, Row, Task, as_text
from bat.tasks.labels import Labels, classes_in_words, named, names_of

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Split names by the lower-case names of the folders that are taken for them."""


def split_of(folder: str) -> str:
    """Returns the split of the clips in ``folder``: ``Training`` -> ``train``; others unchanged."""
    return SPLITS.get(folder.lower(), one_line(folder))


def find_audio(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Returns every audio file below ``root``, as ``find_files``."""
    return find_files(root, tuple(f".{s}" for s in (*AUDIO_SUFFIXES, *UNDECODED_SUFFIXES)))


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], list[LeftOut]]:
    """Returns every file below ``root`` with one of ``suffixes``, sorted, and the files left out.

    Suffixes are in lower case with their dots; each file left out has its reason. Links to folders
    are followed, except to one that is read anyway (in ``root``, around it, or linked already).
    Hidden files, and all in hidden folders, are left out.

    Raises:
        UserError: a folder that cannot be read.
    """
    found: list[str] = []
    left_out: list[LeftOut] = []
    tops = [os.path.join(os.path.realpath(root), "")]  # folders that are read, with all below them

    def leave(path: str, why: str) -> None:
        name = os.path.relpath(path, root)
        left_out.append(LeftOut(_key(name), as_text(name), why))

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    for folder, names, files in os.walk(root, onerror=refuse, followlinks=True):
        names.sort()
        inside = "" if folder == str(root) else os.path.relpath(folder, root)
        hidden = any(part.startswith(".") for part in inside.split(os.sep))
        for name in [n for n in names if os.path.islink(os.path.join(folder, n))]:
            path = os.path.join(folder, name)
            real = os.path.join(os.path.realpath(path), "")
            if any(real.startswith(top) or top.startswith(real) for top in tops):
                names.remove(name)
                leave(path, f"link: {as_text(os.path.realpath(path))} is read already")
            else:
                tops.append(real)
        for name in files:
            path = os.path.join(folder, name)
            if name.lower().endswith(suffixes):
                if hidden or name.startswith("."):
                    leave(path, "hidden: its name, or that of a folder, begins with a dot")
                else:
                    found.append(path)
            elif os.path.islink(path) and not os.path.exists(path):
                leave(path, f"link: {as_text(os.readlink(path))} does not exist")
    found.sort(key=lambda path: path.split(os.sep))
    return [Path(path) for path in found], left_out


def _key(path: str) -> str:
    """Converts ``dogs/rex.flac`` to ``dogs__rex``."""
    stem = os.path.splitext(path)[0].replace("\\", "/")
    return as_text(stem.strip("/").replace("/", "__"))


def keys_of(paths: list[str]) -> list[str]:
    """Returns keys of relative paths, a distinct one for each distinct path.

    If two files differ only in suffix, the suffix is kept (``rex.flac``, ``rex.wav``); of keys that
    are still equal (``a/b`` and ``a__b``), the later ones are numbered (``a__b#2``).
    """
    plain = {path: _key(path) for path in paths}
    count = Counter(plain[path] for path in paths)
    used: set[str] = set()
    keys: dict[str, str] = {}
    for path, name in plain.items():
        key = as_text(path).replace("/", "__") if count[name] > 1 else name
        several = (key if n == 1 else f"{key}#{n}" for n in itertools.count(1))
        keys[path] = next(candidate for candidate in several if candidate not in used)
        used.add(keys[path])
    return [keys[path] for path in paths]


def read(source: Path, labels: Labels | None = None) -> Reading:
    """Reads the clips of a folder, or those that a CSV lists (``bat.tasks.csv``).

    Raises:
        UserError: no audio, no such files, unknown columns, an unknown label.
    """
    if not source.is_dir():
        if source.suffix.lower() != ".csv":
            raise UserError(
                f"{source} is neither a folder nor a .csv file: name the folder, {source.parent}"
            )
        from bat.tasks import csv  # not at the top: it imports this file

        return csv.read(source, labels, labelled=False)
    files, left_out = find_audio(source)
    if not files:
        first = f"; left out: {left_out[0].file} ({left_out[0].reason})" if left_out else ""
        raise UserError(
            f"{source} has no audio (looked for {', '.join('.' + s for s in AUDIO_SUFFIXES)}, "
            f"sub-folders included{first}): name another folder"
        )
    names = [file.relative_to(source).as_posix() for file in files]
    splits = all(name.partition("/")[0].lower() in SPLITS for name in names)
    inside = [name.partition("/")[2] if splits else name for name in names]
    parents = {name.rpartition("/")[0] for name in inside}
    labelled = "" not in parents and len(parents) > 1
    rows = [
        Row(
            path=file,
            key=key,
            labels=tuple(names_of(as_text(file.parent.name))) if labelled else (),
            split=split_of(name.partition("/")[0]) if splits else None,
        )
        for file, key, name in zip(files, keys_of(names), names, strict=True)
    ]
    found = named(rows, labels, source)
    if found.vocabulary:
        said = classes_in_words(found.vocabulary)
        found.notes.append(f"labels are the names of the folders ({said})")
    return replace(found, left_out=left_out)


TASK = Task(name="folder", rows=read, target="class", adapts=True)
