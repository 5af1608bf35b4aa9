"""Reads a shard as a stream of bytes, unpacking gzip, without seeking backwards.

webdataset's own reader would read a member of any size into memory before it could be refused, and
its pipe would neither end its command with the reader nor keep the command out of messages; so
``tarfile`` reads the headers (``bat.data.tar``), and ``bat.data.pipes`` runs the command.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from bat.data.pipes import PREFIX, output_of
from bat.data.sources import RetryPolicy, Shard
from bat.data.tar import SKIP_BYTES, ForwardFile, Member, read_members

MAX_SHARD_BYTES = 1 << 38
"""Limit on the unpacked bytes of a shard; reading ends there."""
DRAIN_BYTES = 1 << 20
"""Bytes that may follow the end of a tar that a command writes (tar fills up its last block)."""


class _Pieces(io.RawIOBase):
    """A file over bytes that are received in pieces."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        n = min(len(target), len(self._left))
        target[:n], self._left = self._left[:n], self._left[n:]
        return n

    def close(self) -> None:
        self._pieces.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """gzip that returns the data before a damaged place."""

    def __init__(self, packed: io.BufferedReader) -> None:
        self._file = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._file.read1(len(target))
        target[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_stream(shard: Shard, policy: RetryPolicy) -> Iterator[io.BufferedIOBase]:
    """Opens the unpacked tar; gzip is recognised by its first bytes."""
    with contextlib.ExitStack() as stack:
        file: io.BufferedReader
        if shard.command:
            pieces = output_of(str(shard.place).removeprefix(PREFIX))
            file = stack.enter_context(io.BufferedReader(_Pieces(pieces), 1 << 17))
        elif isinstance(shard.place, Path):
            file = stack.enter_context(shard.place.open("rb"))
        else:
            from bat.data.remote import stream

            pieces = stream(shard.place, policy)
            file = stack.enter_context(io.BufferedReader(_Pieces(pieces), 1 << 17))
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        if packed:
            file = stack.enter_context(io.BufferedReader(_Unpacked(file), 1 << 17))
        yield file
        if shard.command:  # read to the end of its output, to get its exit code
            left = DRAIN_BYTES
            while left > 0 and (data := file.read(min(left, SKIP_BYTES))):
                left -= len(data)


def stream_members(
    file: io.BufferedIOBase,
) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """Yields (member, function that reads it now) of a tar that cannot be sought backwards.

    Raises:
        OSError: not a tar, damaged, or it ends too early.
    """
    source = ForwardFile(file)
    for member in read_members(source):
        if member.offset + member.size > MAX_SHARD_BYTES:
            raise OSError(27, f"it unpacks to more than {MAX_SHARD_BYTES} bytes")
        yield member, functools.partial(source.take, member)
