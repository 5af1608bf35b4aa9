"""Reads and writes ``manifest.json``: the contents of a folder of shards.

The manifest is written last, so a set of shards that has one is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import numpy as np

from bat.data.sources import SUFFIXES, RetryPolicy, shown
from bat.data.table import ShardTable
from bat.errors import UserError
from bat.io import write_atomic
from bat.redact import one_line
from bat.tasks.base import Row, in_order
from bat.tasks.labels import by_number

VERSION = 2
MAX_BYTES = 1 << 28
COUNT = 1 << 62
NAME = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,255}")
SHA256 = re.compile(r"([0-9a-f]{64})?")
"""The hash of a shard; empty: unknown."""
MAX_CLASSES = 100_000
"""Greatest number of classes; the targets of each clip of a batch have one entry for each."""
T = TypeVar("T")


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
    def load(cls, folder: Path | str) -> Manifest | None:
        """Reads the manifest of ``folder``, a URL if it is a string; None where there is none, or
        one of another program.

        Raises:
            UserError: it is one of bat's, but damaged, of another version, or over ``MAX_BYTES``.
        """
        if isinstance(folder, str):
            return remote_manifest(folder, RetryPolicy())
        path = folder / "manifest.json"
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes: no manifest is")
        return parse_manifest(path.read_bytes(), str(folder))

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        write_atomic(folder / "manifest.json", self.text().encode("utf-8", "backslashreplace"))

    def text(self) -> str:
        """Returns the file's text, one line for each clip left out (there may be a million)."""
        said = vars(self) | {"shards": [asdict(shard) for shard in self.shards], "left_out": []}
        text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        if self.left_out:
            lines = ",\n  ".join(json.dumps(e, ensure_ascii=False) for e in self.left_out)
            text = text.replace('"left_out": []', f'"left_out": [\n  {lines}\n ]')
        return text

    def damage(self, sizes: Mapping[str, int]) -> str | None:
        """Returns which shards a folder of files of ``sizes`` lacks or has in another size; None if
        there are none."""
        for shard in self.shards:
            size = sizes.get(shard.name)
            if size is None:
                return f"{shard.name} is missing"
            if size != shard.bytes:
                return f"{shard.name} has {size} bytes, its manifest.json says {shard.bytes}"
        return None


def parse_manifest(data: bytes, folder: str) -> Manifest | None:
    """Reads the manifest ``data`` of ``folder``, as ``Manifest.load``."""
    path = f"{folder}/manifest.json"
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict) or "source" not in fields:
            return None
        if fields["version"] != VERSION:
            raise UserError(
                f"{path} is version {fields['version']}, this bat reads {VERSION}: remove it "
                f"and run bat-shard {folder}, or write the shards again"
            )
        fields["shards"] = [_checked(ShardInfo, shard) for shard in fields["shards"]]
        made = _checked(Manifest, fields)
        for shard in made.shards:
            if not (NAME.fullmatch(shard.name) and SHA256.fullmatch(shard.sha256)):
                raise ValueError(f"name or sha256 of shard {shard.name!r:.80} cannot be one")
        made.vocabulary[:] = map(one_line, made.vocabulary)
        return made
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): write the shards again") from error


_kinds: Any = functools.cache(get_type_hints)


def _checked(cls: type[T], fields: dict[str, Any]) -> T:
    """Returns ``cls(**fields)``; raises ``ValueError`` for a field that is not of its type."""
    kinds = _kinds(cls)
    for name, value in fields.items():
        if not _conforms(value, kinds[name]):
            raise ValueError(f"its {name} {value!r:.80} cannot be {cls.__annotations__[name]}")
    return cls(**fields)


