"""Plans shards before anything is encoded: which rows, or pieces of a long one, go into which.

A plan depends on the rows and the settings alone, so any process, on any machine, can write any
shard. A shard is filled up to a size in bytes: exact where the files are kept as they are; where
they are encoded it is estimated from the sizes of the files, the seconds a byte that a few of each
kind have, and bytes a sample that are usual for the codec (``BYTES``), so a shard may be larger.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bat.audio.decode import DecodeError
from bat.data.tar import BLOCK, escape_key
from bat.shard.pack import SLACK, Recipe, Work, probed, works_of
from bat.tasks.base import Row

BYTES = {"wav": 2.0, "flac": 1.3, "keep": 1.3, "ogg": 0.5, "opus": 0.3}
"""Bytes of a sample of one channel; what ``keep`` cuts becomes FLAC."""
SAMPLES = 8
"""Files of each suffix that are opened."""
SECONDS_A_BYTE = 1 / 32_000  # of 16 bits at 16 kHz


class Place(NamedTuple):
    """The begin of a shard: ``work`` (``pack.works_of``) of row ``row``."""

    row: int = 0
    work: int = 0


class Kind(NamedTuple):
    """Means over some files of one suffix."""

    seconds_a_byte: float = SECONDS_A_BYTE
    rate: float = 0.0
    channels: float = 1.0


def plan(rows: Sequence[Row], recipe: Recipe, shard_bytes: int) -> list[Place]:
    """Returns where each shard begins, and the end of the last."""
    begins, held = [Place()], 0.0
    for r, (row, size) in enumerate(zip(rows, _sizes(rows, recipe), strict=True)):
        shares = [1.0]
        if recipe.clip_seconds is not None and size > shard_bytes:
            shares = [(work.stop - work.first) / work.count for work in works_of(row, recipe)]
        for w, share in enumerate(shares):
            if held and held + size * share > shard_bytes:
                begins.append(Place(r, w))
                held = 0.0
            held += size * share
    return [*begins, Place(len(rows))]


def works_between(
    rows: Sequence[Row], recipe: Recipe, begin: Place, end: Place
) -> Iterator[tuple[int, Work]]:
    """Yields (number of the row, work) of a shard."""
    for r in range(begin.row, end.row + (end.work > 0)):
        for w, work in enumerate(works_of(rows[r], recipe)):
            if begin <= (r, w) < end:
                yield r, work


def numbered(rows: Sequence[Row], recipe: Recipe) -> set[int]:
    """Returns the rows whose keys need their number added: the key, or that of one of its pieces,
    is another row's."""
    found, keys = set(), set[str]()
    for r, row in enumerate(rows):
        key = escape_key(row.key)
        if key in keys:
            found.add(r)
        keys.add(key)
    for r, row in enumerate(rows if recipe.clip_seconds is not None else ()):
        whole, _, piece = row.key.rpartition("_")
        if len(piece) >= 5 and piece.isdecimal() and escape_key(whole) in keys:
            found.add(r)
    return found


def _sizes(rows: Sequence[Row], recipe: Recipe) -> Iterator[float]:
    """Yields the bytes that each row takes in a shard."""
    kinds = _kinds(rows, recipe)
    for row, source in zip(rows, _sources(rows), strict=True):
        kind = kinds.get(row.suffix, Kind())
        seconds = source * kind.seconds_a_byte if row.seconds is None else row.seconds
        rate = recipe.sample_rate or kind.rate or 16_000
        cut = recipe.clip_seconds or max(seconds, 1e-9)
        pieces = seconds / cut if seconds > cut * (1 + SLACK) else 1.0
        audio = source
        if not _is_kept(kind, row, recipe) or pieces > 1:
            channels = kind.channels if recipe.channels == "keep" else 1.0
            audio = seconds * rate * channels * BYTES[recipe.codec]
        texts = [
            *row.labels,
            *row.mids,
            row.key,
            row.text or "",
            *("event" for _ in row.events or ()),
        ]
        said = 160 + sum(len(text) + 12 for text in texts)
        yield pieces * sum(BLOCK + -(-part // BLOCK) * BLOCK for part in (audio / pieces, said))


def _is_kept(kind: Kind, row: Row, recipe: Recipe) -> bool:
    same_rate = recipe.sample_rate in (None, round(kind.rate))
    mono = kind.channels == 1 or recipe.channels in (
        (None, "keep") if recipe.codec == "keep" else ("keep",)
    )
    return same_rate and mono and recipe.codec in ("keep", row.suffix)


def _sources(rows: Sequence[Row]) -> Iterator[float]:
    """Yields the bytes of each row in its source."""

    @functools.lru_cache(maxsize=64)  # the rows of a file are adjacent
    def size(path: Path) -> int:
        with suppress(OSError):
            return os.stat(path).st_size
        return 0

    cells: dict[Path, int] = {}
    for row in rows:
        if row.cell is not None:
            cells[row.path] = cells.get(row.path, 0) + 1
    for row in rows:
        if row.span is not None:
            yield row.span[1]
        elif row.seconds is not None:
            yield row.seconds / SECONDS_A_BYTE
        else:
            yield size(row.path) / cells.get(row.path, 1)


def _kinds(rows: Sequence[Row], recipe: Recipe) -> dict[str, Kind]:
    """Returns the means of each suffix, over ``SAMPLES`` rows; none where all files are kept."""
    if recipe == Recipe(min_seconds=recipe.min_seconds):
        return {}
    by_suffix: dict[str, list[Row]] = {}
    for row in rows:
        by_suffix.setdefault(row.suffix, []).append(row)
    return {suffix: _kind(some) for suffix, some in by_suffix.items()}


def _kind(rows: Sequence[Row]) -> Kind:
    picked = (
        [rows[i * len(rows) // SAMPLES] for i in range(SAMPLES)] if len(rows) > SAMPLES else rows
    )
    found = []
    for row, source in zip(picked, _sources(picked), strict=True):
        with suppress(DecodeError, OSError):
            found.append((source, probed(row)))
    if not found:
        return Kind()
    return Kind(
        sum(info.frames / info.sample_rate for _, info in found) / max(sum(s for s, _ in found), 1),
        sum(info.sample_rate for _, info in found) / len(found),
        sum(info.channels for _, info in found) / len(found),
    )
