"""Reads the rows of WebDataset shards, of bat and of the layouts of docs/data.md, to write them
anew.

From a clip's JSON it reads the labels (``bat.data.table.parse_labels``), ``mid``, ``id``, ``fold``,
``split``, ``start_seconds``, ``events``, ``text``. Other fields are dropped. Class names are in the
order of the manifest, else of ``label_id``, else sorted, as in ``bat.data.index``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bat.data.manifest import Manifest
from bat.data.sources import find
from bat.data.table import parse_labels, read_contents
from bat.data.tar import escape_key, sample_key
from bat.errors import UserError
from bat.tasks.base import LeftOut, Reading, Row
from bat.tasks.folder import split_of
from bat.tasks.labels import Labels, by_number, named


def read(source: Path, labels: Labels | None = None) -> Reading:
    """Returns the clips of local shards, each a span of its tar.

    Raises:
        UserError: no shards, no audio in them, an unknown label, manifests that disagree.
    """
    tars = [(Path(shard.place), split_of(shard.split) or None) for shard in find(source)]
    rows: list[Row] = []
    pairs: set[tuple[str, int]] = set()
    left_out: list[LeftOut] = []
    for tar, folder in tars:
        found = read_contents(tar)
        left_out += [
            LeftOut(sample_key(name), f"{tar.name}/{name}", why, folder)
            for name, why in found.left_out.items()
        ]
        for key, (member, suffix) in found.audio.items():
            meta = found.metas.get(key, {})
            pairs.update(listed := parse_labels(meta))
            names = tuple(name for name, _ in listed)
            rows.append(
                Row(
                    path=tar,
                    key=_name(meta.get("id"), key),
                    labels=names,
                    fold=_fold(meta.get("fold")),
                    split=meta["split"] if isinstance(meta.get("split"), str) else folder,
                    start_seconds=_seconds(meta.get("start_seconds")),
                    mids=_mids(meta.get("mid"), names),
                    span=(member.offset, member.size),
                    codec=suffix,
                    events=tuple(meta["events"]) if "events" in meta else None,
                    text=meta.get("text"),
                )
            )
    if not rows:
        raise UserError(f"{source}: its {len(tars)} shards hold no audio")
    reading = named(rows, labels, tars[0][0].parent)
    if reading.rows is rows:  # the names are those of the shards
        given = _given([tar.parent for tar, _ in tars])
        if given is not None:
            strange = sorted({name for name, _ in pairs} - set(given))
            if strange:
                raise UserError(f"label {strange[0]!r} is not in the manifest's vocabulary")
        order = given or by_number(pairs)
        reading = replace(reading, vocabulary=order) if order else reading
    why = Counter(entry.reason for entry in left_out)
    notes = [f"{n} members of the shards left out: {reason}" for reason, n in why.most_common()]
    return replace(reading, notes=notes + reading.notes, left_out=left_out)


def _given(folders: Sequence[Path]) -> list[str] | None:
    """Returns the vocabulary that the manifests of ``folders`` share; None if there is none."""
    manifests = [Manifest.load(place) for place in dict.fromkeys(folders)]
    given = [m.vocabulary for m in manifests if m is not None and m.vocabulary]
    for other in given[1:]:
        if other != given[0]:
            raise UserError(
                f"the shards of {folders[0]} and others have different vocabularies: give one "
                f"with --labels"
            )
    return given[0] if given else None


def _name(value: Any, key: str) -> str:
    """Returns the name that was escaped into ``key``, if the JSON gives it."""
    return value if isinstance(value, str) and escape_key(value) == key else key


def _fold(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 15 else None


def _seconds(value: Any) -> float:
    ok = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    return float(value) if ok else 0.0


def _mids(value: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    texts = tuple(x for x in values if isinstance(x, str))
    return texts if len(texts) == len(names) else ()
