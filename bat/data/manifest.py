"""Reads and writes ``manifest.json``: the contents of a folder of shards.

The manifest is written last, so a set of shards that has one is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from bat.data.sources import SUFFIXES, RetryPolicy, shown
from bat.data.table import ShardTable
from bat.data.tar import write_atomic
from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import Row

VERSION = 2
MAX_BYTES = 1 << 28
COUNT = 1 << 62


@dataclass(frozen=True)
class ShardInfo:
    name: str
    clips: int
    bytes: int
    sha256: str
    seconds: float
    """Total duration of the clips of known length."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards, kept in ``manifest.json``."""

    shards: list[ShardInfo]
    clips: int
    seconds: float
    bytes: int
    vocabulary: list[str]
    """Class names; a ``label_id`` is an index into it."""
    label_counts: list[int]
    """Number of clips that carry each class of ``vocabulary``."""
    splits: dict[str, int]
    """Number of clips of each split; clips without one are not counted. The same holds for the two
    fields below."""
    folds: dict[str, int]
    rates: dict[str, int]
    """Number of clips at each sample rate, Hz."""
    left_out: list[dict[str, str]]
    """``{"key", "file", "reason"}`` of each clip that is not in the shards."""
    source: str
    """Hash of what the shards were made from, see ``source_hash``."""
    version: int = VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """Reads the manifest of ``folder``; None where there is none, or one of another program.

        Raises:
            UserError: it is one of bat's, but damaged, of another version, or over ``MAX_BYTES``.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes: no manifest is")
        try:
            fields = json.loads(path.read_bytes())
            if not isinstance(fields, dict) or "source" not in fields:
                return None
            if fields["version"] != VERSION:
                raise UserError(
                    f"{path} is version {fields['version']}, this bat reads {VERSION}: remove it "
                    f"and run bat-shard {folder}, or write the shards again"
                )
            fields["shards"] = [ShardInfo(**shard) for shard in fields["shards"]]
            made = cls(**fields)
            made._check()
            return replace(made, vocabulary=[*map(one_line, made.vocabulary)])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): write the shards again") from error

    def _check(self) -> None:
        """Raise ``ValueError`` for a field of the wrong type."""

        def count(*values: Any) -> bool:
            return all(type(value) is int and 0 <= value < COUNT for value in values)

        def seconds(value: Any) -> bool:
            return type(value) in (int, float) and 0 <= value < COUNT

        def texts(value: Any) -> bool:
            return type(value) is list and all(type(text) is str for text in value)

        for shard in self.shards:
            name, sha256 = shard.name, shard.sha256
            if type(name) is not str or not re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]{1,255}", name):
                raise ValueError(f"{name!r:.80} is not the name of a shard")
            if not count(shard.clips, shard.bytes) or not seconds(shard.seconds):
                raise ValueError(f"clips, bytes or seconds of {name} are no counts")
            if type(sha256) is not str or not re.fullmatch(r"([0-9a-f]{64})?", sha256):
                raise ValueError(f"sha256 of {name} is none")
        tables = (self.splits, self.folds, self.rates)
        if not (
            count(self.clips, self.bytes, *self.label_counts)
            and seconds(self.seconds)
            and texts(self.vocabulary)
            and all(texts(list(table)) and count(*table.values()) for table in tables)
            and all(texts([*entry, *entry.values()]) for entry in self.left_out)
        ):
            raise ValueError("its totals are no counts, or its names no text")

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, one line for each clip left out (there may be a million)."""
        said = vars(self) | {"shards": [asdict(shard) for shard in self.shards], "left_out": []}
        text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        if self.left_out:
            lines = ",\n  ".join(json.dumps(e, ensure_ascii=False) for e in self.left_out)
            text = text.replace('"left_out": []', f'"left_out": [\n  {lines}\n ]')
        data = text.encode("utf-8", "backslashreplace")  # a lone surrogate is escaped as in JSON
        write_atomic(folder / "manifest.json", data)

    def damage(self, folder: Path) -> str | None:
        """Returns which shards ``folder`` lacks or has in another size; None if there are none."""
        for shard in self.shards:
            try:
                size = (folder / shard.name).stat().st_size
            except OSError:
                return f"{shard.name} is missing"
            if size != shard.bytes:
                return f"{shard.name} has {size} bytes, its manifest.json says {shard.bytes}"
        return None


