"""Summarises a set of shards: clips, hours, labels and their balance, rates, splits.

The numbers are read from the tables beside the shards (``table.py``), so two million clips take
seconds and no audio is opened; a shard without a table is scanned. ``bat-shard`` prints
``Summary.text`` at its end and ``bat-shard info`` prints it alone; ``bat.report.data_plots`` draws
the same numbers.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from bat.data.manifest import Counts, Manifest, joint_vocabulary, label_pairs
from bat.data.sources import RetryPolicy, Shard, find, shown
from bat.data.table import MAX_TABLE_BYTES, ShardTable, load_table, scan
from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES

THREADS = 16
"""Threads that read tables of remote shards."""


@dataclass
class Summary:
    """Counts over the clips of some shards. n clips, C classes."""

    shards: int
    bytes: int
    clips: int
    vocabulary: list[str]
    label_counts: np.ndarray  # (C,) int64, clips that carry each class
    labels_per_clip: Counter[int]
    """``{number of labels: clips}``"""
    seconds: np.ndarray  # (n,) float32, NaN where neither JSON nor file gives it
    rates: Counter[str] = field(default_factory=Counter)
    """``{Hz: clips}``; clips of unknown rate are not counted."""
    codecs: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    folds: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """``{reason: members}``"""

    @property
    def total_seconds(self) -> float:
        """Total duration of the clips of known length."""
        return float(np.nansum(self.seconds, dtype=np.float64))

    @property
    def unknown(self) -> int:
        """Number of clips of unknown length."""
        return int(np.isnan(self.seconds).sum())

    @property
    def headline(self) -> str:
        """Returns ``400 clips, 33.3 min, 10 classes``."""
        classes = f", {len(self.vocabulary)} classes" if self.label_counts.sum() else ""
        return f"{self.clips:,} clips, {duration(self.total_seconds)}{classes}"

    def text(self) -> list[str]:
        """Returns the lines of ``bat-shard info``."""
        mean = self.clips and sum(k * n for k, n in self.labels_per_clip.items()) / self.clips
        lines = [
            f"clips     {self.clips} ({duration(self.total_seconds)}"
            + (f"; {self.unknown} of unknown length)" if self.unknown else ")"),
            f"shards    {self.shards} ({self.bytes / 1e6:.2f} MB)",
            f"length    {self._lengths()}",
            f"rates     {_counts(self.rates, ' Hz') or 'unknown'}",
            f"codecs    {_counts(self.codecs)}",
            f"splits    {_counts(self.splits) or 'none'}",
            f"folds     {_counts(self.folds) or 'none'}",
        ]
        if not self.label_counts.sum():
            lines.append("labels    none (fine for pre-training)")
        else:
            without = self.labels_per_clip.get(0, 0)
            most = max(self.labels_per_clip)
            spread = f"{mean:.2f} a clip, {most} at most" if most > 1 else "1 a clip"
            lines.append(f"labels    {len(self.vocabulary)} classes, {spread}, {without} without")
            lines += balance(self.vocabulary, self.label_counts)
        if self.left_out:
            lines.append(f"left out  {self.left_out.total()} ({_counts(self.left_out)})")
        return lines

    def _lengths(self) -> str:
        known = self.seconds[~np.isnan(self.seconds)]
        if not len(known):
            return "unknown: bat-shard SHARDS indexes them in place and finds out"
        low, middle, high = (float(f(known)) for f in (np.min, np.median, np.max))
        return f"{middle:.2f} s at the median, {low:.2f} to {high:.2f}"


def balance(vocabulary: Sequence[str], counts: np.ndarray) -> list[str]:
    """Describes how evenly ``counts`` (C,) are spread over the classes, in two or three lines."""
    order = np.argsort(-counts, kind="stable")
    named = [f"{vocabulary[i]} {counts[i]}" for i in order]
    lines = [
        f"balance   {counts.min()} clips in the smallest class, {np.median(counts):g} at the "
        f"median, {counts.max()} in the largest"
    ]
    if counts.min() == counts.max():
        return lines
    lines += [f"common    {', '.join(named[:5])}", f"rare      {', '.join(named[:-6:-1])}"]
    empty = int((counts == 0).sum())
    return [*lines, f"empty     {empty} of {len(counts)} classes"] if empty else lines


def duration(seconds: float) -> str:
    """Formats as ``3.0 s``, ``12.5 min`` or ``5.2 h``."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def plain_shards(source: Path | str) -> list[Shard]:
    """Returns the tars of a folder, of its sub-folders (``train/``, ``test/``), one tar, or a glob.

    Raises:
        UserError: nothing found, an unfinished folder, or compressed tars.
    """
    shards = find(source)
    packed = next((shard for shard in shards if shard.compressed), None)
    if packed is not None:
        raise UserError(f"{packed.place} is compressed: gunzip it first")
    return shards


