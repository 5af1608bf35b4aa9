"""Joins the tables of many shards: in one file, and to one list of class names.

With one file, 2,000 shards open without reading 2,000 tables. The file is a copy for speed, kept in
the cache folder: it records what it was made from (``stamp``: places, sizes, times), and is made
anew if that differs from the present shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bat.data import table
from bat.data.table import CLIP, UNREADABLE, ShardTable
from bat.data.tar import temporary
from bat.errors import UserError
from bat.tasks.base import in_order
from bat.tasks.labels import by_number

MERGE_FROM = 64
"""Number of shards below which their tables are read one by one."""
HEAD = ("tar_bytes", "names", "ids", "splits", "left_out", "sha256", "mtime_ns", "events", "texts")
ARRAYS = ("clips", "labels", "keys")


def place_of(folder: Path | None, shards: Sequence[str]) -> Path | None:
    """Returns the place of the merged tables of ``shards``; None if there are too few shards or no
    folder."""
    if folder is None or len(shards) < MERGE_FROM:
        return None
    digest = hashlib.sha256("\n".join(shards).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"tables-{digest[:16]}.npz"


def recall(path: Path | None, stamp: Sequence[object]) -> list[ShardTable] | None:
    """Returns the tables kept at ``path``; None if there are none with this ``stamp``."""
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            if head["stamp"] != _digest(stamp):
                return None
            arrays = {name: file[name] for name in ARRAYS}
        if arrays["clips"].dtype != CLIP:
            return None
        ends = np.cumsum(np.array(head["counts"], np.int64).reshape(-1, 3), axis=0)
        if [len(a) for a in arrays.values()] != ends[-1].tolist():
            return None
        parts = {n: np.split(a, ends[:-1, i]) for i, (n, a) in enumerate(arrays.items())}
        rows = zip(head["tables"], *parts.values(), strict=True)
        return [
            ShardTable(clips=c, labels=ls, keys=k, **dict(zip(HEAD, row, strict=True)))
            for row, c, ls, k in rows
        ]
    except UNREADABLE:
        return None


def remember(path: Path | None, stamp: Sequence[object], tables: Sequence[ShardTable]) -> None:
    """Keep ``tables`` at ``path``, if it can be written."""
    if path is None:
        return
    head = {
        "stamp": _digest(stamp),
        "counts": [[len(getattr(t, name)) for name in ARRAYS] for t in tables],
        "tables": [[getattr(t, name) for name in HEAD] for t in tables],
    }
    temp = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temp.open("wb") as file:  # no fsync: a truncated zip does not load
            np.savez(
                file,
                head=np.frombuffer(json.dumps(head).encode(), np.uint8),
                clips=np.concatenate([t.clips for t in tables]),
                labels=np.concatenate([t.labels for t in tables]),
                keys=np.concatenate([t.keys for t in tables]),
            )
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)


def _digest(stamp: Sequence[object]) -> str:
    text = json.dumps([table.VERSION, CLIP.descr, *stamp])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


MAX_CLASSES = 100_000
"""Greatest number of classes; the targets of each clip of a batch have one entry for each."""


def joint_vocabulary(tables: Sequence[ShardTable], given: Sequence[list[str]]) -> list[str]:
    """Returns class names in the order of their indices.

    They come from the manifests where there are some; else from ``label_id`` (``by_number``); else
    they are the names, sorted, numbers by value.

    Args:
        given: the vocabularies of the manifests.

    Raises:
        UserError: manifests that disagree, a label that theirs lacks, more than ``MAX_CLASSES``.
    """
    names = {name for table in tables for name in table.names}
    most = max([len(names), *map(len, given)])
    if most > MAX_CLASSES:
        raise UserError(
            f"the shards have {most} class names, more than {MAX_CLASSES}: are they captions? "
            "data.labels=drop pre-trains without labels"
        )
    if given:
        for other in given[1:]:
            if other != given[0]:
                odd = sorted(set(other) ^ set(given[0]))
                what = f"{odd[0]!r} is in one only" if odd else "the order differs"
                raise UserError(
                    f"the data sets have different labels ({what}): write them with one "
                    "vocabulary, or pre-train without labels (data.labels=drop)"
                )
        strange = sorted(names - set(given[0]))
        if strange:
            raise UserError(
                f"label {strange[0]!r} is not in the vocabulary of manifest.json: `bat-shard "
                f"verify` names the clips"
            )
        return list(given[0])
    pairs = {pair for t in tables for pair in zip(t.names, t.ids, strict=True)}
    return by_number(pairs) or in_order(names)
