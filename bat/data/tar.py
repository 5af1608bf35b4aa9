"""Reads tar headers and makes sample keys.

``tarfile`` reads the headers through ``ForwardFile``; nothing is unpacked and no link is followed
(docs/security.md). A sample key is ``[A-Za-z0-9_-]{1,80}``; other names are escaped. It ends at the
*last* dot of a name, so ``song.v3.flac`` and ``song.v4.flac`` are two samples.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bat.errors import UserError

BLOCK = 512
MAX_HEADER_BYTES = 1 << 16
"""Limit on the bytes of an extended header, such as one with a long name."""
SKIP_BYTES = 1 << 20


def escape_key(name: str) -> str:
    """Returns ``name`` if it is ``[A-Za-z0-9_-]{1,80}``; otherwise escapes it and appends its hash.

    >>> escape_key("song.v3")
    'song_v3-...8 hex digits...'
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:71]}-{digest}"


def sample_key(member: str) -> str:
    """Returns the key of a member: its name without ``./`` and suffix, escaped."""
    return escape_key(os.path.splitext(member.removeprefix("./"))[0])


class Member(NamedTuple):
    """A member of a tar: the place of its bytes."""

    name: str
    offset: int
    size: int
    regular: bool
    header: int = 0
    """CRC-32 of the header."""


class TarError(OSError):
    """A tar that cannot be read further; ``short``: it ends too early."""

    def __init__(self, text: str, *, short: bool = False) -> None:
        super().__init__(errno.EIO, text)
        self.short = short


class ForwardFile:
    """A file as ``tarfile`` reads headers from it: forward only, headers of a bounded size.

    Args:
        file: read from its present position.
        seeks: True if it can seek; otherwise it is skipped through by reading.
    """

    def __init__(self, file: Any, *, seeks: bool = False) -> None:
        self._file, self._seeks = file, seeks
        self._at: int = file.tell() if seeks else 0
        self.block = b""
        """The block read last: the member's header, when ``tarfile`` returns a member."""

    def tell(self) -> int:
        return self._at

    def seek(self, to: int) -> None:
        """Skip to ``to``; raises ``TarError`` for a seek backwards, which a forged size causes."""
        if to < self._at:
            raise TarError(f"it is damaged at byte {self._at}: it leads back to {to}")
        if self._seeks:
            self._file.seek(to)
            self._at = to
        while self._at < to:
            self.take(min(SKIP_BYTES, to - self._at))

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise TarError(f"it is damaged at byte {self._at}: a name of {size} bytes")
        self.block = self._file.read(size)
        self._at += len(self.block)
        return self.block

    def take(self, size: int) -> bytes:
        """Reads exactly ``size`` bytes; after a member was returned, its content begins here."""
        data: bytes = self._file.read(size)
        self._at += len(data)
        if len(data) != size:
            raise TarError(f"it breaks off at byte {self._at}", short=True)
        return data


def read_members(source: ForwardFile) -> Iterator[Member]:
    """Yields the members of a tar, in order; only headers are read.

    Raises:
        TarError: not a tar, damaged, or it ends without an end mark.
    """
    start = source.tell()
    try:
        tar = tarfile.TarFile(fileobj=source, encoding="utf-8", errors="backslashreplace")  # type: ignore[arg-type]
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all
            if info.size < 0:
                raise tarfile.ReadError(f"a size of {info.size}")
            regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
            crc = zlib.crc32(source.block)
            yield Member(info.name, info.offset_data, info.size, regular, crc)
    except tarfile.TarError as error:
        if "unexpected end" in str(error):
            raise TarError(f"it breaks off at byte {source.tell()}", short=True) from error
        at = source.tell() - len(source.block)
        text = "it is not a tar" if at == start else f"it is damaged at byte {at}: {error}"
        raise TarError(text) from error
    at = source.tell() - len(source.block)
    if len(source.block) < BLOCK:
        raise TarError(f"it ends at byte {at} without an end mark: it may be cut short", short=True)
    if source.block.strip(b"\0"):
        raise TarError(f"it is damaged at byte {at}")


def members(file: BinaryIO, path: Path) -> Iterator[Member]:
    """Yields the members of the tar ``path``; those of a truncated tar up to its end.

    Raises:
        UserError: ``path`` is not a tar, or is damaged between members.
    """
    try:
        yield from read_members(ForwardFile(file, seeks=True))
    except TarError as error:
        if not error.short:
            what = (error.strerror or "").removeprefix("it ")
            raise UserError(f"{path} {what}: give uncompressed WebDataset shards") from error
