"""Audio of one's own: a folder (recursive), or a CSV that lists files and labels.

Folder: where the audio lies in two or more sub-folders, the name of a file's parent folder is its
label; otherwise the clips are unlabelled (good for pre-training).

CSV: columns ``path`` (relative to the CSV, or absolute) and at will ``label`` (one, taken as it
stands), ``labels`` (several, separated by ``;``, or by ``,`` where the column has no ``;``),
``fold`` (from 1) and ``split``. Other columns are an error: a misspelt one must not pass.

The labels decide whether the task is multi-label (``Task.settle``).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from bat.shapes import UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, Row, Task, read_csv, whole_number

COLUMNS = ("path", "label", "labels", "fold", "split")


def find_audio(root: Path) -> list[Path]:
    """Every audio file below ``root``, sorted; hidden files and folders are left out."""
    suffixes = (*AUDIO_SUFFIXES, *UNDECODED_SUFFIXES)
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix[1:].lower() in suffixes:
                found.append(Path(folder) / name)
    return sorted(found)


def _key(path: str) -> str:
    """``dogs/rex.flac`` -> ``dogs__rex``."""
    return os.path.splitext(path)[0].replace("\\", "/").strip("/").replace("/", "__")


def _unique_keys(paths: list[str]) -> list[str]:
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
    parents = {f.parent for f in files}
    labelled = root not in parents and len(parents) > 1
    keys = _unique_keys([f.relative_to(root).as_posix() for f in files])
    return [
        Row(path=f, key=key, labels=(f.parent.name,) if labelled else ())
        for f, key in zip(files, keys, strict=True)
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
    keys = _unique_keys([line["path"] for line in lines])
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


def rows(root: Path) -> list[Row]:
    if root.is_dir():
        return _rows_of_folder(root)
    if root.suffix.lower() != ".csv":
        raise UserError(f"{root} is neither a folder nor a .csv file")
    return _rows_of_csv(root)


TASK = Task(
    name="folder",
    rows=rows,
    multi_label=False,
    loss="ce",
    metric="accuracy",
    frames=1024,
    adapts=True,
)
