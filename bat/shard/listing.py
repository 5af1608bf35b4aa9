"""Writes ``listing.csv``: which clips of a source's own list are missing, damaged or short.

Columns ``split, key, state, seconds, listed_seconds, file, reason``, a line for each clip that is
not whole: ``missing`` (no file), ``damaged`` (not decoded, or otherwise not in the shards) or
``short`` (in the shards, but shorter than the source states by more than ``SLACK_SECONDS``).
For sources that state lengths (AudioSet's segments).
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bat.data.manifest import Manifest
from bat.data.store import Store
from bat.data.table import ShardTable
from bat.data.tar import escape_key
from bat.shard.info import table_of
from bat.tasks.base import LeftOut, Row

NAME = "listing.csv"
SLACK_SECONDS = 0.1
"""Seconds by which a clip may be shorter than listed: encoders cut at their own frames."""
COLUMNS = ("split", "key", "state", "seconds", "listed_seconds", "file", "reason")


def write_listing(
    out: Path | str, folders: Mapping[Path | str, Sequence[Row]], absent: Iterable[LeftOut]
) -> list[str]:
    """Writes ``out/listing.csv`` of the shards in ``folders``; returns a line for each split.

    ``folders``: the rows that each folder's shards were made of, whole (recordings that were cut
    cannot be compared). ``absent``: clips that the source lists and does not hold.
    """
    lines: list[tuple[object, ...]] = []
    counts: dict[str, Counter[str]] = {}

    def add(split: str | None, key: str, state: str, *more: object) -> None:
        counts.setdefault(split or "", Counter())[state] += 1
        if state != "whole":
            lines.append((split or "", key, state, *more))

    for entry in absent:
        add(entry.split, entry.key, "missing", "", "", entry.file, entry.reason)
    for folder, rows in folders.items():
        manifest = Manifest.load(folder)
        assert manifest is not None, "written before"
        tables = (table_of(Store(folder).place_of(shard.name)) for shard in manifest.shards)
        seconds = {key: s for table in tables for key, s in _seconds(table)}
        reasons = {entry["key"]: entry for entry in manifest.left_out}
        for row in rows:
            if (said := reasons.get(row.key)) is not None:
                listed = f"{row.listed_seconds:g}"
                add(row.split, row.key, "damaged", "", listed, said["file"], said["reason"])
                continue
            found, wanted = seconds.get(escape_key(row.key)), row.listed_seconds
            is_short = found is not None and 0 < found < wanted - SLACK_SECONDS
            state = "short" if is_short else "whole"
            add(row.split, row.key, state, f"{found or 0:.3f}", f"{wanted:g}", row.name, "")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *lines])
    Store(out).write(NAME, text.getvalue().encode("utf-8", "backslashreplace"))
    return [
        f"{split or 'clips'}: {sum(count.values())} listed, "
        + ", ".join(f"{count[state]} {state}" for state in ("whole", "missing", "damaged", "short"))
        for split, count in counts.items()
    ]


def _seconds(table: ShardTable) -> Iterable[tuple[str, float]]:
    """Yields key and length of each clip, 0 if unknown."""
    for key, frames, rate in zip(
        table.key_list(), table.clips["frames"].tolist(), table.clips["rate"].tolist(), strict=True
    ):
        yield key, frames / rate if frames > 0 and rate > 0 else 0.0