def _conforms(value: Any, kind: Any) -> bool:
    """Returns True if ``value`` is of the type ``kind``, numbers being counts below ``COUNT``."""
    inner = get_args(kind)
    if inner and type(value) is not get_origin(kind):
        return False
    if isinstance(value, list):
        return all(_conforms(item, inner[0]) for item in value)
    if isinstance(value, dict):
        return all(_conforms(k, inner[0]) and _conforms(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < COUNT
    return type(value) is kind


class Counts:
    """Sums up the tables of shards to the counts of a manifest."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self.shards: list[ShardInfo] = []
        self._labels: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._folds: Counter[int] = Counter()
        self._rates: Counter[int] = Counter()

    def add(self, name: str, table: ShardTable, *, split: str = "") -> None:
        """Count the shard ``name``. A label outside the vocabulary is not counted.

        Args:
            split: of the clips whose JSON names none; empty: they are in no split.
        """
        clips = table.clips
        per_name = np.bincount(table.labels, minlength=len(table.names)).tolist()
        self._labels.update(dict(zip(table.names, per_name, strict=True)))
        for i, label in [*enumerate(table.splits), (-1, split)]:
            if label:
                self._splits[label] += int((clips["split"] == i).sum())
        self._folds.update(clips["fold"][clips["fold"] >= 0].tolist())
        self._rates.update(clips["rate"][clips["rate"] >= 1].tolist())
        known = (clips["frames"] > 0) & (clips["rate"] > 0)
        seconds = float((clips["frames"][known] / clips["rate"][known]).sum())
        self.shards.append(
            ShardInfo(name, len(clips), table.tar_bytes, table.sha256, round(seconds, 3))
        )

    def manifest(self, *, left_out: list[dict[str, str]], source: str) -> Manifest:
        """Returns the manifest of the shards added."""
        shards = self.shards
        return Manifest(
            shards=shards,
            clips=sum(s.clips for s in shards),
            seconds=round(sum(s.seconds for s in shards), 3),
            bytes=sum(s.bytes for s in shards),
            vocabulary=self.vocabulary,
            label_counts=[self._labels[name] for name in self.vocabulary],
            splits=dict(sorted((+self._splits).items())),
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
        said += [part for part in (row.events, row.text, row.seconds) if part is not None]
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
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise UserError(error.strerror) from None
    manifest = parse_manifest(data, shown(folder))
    for entry in manifest.shards if manifest else ():
        if not unquote(entry.name).endswith(SUFFIXES):
            raise UserError(f"{shown(folder)}/manifest.json lists {entry.name!r}: not a shard")
    return manifest


def label_pairs(tables: Iterable[ShardTable]) -> set[tuple[str, int]]:
    """Returns (name, number or -1) of the labels of ``tables``."""
    return {pair for table in tables for pair in zip(table.names, table.ids, strict=True)}


def joint_vocabulary(pairs: set[tuple[str, int]], given: Sequence[list[str]]) -> list[str]:
    """Returns class names in the order of their indices.

    They come from the manifests where there are some; else from ``label_id`` (``by_number``); else
    they are the names, sorted, numbers by value.

    Args:
        pairs: see ``label_pairs``.
        given: the vocabularies of the manifests.

    Raises:
        UserError: manifests that disagree, a label that theirs lacks, more than ``MAX_CLASSES``.
    """
    names = {name for name, _ in pairs}
    most = max([len(names), *map(len, given)])
    if most > MAX_CLASSES:
        raise UserError(
            f"the shards have {most} class names, more than {MAX_CLASSES}: are they captions? "
            "data.labels=drop pre-trains without labels"
        )
    if not given:
        return by_number(pairs) or in_order(names)
    for other in given[1:]:
        if other != given[0]:
            odd = sorted(set(other) ^ set(given[0]))
            what = f"{odd[0]!r} is in one only" if odd else "the order differs"
            raise UserError(
                f"the data sets have different labels ({what}): write them with one vocabulary, or "
                "pre-train without labels (data.labels=drop)"
            )
    unknown = sorted(names - set(given[0]))
    if unknown:
        raise UserError(
            f"label {unknown[0]!r} is not in the vocabulary of manifest.json: `bat-shard verify` "
            "names the clips"
        )
    return list(given[0])