class Counts:
    """Sums up the tables of shards to the counts of a manifest."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self.shards: list[ShardInfo] = []
        self._number = {name: i for i, name in enumerate(self.vocabulary)}
        self._labels = np.zeros(len(self.vocabulary), np.int64)
        self._splits: Counter[str] = Counter()
        self._folds: Counter[int] = Counter()
        self._rates: Counter[int] = Counter()

    def add(self, name: str, table: ShardTable) -> ShardInfo:
        """Count the shard ``name``. A label outside the vocabulary is not counted."""
        clips = table.clips
        per_name = np.bincount(table.labels, minlength=len(table.names))
        for label, count in zip(table.names, per_name.tolist(), strict=True):
            if label in self._number:
                self._labels[self._number[label]] += count
        split = clips["split"]
        for i, label in enumerate(table.splits):
            self._splits[label] += int((split == i).sum())
        for counter, field, least in ((self._folds, "fold", 0), (self._rates, "rate", 1)):
            values, counts = np.unique(clips[field], return_counts=True)
            known = values >= least
            counter.update(dict(zip(values[known].tolist(), counts[known].tolist(), strict=True)))
        known = (clips["frames"] > 0) & (clips["rate"] > 0)
        seconds = float((clips["frames"][known] / clips["rate"][known]).sum())
        info = ShardInfo(name, len(clips), table.tar_bytes, table.sha256, round(seconds, 3))
        self.shards.append(info)
        return info

    def manifest(self, *, left_out: list[dict[str, str]], source: str) -> Manifest:
        """Returns the manifest of the shards added."""
        shards = self.shards
        return Manifest(
            shards=shards,
            clips=sum(s.clips for s in shards),
            seconds=round(sum(s.seconds for s in shards), 3),
            bytes=sum(s.bytes for s in shards),
            vocabulary=self.vocabulary,
            label_counts=self._labels.tolist(),
            splits=dict(sorted(self._splits.items())),
            folds={str(k): n for k, n in sorted(self._folds.items())},
            rates={str(k): n for k, n in sorted(self._rates.items())},
            left_out=left_out,
            source=source,
        )


def source_hash(rows: Sequence[Row], *, vocabulary: Sequence[str], **options: Any) -> str:
    """Returns a hash over all that determines the bytes of the shards: if it is equal, nothing is
    written.

    It covers for each row its key, labels, mids, fold, split, start and place in its file; and for
    the file (the tar or the parquet file that holds the row) its name, size and modification time,
    so that a file that was rewritten with the same length counts as another. The location of the
    file and the clips that the source lists and does not hold are not covered. A copy whose times
    were not kept (``cp`` without ``-p``) has another hash, and gives the same shards.
    """
    head = [VERSION, sorted(options.items()), list(vocabulary)]
    digest = hashlib.sha256(json.dumps(head).encode())

    @functools.lru_cache(maxsize=64)  # the rows of a tar are adjacent
    def state(path: Path) -> tuple[int, int]:
        try:
            found = os.stat(path)
            return found.st_size, found.st_mtime_ns
        except OSError:
            return -1, -1

    for row in rows:
        place = [row.path.name, *state(row.path), row.span, row.cell, row.codec]
        said: list[Any] = [row.labels, row.mids, row.fold, row.split, row.start_seconds]
        said += [part for part in (row.events, row.text) if part is not None]
        digest.update(json.dumps([row.key, *place, *said]).encode())
    return digest.hexdigest()


def remote_manifest(folder: str, policy: RetryPolicy) -> Manifest | None:
    """Reads the manifest of a remote folder; None where there is none.

    Raises:
        UserError: damaged, or the server cannot be reached.
    """
    from bat.data.remote import read

    try:
        data = read(f"{folder}/manifest.json", limit=MAX_BYTES, policy=policy)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(error.strerror) from None
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "manifest.json").write_bytes(data)
        try:
            manifest = Manifest.load(Path(name))
        except UserError as error:
            raise UserError(str(error).replace(name, shown(folder))) from None
    for entry in manifest.shards if manifest else ():
        if not re.fullmatch(r"[^/\\]+", entry.name) or not unquote(entry.name).endswith(SUFFIXES):
            raise UserError(f"{shown(folder)}/manifest.json lists {entry.name!r}: not a shard")
    return manifest