def folder_of(place: Path | str) -> Path | str:
    """Returns the folder of a shard."""
    if isinstance(place, Path):
        return place.parent
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0], query="", fragment=""))


def table_of(place: Path | str, index_dir: Path | None = None) -> ShardTable:
    """Returns the table of a shard, saved or made; a remote shard is fetched if it has none."""
    if isinstance(place, Path):
        return load_table(place, index_dir) or scan(place)
    if (table := saved_table(place)) is not None:
        return table
    with fetched(place) as tar:
        return scan(tar)


def saved_table(url: str) -> ShardTable | None:
    """Returns the table beside a remote shard; None if there is none that may be read."""
    from bat.data.remote import read

    parts = urlsplit(url)
    path = parts.path.removesuffix(".tar") + ".idx.npz"
    beside = urlunsplit(parts._replace(path=path))
    try:
        saved = read(beside, limit=MAX_TABLE_BYTES, policy=RetryPolicy())
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise UserError(error.strerror) from None
    return ShardTable.load(io.BytesIO(saved), None)


@contextmanager
def fetched(place: Path | str) -> Iterator[Path]:
    """Gives the path of a shard; a remote one is fetched for as long as the body runs. ``OSError``
    if it cannot be read."""
    if isinstance(place, Path):
        yield place
        return
    from bat.data.remote import download, stat

    policy = RetryPolicy()
    with tempfile.TemporaryDirectory(prefix="bat-") as folder:
        path = Path(folder) / "shard.tar"
        found = stat(place, policy)
        if found.size is None:
            raise UserError(f"the server does not tell the size of {shown(place)}: copy it here")
        download(place, path, size=found.size, tag=found.tag, policy=policy)
        yield path


def summarise(source: Path | str, *, index_dir: Path | None = None) -> Summary:
    """Returns the summary of a folder of shards (or of its sub-folders, whose names are then
    splits).

    Raises:
        UserError: nothing found, or not shards.
    """
    shards = plain_shards(source)
    with ThreadPoolExecutor(THREADS if any(shard.remote for shard in shards) else 1) as pool:
        tables = list(pool.map(table_of, (s.place for s in shards), itertools.repeat(index_dir)))
    folders = dict.fromkeys(folder_of(shard.place) for shard in shards)
    found = (Manifest.load(folder) for folder in folders)
    manifests = [manifest for manifest in found if manifest is not None]
    vocabulary = joint_vocabulary(
        label_pairs(tables), [m.vocabulary for m in manifests if m.vocabulary]
    )
    counts = Counts(vocabulary)
    for shard, table in zip(shards, tables, strict=True):
        counts.add(shard.name, table, split=shard.split)
    total = counts.manifest(left_out=[], source="")
    reasons = [entry["reason"] for manifest in manifests for entry in manifest.left_out]
    if not reasons:  # the writer's list has the clips that are in no tar
        reasons = [reason for table in tables for reason in table.left_out.values()]
    clips = np.concatenate([table.clips for table in tables])
    return Summary(
        shards=len(tables),
        bytes=total.bytes,
        clips=total.clips,
        vocabulary=vocabulary,
        label_counts=np.array(total.label_counts, np.int64),
        labels_per_clip=Counter(clips["labels"].tolist()),
        seconds=_seconds(clips),
        rates=Counter(total.rates),
        codecs=Counter(AUDIO_SUFFIXES[codec] for codec in clips["codec"].tolist()),
        splits=Counter(total.splits),
        folds=Counter(total.folds),
        left_out=Counter(reason.split(":", 1)[0] for reason in reasons),
    )


def _seconds(clips: np.ndarray) -> np.ndarray:  # (n,) CLIP -> (n,) float32, NaN where unknown
    known = (clips["frames"] > 0) & (clips["rate"] > 0)
    rate = np.where(known, clips["rate"], 1)
    return np.where(known, clips["frames"] / rate, np.nan).astype(np.float32)


def _counts(counter: Counter[str], unit: str = "", most: int = 8) -> str:
    """Formats as ``train 320, test 80``: the largest first, folds in their order."""
    numeric = not unit and all(name.isdigit() for name in counter)
    pairs = sorted(counter.items(), key=lambda p: int(p[0]) if numeric else -p[1])
    shown = ", ".join(f"{name}{unit} {n}" for name, n in pairs[:most])
    return shown + (f", and {len(pairs) - most} others" if len(pairs) > most else "")
