"""Reads tar headers and makes sample keys, safely for foreign shards.

Headers are read by ``tarfile`` through ``ForwardFile``, which bounds the effect of a forged header;
nothing is unpacked, no link is followed (docs/security.md). Sample keys are
``[A-Za-z0-9_-]{1,80}``; others are escaped. A key ends at the *last* dot of a name, so
``song.v3.flac`` and ``song.v4.flac`` stay apart.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
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


class Member(NamedTuple):
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
    """A file from which ``tarfile`` reads headers: forward only, in bounded reads.

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
        """Raises ``TarError`` for a seek backwards, which only a forged size causes."""
        if to < self._at:
            raise TarError(f"it is damaged at byte {self._at}: it leads back to {to}")
        if self._seeks:
            self._file.seek(to)
            self._at = to
        while self._at < to:
            data = self._file.read(min(SKIP_BYTES, to - self._at))
            if not data:
                raise TarError(f"it breaks off at byte {self._at}", short=True)
            self._at += len(data)

    def read(self, size: int) -> bytes:
        """Raises ``TarError`` for a header of more than ``MAX_HEADER_BYTES``."""
        if size > MAX_HEADER_BYTES:
            raise TarError(f"it is damaged at byte {self._at}: a name of {size} bytes")
        self.block = self._file.read(size)
        self._at += len(self.block)
        return self.block

    def take(self, member: Member) -> bytes:
        """Reads the bytes of ``member``, the member returned last."""
        data: bytes = self._file.read(member.size)
        self._at += len(data)
        if len(data) != member.size:
            raise TarError(f"it breaks off at byte {self._at}", short=True)
        return data


def read_members(source: ForwardFile) -> Iterator[Member]:
    """Yields the members of a tar, in order, headers only (``tarfile`` reads them; nothing is
    unpacked).

    Raises:
        TarError: not a tar, damaged, or it ends without an end mark.
    """
    start = source.tell()
    try:
        tar = tarfile.TarFile(fileobj=source, encoding="utf-8", errors="backslashreplace")  # type: ignore[arg-type]
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all
            if info.size < 0:
                at = source.tell() - len(source.block)
                raise TarError(f"it is damaged at byte {at}: a size of {info.size}")
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


def members(file: BinaryIO, path: Path, start: int = 0) -> Iterator[Member]:
    """Yields the members of the tar ``path``; those of a truncated tar up to its end.

    Args:
        start: offset of a header at which to begin.

    Raises:
        UserError: ``path`` is not a tar, or is damaged between members.
    """
    file.seek(start)
    source = ForwardFile(file, seeks=True)
    try:
        yield from read_members(source)
    except TarError as error:
        if not error.short:
            what = (error.strerror or "").removeprefix("it ")
            raise UserError(f"{path} {what}: give uncompressed WebDataset shards") from error


def is_tar(file: BinaryIO) -> bool:
    """Return True if ``file`` begins like a tar."""
    try:
        return next(read_members(ForwardFile(file)), None) is not None
    except TarError:
        return False


def sample_key(member: str) -> str:
    """Returns the key of a member: its name without ``./`` and suffix, escaped."""
    return escape_key(os.path.splitext(member.removeprefix("./"))[0])


def temporary(path: Path) -> Path:
    """Returns a name beside ``path`` that is unique among processes, also on other machines."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file of ``data`` atomically: readers see the old or the new one."""
    temp = temporary(path)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
