"""One tar being written: what webdataset's ``TarWriter`` would write, without its torch."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from bat.data.table import ShardTable, scan
from bat.data.tar import BLOCK
from bat.shard.pack import Packed


class ShardFile:
    """``shard-NUMBER.tar`` of ``out``: under a temporary name, hashed on its way."""

    def __init__(self, out: Path, number: int) -> None:
        self.path = out / f"shard-{number:05d}.tar"
        self.temp = out / f".{self.path.name}.tmp"
        self.file: BinaryIO = self.temp.open("wb")
        self.sha256 = hashlib.sha256()
        self.clips = self.bytes = 0

    def add(self, key: str, clip: Packed, meta: bytes) -> None:
        for suffix, data in sorted({clip.suffix: clip.data, "json": meta}.items()):
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size, header.mode, header.mtime = len(data), 0o644, 0
            header.uname = header.gname = "bat"
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        self.clips += 1

    def finish(self) -> ShardTable:
        """Close, index, and give the tar its name."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        table = scan(self.temp, self.sha256.hexdigest())
        assert len(table.clips) == self.clips, "the scanner disagrees with the writer"
        os.replace(self.temp, self.path)
        table.save(self.path.with_suffix(".idx.npz"))
        return table

    def _write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.bytes += len(data)
        self.file.write(data)
