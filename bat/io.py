"""Writes files atomically, reads JSON lines, guesses which file a misspelt path means."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def missing(path: str | Path) -> str:
    """Returns "PATH does not exist", with the name beside it that was probably meant."""
    asked = Path(path).expanduser()
    with suppress(OSError), os.scandir(asked.parent) as entries:
        names = [entry.name for entry in itertools.islice(entries, 1000)]
        if close := difflib.get_close_matches(asked.name, names, n=1):
            return f"{path} does not exist (did you mean {asked.parent / close[0]}?)"
    return f"{path} does not exist"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ``metrics.jsonl``; a half-written last line is omitted."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def filter_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows that ``keep`` rejects and a half-written last line, atomically."""
    rows = [row for row in read_jsonl(path) if keep(row)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    write_atomic(path, (json.dumps(data, indent=2) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by a file of ``data`` atomically: readers see the old or the new one."""
    with replacing(path) as temp:
        temp.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, to which it is moved if the body succeeds."""
    temp = temporary(path)
    try:
        yield temp
        replace_durably(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """Returns a name beside ``path`` that is unique among processes, also on other machines."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def replace_durably(temporary: Path, target: Path) -> None:
    """Flushes ``temporary``, a file or folder, to disk, then renames it to ``target`` beside it;
    atomic, even in a power failure."""
    _flush(temporary)
    os.replace(temporary, target)
    with suppress(OSError):  # not supported by the file system; the file itself is complete
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
