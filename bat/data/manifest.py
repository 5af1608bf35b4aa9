"""``manifest.json``: what a folder of shards holds. Where it lies, the set is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bat.data.tar import write_atomic
from bat.shapes import UserError
from bat.tasks.base import Row

VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    name: str
    clips: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; ``manifest.json``."""

    shards: list[ShardInfo]
    clips: int
    seconds: float
    bytes: int
    vocabulary: list[str]
    """Class names; a ``label_id`` is an index into it."""
    left_out: list[dict[str, str]]
    """``{"key", "file", "reason"}`` of each clip that is not in the shards."""
    source: str
    """Hash of what the shards were made from: files, sizes, labels, options."""
    version: int = VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The manifest of ``folder``; None where there is none, or one of another program's.

        Raises:
            UserError: it is one of ours, but damaged or of another version.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_bytes())
            if not isinstance(fields, dict) or "source" not in fields:
                return None
            fields["shards"] = [ShardInfo(**shard) for shard in fields["shards"]]
            manifest = cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): write the shards again") from error
        if manifest.version != VERSION:
            raise UserError(f"{path} is version {manifest.version}, this bat reads {VERSION}")
        return manifest

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomic(folder / "manifest.json", text.encode())


def source_hash(
    rows: Sequence[Row],
    *,
    codec: str,
    sample_rate: int | None,
    shard_bytes: int,
    vocabulary: Sequence[str],
) -> str:
    """Hash over keys, file names, sizes and labels of ``rows`` and over the options."""
    options = [VERSION, codec, sample_rate, shard_bytes, list(vocabulary)]
    digest = hashlib.sha256(json.dumps(options).encode())
    for row in rows:
        try:
            size = os.stat(row.path).st_size
        except OSError:
            size = -1
        what = [row.key, row.path.name, size, row.labels, row.fold, row.split, row.start_seconds]
        digest.update(json.dumps(what).encode())
    return digest.hexdigest()
