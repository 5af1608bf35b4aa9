"""Locks a folder of shards while it is written, and records progress: ``.bat-shard-in-progress``.

The file is a lock (one process at a time), a mark (no manifest yet: unfinished) and a journal: its
first line describes what is written, each later one a finished shard and the start of the next. A
line is written when its shard and the shard's index are on disk, so the finished shards of a killed
run are kept, and the run that continues it writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bat.data.manifest import Manifest
from bat.data.table import ShardTable
from bat.errors import UserError

MARKER = ".bat-shard-in-progress"


class Place(NamedTuple):
    """The first clip that is not in the finished shards."""

    row: int = 0
    work: int = 0
    """Number of the work within the row (``pack.works_of``)."""
    clip: int = 0
    """Number of the clip within the work (``pack.pack``), counting those left out."""


@dataclass(frozen=True)
class Finished:
    """A finished shard."""

    name: str
    next: Place
    left_out: list[dict[str, str]]
    """Clips left out before ``next``, since the previous shard."""


class Journal:
    """The journal of ``out``, open for writing."""

    def __init__(self, file: BinaryIO, out: Path, source: str) -> None:
        self.file, self.out, self.source = file, out, source

    def resume(self) -> list[tuple[Finished, ShardTable]]:
        """Returns the finished shards with their tables; removes everything unfinished.

        Raises:
            UserError: they were made from other files or with other options.
        """
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        found: list[tuple[Finished, ShardTable]] = []
        theirs, good = None, 0  # bytes of the journal that are valid
        try:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # truncated by a kill
                entry = json.loads(line)
                if theirs is None:
                    theirs = str(entry["source"])
                else:
                    name = f"shard-{len(found):05d}.tar"
                    place = Place(*map(int, entry["next"]))
                    tar = self.out / name
                    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
                    if table is None or table.sha256 != entry["sha256"]:
                        break
                    found.append((Finished(name, place, list(entry["left_out"])), table))
                good += len(line)
        except (ValueError, KeyError, TypeError, EOFError):  # EOFError: numpy, an empty index
            pass
        if found and theirs != self.source:
            raise UserError(
                f"{self.out} holds {len(found)} finished shards of an interrupted run with other "
                f"files or options: run that command again, or remove the folder"
            )
        sweep(self.out, keep={finished.name for finished, _ in found})
        self.file.truncate(good if found else 0)
        if not found:
            self._append({"source": self.source})
        return found

    def add(self, finished: Finished, table: ShardTable) -> None:
        """Record a shard that is on disk, with its index."""
        self._append({"next": finished.next, "sha256": table.sha256, "left_out": finished.left_out})

    def _append(self, entry: dict[str, object]) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def sweep(out: Path, *, keep: set[str]) -> None:
    """Remove the files of an interrupted run, except the shards named in ``keep``."""
    for pattern in ("shard-*.tar", "shard-*.idx.npz", ".shard-*.tmp", ".manifest.json.*.tmp"):
        for path in out.glob(pattern):
            if f"{path.name.split('.')[0]}.tar" not in keep:
                path.unlink()


@contextmanager
def claimed(out: Path, source: str) -> Iterator[Journal]:
    """Lock ``out`` for writing: one process at a time, and never over foreign shards.

    If the block fails, finished shards stay for the next run; without any, nothing stays.

    Raises:
        UserError: foreign shards lie there, or the folder cannot be written.
    """
    theirs = [*out.glob("*.tar"), *out.glob("manifest.json")]
    if theirs and not (out / MARKER).exists() and Manifest.load(out) is None:
        raise UserError(f"{out} holds shards that bat-shard did not write: give another folder")
    try:
        marker = _locked(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    with marker:
        try:
            yield Journal(marker, out, source)
        except BaseException as error:
            _leave(marker, out)
            if isinstance(error, OSError):
                why = f"{out} cannot be written: {error.strerror}"
                raise UserError(why) from error
            raise
        (out / MARKER).unlink(missing_ok=True)


def _locked(out: Path) -> BinaryIO:
    while True:
        out.mkdir(parents=True, exist_ok=True)
        marker = (out / MARKER).open("a+b")
        fcntl.flock(marker, fcntl.LOCK_EX)
        try:
            if os.fstat(marker.fileno()).st_ino == (out / MARKER).stat().st_ino:
                return marker
        except FileNotFoundError:
            pass
        marker.close()  # its holder has removed it, and there may be a new one


def _leave(marker: BinaryIO, out: Path) -> None:
    """Clean up after a failure: leave no partial file, and no folder without a finished shard."""
    if not (out / "manifest.json").exists():
        marker.seek(0)
        finished = max(0, len(marker.read().splitlines()) - 1)
        sweep(out, keep={f"shard-{i:05d}.tar" for i in range(finished)})
        if finished:
            return
    (out / MARKER).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
