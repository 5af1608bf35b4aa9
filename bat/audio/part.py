"""Reads a file that lies within another one, such as a member of a tar, by seeking."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

BUFFER = 1 << 16


class FilePart(NamedTuple):
    """``size`` bytes of the file at ``path`` from ``offset`` on."""

    path: Path
    offset: int
    size: int

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the part as a file of its own; raises ``OSError`` if that fails."""
        assert mode == "rb"
        return io.BufferedReader(_Part(self), BUFFER)


class _Part(io.RawIOBase):
    """The part as an unbuffered file."""

    def __init__(self, part: FilePart) -> None:
        self._part, self._at = part, 0
        self._fd = os.open(part.path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._at, self._part.size)[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._part.size - self._at))
        count = os.preadv(self._fd, [memoryview(buffer)[:count]], self._part.offset + self._at)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
