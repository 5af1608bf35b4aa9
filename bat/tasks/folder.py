"""Audio of one's own: a folder (recursive), or a CSV that lists files and labels.

Folder: where the audio lies in two or more sub-folders, the name of a file's parent folder is its
label; otherwise the clips are unlabelled (good for pre-training). Where all of it lies below
folders called ``train``, ``Testing`` and the like (``SPLITS``), these are the splits ``train``,
``valid`` and ``test``, and each is read in that way.

CSV: columns ``path`` (relative to the CSV, or absolute) and at will ``label`` (one, taken as it
stands), ``labels`` (several, separated by ``;``, or by ``,`` where the column has no ``;``),
``fold`` (from 1) and ``split``. Other columns are an error: a misspelt one must not pass.
Labels are names, or mids where a label file lies beside the CSV (``bat.tasks.labels``).

The labels decide whether the task is multi-label (``Task.settle``).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from bat.shapes import UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, Row, Task, read_csv, whole_number
from bat.tasks.labels import Labels, Reading, named

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Folders that are taken for splits, in lower case, and what the split is called then."""
COLUMNS = ("path", "label", "labels", "fold", "split")


def split_of(folder: str) -> str:
    """The split whose clips lie in ``folder``: ``Training`` -> ``train``; others as they stand."""
    return SPLITS.get(folder.lower(), folder)


def find_audio(root: Path) -> list[Path]:
    """Every audio file below ``root``, sorted; hidden files and folders are left out.

    Raises:
        UserError: a folder that cannot be read.
    """
    suffixes = tuple(f".{suffix}" for suffix in (*AUDIO_SUFFIXES, *UNDECODED_SUFFIXES))
    found: list[str] = []
    for folder, names, files in os.walk(root, onerror=_unreadable):
        names[:] = [n for n in names if not n.startswith(".")]
        found.extend(
            os.path.join(folder, n)
            for n in files
            if not n.startswith(".") and n.lower().endswith(suffixes)
        )
    found.sort(key=lambda path: path.split(os.sep))
    return [Path(path) for path in found]


def _unreadable(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error


def _key(path: str) -> str:
    """``dogs/rex.flac`` -> ``dogs__rex``."""
    return os.path.splitext(path)[0].replace("\\", "/").strip("/").replace("/", "__")


def keys_of(paths: list[str]) -> list[str]:
    """Keys of relative paths; where two files differ in suffix only, the suffix is kept."""
    keys = [_key(p) for p in paths]
    count = Counter(keys)
    return [p.replace("/", "__") if count[k] > 1 else k for k, p in zip(keys, paths, strict=True)]


def _rows_of_folder(root: Path) -> list[Row]:
    files = find_audio(root)
    if not files:
        raise UserError(
            f"{root} has no audio (looked for {', '.join('.' + s for s in AUDIO_SUFFIXES)}, "
            f"sub-folders included)"
        )
    names = [f.relative_to(root).as_posix() for f in files]
    tops = {name.partition("/")[0] for name in names}
    splits = all(top.lower() in SPLITS for top in tops)
    inside = [name.partition("/")[2] if splits else name for name in names]
    parents = {name.rpartition("/")[0] for name in inside}
    labelled = "" not in parents and len(parents) > 1
    return [
        Row(
            path=f,
            key=key,
            labels=(f.parent.name,) if labelled else (),
            split=split_of(name.partition("/")[0]) if splits else None,
        )
        for f, key, name in zip(files, keys_of(names), names, strict=True)
    ]


def _rows_of_csv(path: Path) -> list[Row]:
    lines = read_csv(path, ("path",))
    if not lines:
        raise UserError(f"{path} lists no clips")
    unknown = [c for c in lines[0] if c not in COLUMNS]
    if unknown:
        raise UserError(
            f"{path}: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}. "
            f"Rename or remove it"
        )
    if {"label", "labels"} <= set(lines[0]):
        raise UserError(f"{path} has both 'label' and 'labels': keep one of them")
    separator = ";" if any(";" in line.get("labels", "") for line in lines) else ","
    keys = keys_of([line["path"] for line in lines])
    rows = []
    for line, key in zip(lines, keys, strict=True):
        if not line["path"]:
            raise UserError(f"{path}: a line without a path")
        names = [line["label"]] if "label" in line else line.get("labels", "").split(separator)
        fold = line.get("fold", "")
        rows.append(
            Row(
                path=path.parent / line["path"],
                key=key,
                labels=tuple(dict.fromkeys(n.strip() for n in names if n.strip())),
                fold=whole_number(fold, column="fold", path=path) if fold else None,
                split=line.get("split") or None,
            )
        )
    missing = [row.path for row in rows if not row.path.is_file()]
    if len(missing) == len(rows):
        raise UserError(
            f"none of the {len(rows)} files of {path} exists (the first: {missing[0]}): "
            f"paths are relative to the CSV's folder"
        )
    return rows


def read(source: Path, labels: Labels | None = None) -> Reading:
    """The clips of a folder or a CSV.

    Raises:
        UserError: no audio, no such files, unknown columns, an unknown label.
    """
    if source.is_dir():
        return named(_rows_of_folder(source), labels, source)
    if source.suffix.lower() != ".csv":
        raise UserError(f"{source} is neither a folder nor a .csv file")
    return named(_rows_of_csv(source), labels, source.parent)


def rows(root: Path) -> list[Row]:
    return read(root).rows


TASK = Task(
    name="folder",
    rows=rows,
    multi_label=False,
    loss="ce",
    metric="accuracy",
    frames=None,
    adapts=True,
)
