"""Writes one tar, by webdataset's ``TarWriter``, and its index."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from bat.data.table import ShardTable, scan
from bat.data.tar import BLOCK
from bat.shard.pack import Packed


class ShardFile:
    """``shard-NUMBER.tar`` of ``out``: under a temporary name, hashed while it is written."""

    def __init__(self, out: Path, number: int) -> None:
        os.environ.setdefault("WDS_SECURE", "1")  # no shell from URLs, no pickle
        from webdataset import TarWriter

        self.path = out / f"shard-{number:05d}.tar"
        self.temp = out / f".{self.path.name}.tmp"
        self.file: BinaryIO = self.temp.open("wb")
        self.sha256 = hashlib.sha256()
        self.clips = self.bytes = 0  # so far; ``TarWriter`` buffers some of them
        self._tar = TarWriter(self, user="bat", group="bat", mode=0o644, mtime=0, encoder=False)

    def add(self, key: str, clip: Packed, meta: bytes) -> None:
        self._tar.write({"__key__": key, clip.suffix: clip.data, "json": meta})
        self.bytes += sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in (clip.data, meta))
        self.clips += 1

    def finish(self) -> ShardTable:
        """Close the tar, index it, and rename it to its final name."""
        self._tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        table = scan(self.temp, self.sha256.hexdigest())
        assert len(table.clips) == self.clips, "the scanner disagrees with the writer"
        os.replace(self.temp, self.path)
        table.save(self.path.with_suffix(".idx.npz"))
        return table

    def write(self, data: bytes) -> int:
        """Write the next bytes of the tar."""
        if self.file.closed:  # abandoned; ``tarfile`` flushes when collected
            return len(data)
        self.sha256.update(data)
        return self.file.write(data)
