"""A shard as its bytes come: unpacked where it is gzip, and read without going back.

The stdlib's ``tarfile`` in stream mode would build lists of members and follow links; this is
``bat.data.tar``'s scanner over a file that cannot seek, with caps on names and on what unpacks.
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
from bat.data.sources import Patience, Shard
from bat.data.tar import BLOCK, MAX_EXTENDED_BYTES, Member, long_name, parse_header, pax_records

MAX_SHARD_BYTES = 1 << 38
"""A shard that unpacks to more is left there."""
SKIP_BYTES = 1 << 20
RATIO, RATIO_FROM_BYTES = 100, 1 << 26
"""Beyond so many bytes, a shard that unpacks to ``RATIO`` times its size is left there: audio is no
such thing, and a file of a megabyte that keeps a loader worker busy for an hour is."""
DRAIN_BYTES = 1 << 20
"""So much may follow the end of a tar that a command writes (tar fills up its last block)."""


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces, self._left, self._taken = pieces, memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
            self._taken += len(self._left)
        n = min(len(target), len(self._left))
        target[:n], self._left = self._left[:n], self._left[n:]
        return n

    def tell(self) -> int:
        return self._taken

    def close(self) -> None:
        self._pieces.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """gzip that gives up where it unpacks to far more than it was, within a member too."""

    def __init__(self, packed: io.BufferedReader) -> None:
        self._packed, self._file, self._got = packed.raw, gzip.GzipFile(fileobj=packed), 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._file.read1(min(len(target), SKIP_BYTES))
        n = len(data)
        target[:n] = data
        self._got += n
        if self._got > RATIO_FROM_BYTES and self._got > RATIO * self._packed.tell():
            raise OSError(27, f"it unpacks to more than {RATIO} times its size")
        return n


@contextlib.contextmanager
def open_stream(shard: Shard, patience: Patience) -> Iterator[io.BufferedIOBase]:
    """The tar as it unpacks; gzip is told by its first bytes."""
    with contextlib.ExitStack() as stack:
        file: io.BufferedReader
        if shard.command:
            pieces = output_of(str(shard.place).removeprefix(PREFIX))
            file = stack.enter_context(io.BufferedReader(_Pieces(pieces), 1 << 17))
        elif isinstance(shard.place, Path):
            file = stack.enter_context(shard.place.open("rb"))
        else:
            from bat.data.remote import stat, stream

            size, tag = stat(shard.place, patience)
            pieces = stream(shard.place, size=size, tag=tag, patience=patience)
            file = stack.enter_context(io.BufferedReader(_Pieces(pieces), 1 << 17))
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        if packed:
            file = stack.enter_context(io.BufferedReader(_Unpacked(file), 1 << 17))
        yield file
        if shard.command:  # to the end of what it writes: there it tells how it went
            left = DRAIN_BYTES
            while left > 0 and (data := file.read(min(left, SKIP_BYTES))):
                left -= len(data)


def stream_members(
    file: io.BufferedIOBase,
) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """(member, how to read it now) of a tar that cannot be gone back in.

    Raises:
        OSError: not a tar, damaged, or it ends too early.
    """
    at, longer = 0, dict[str, str]()

    def take(size: int) -> bytes:
        nonlocal at
        data = file.read(size)
        at += len(data)
        if len(data) != size:
            raise OSError(5, f"it breaks off at byte {at}")
        return data

    while True:
        if at > MAX_SHARD_BYTES:
            raise OSError(27, f"it unpacks to more than {MAX_SHARD_BYTES} bytes")
        block = file.read(BLOCK)
        if not block:
            raise OSError(5, f"it ends at byte {at} without an end mark: it may be cut short")
        if not block.strip(b"\0") and at and len(block) == BLOCK:
            return
        parsed = parse_header(block, at)
        if parsed is None:
            raise OSError(5, f"it is damaged at byte {at}" if at else "it is not a tar")
        at += BLOCK
        member, kind = parsed
        if kind in (b"x", b"L"):
            if member.size > MAX_EXTENDED_BYTES:
                raise OSError(5, f"it is damaged at byte {at}: a name of {member.size} bytes")
            data = take(-(-member.size // BLOCK) * BLOCK)[: member.size]
            try:
                longer = pax_records(data) if kind == b"x" else {"path": long_name(data)}
                longer["size"] = str(int(longer.get("size", -1)))
            except (ValueError, IndexError) as error:
                raise OSError(5, f"it is damaged at byte {at}: {error}") from error
            continue
        size = int(longer.get("size", -1))
        size = size if size >= 0 else member.size
        end = at + -(-size // BLOCK) * BLOCK
        named = member._replace(name=longer.get("path", member.name), size=size)
        longer = {}
        yield named, functools.partial(take, size)
        while at < end:
            take(min(SKIP_BYTES, end - at))
