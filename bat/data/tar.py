"""Tar headers and sample keys: what a foreign shard is allowed to say (STACK section 6).

A small ustar-header scanner of our own (pax and GNU long names included): it reads headers only,
unpacks nothing, and reports which members are regular files. Sample keys are
``[A-Za-z0-9_-]{1,80}``; others are escaped. A key ends at the *last* dot of a name, so
``song.v3.flac`` and ``song.v4.flac`` stay apart.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bat.errors import UserError

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20


def escape_key(name: str) -> str:
    """``name`` itself where it is ``[A-Za-z0-9_-]{1,80}``; otherwise made so, with a hash of it.

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


def _number(text: bytes) -> int:
    """A tar number: octal, or base-256 where the first bit is set."""
    if text[0] & 0x80:
        return int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
    return int(text.split(b"\0", 1)[0].strip() or b"0", 8)


def parse_header(block: bytes, offset: int) -> tuple[Member, bytes] | None:
    """The member that a 512-byte header describes and its type flag; None: not a header."""
    if len(block) != BLOCK or block[257:262] not in (b"ustar", b"\0\0\0\0\0"):
        return None
    try:
        checksum = sum(block) - sum(block[148:156]) + 8 * 32
        if _number(block[148:156]) != checksum:
            return None
        size = _number(block[124:136])
        if size < 0:
            return None
    except ValueError:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")
    kind = block[156:157]
    regular = kind in (b"0", b"\0")
    return Member(full, offset + BLOCK, size, regular, zlib.crc32(block)), kind


def pax_records(data: bytes) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of an extended header."""
    found = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        if not 4 < length <= len(data):
            break
        key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        found[key.decode()] = value.decode("utf-8", "backslashreplace")
        data = data[length:]
    return found


def long_name(data: bytes) -> str:
    """Of GNU tar's member ``././@LongLink``."""
    return data.rstrip(b"\0").decode("utf-8", "backslashreplace")


def members(file: BinaryIO, path: Path, start: int = 0) -> Iterator[Member]:
    """Members of a tar, in order, headers only.

    Args:
        start: where a header begins.

    Raises:
        UserError: ``path`` is not a tar, or is damaged between members.
    """
    end = os.fstat(file.fileno()).st_size
    fd, at, longer = file.fileno(), start, {}
    while at + BLOCK <= end:
        block = os.pread(fd, BLOCK, at)
        if not block.strip(b"\0"):
            return
        parsed = parse_header(block, at)
        if parsed is None:
            what = "is not a plain tar" if at == 0 else f"is damaged at byte {at}"
            raise UserError(f"{path} {what}: give uncompressed WebDataset shards")
        member, kind = parsed
        if kind in (b"x", b"L"):
            data = os.pread(fd, min(member.size, MAX_EXTENDED_BYTES), member.offset)
            try:
                longer = pax_records(data) if kind == b"x" else {"path": long_name(data)}
                longer["size"] = str(int(longer.get("size", -1)))
            except (ValueError, IndexError) as error:
                raise UserError(f"{path} is damaged at byte {at}: {error}") from error
        else:
            size = int(longer.get("size", -1))
            member = member._replace(
                name=longer.get("path", member.name), size=size if size >= 0 else member.size
            )
            longer = {}
            yield member
        at = member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK
    if at == 0:
        raise UserError(f"{path} is not a tar ({end} bytes)")


def sample_key(member: str) -> str:
    """Key of a member: its name without ``./`` and suffix, escaped."""
    return escape_key(os.path.splitext(member.removeprefix("./"))[0])


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process has, not on another machine either."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file of ``data``, so that a reader sees the old one or the new one."""
    temp = temporary(path)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
