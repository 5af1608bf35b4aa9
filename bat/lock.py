"""Locks a run folder for one process; the kernel releases the lock when the holder dies.

A POSIX record lock (``lockf``) on ``OUT/.lock``: it works across machines on NFS, and loader
workers, which inherit the open file, do not keep it after a kill (they would keep that of
``filelock``). The file names the holder and is removed at the end, together with the folder if it
is otherwise empty; a file left by a killed run does not block.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bat.errors import UserError

log = logging.getLogger("bat")

LOCK = ".lock"
ATTEMPTS = 100
"""Tries to lock a folder that others create and remove meanwhile."""
_held: set[str] = set()  # a record lock does not exclude its own process


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks ``folder`` (created if missing) while the body runs.

    Raises ``UserError`` with process, machine and time if another process holds it. On a file
    system without locks it warns and continues.
    """
    name = str(folder.resolve())
    if name in _held:  # do not even read: closing the file would release this process's lock
        raise UserError(f"out={folder} is in use by this very process: give another out=")
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    file = _lock(folder)
    _held.add(name)
    try:
        if file is not None:
            who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                file.truncate(0)
                file.write(json.dumps(who).encode() + b"\n")
        yield
    finally:
        _held.discard(name)
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)
            file.close()
        with contextlib.suppress(OSError):  # not empty: in use
            for empty in made:
                empty.rmdir()


def check_free(folder: Path) -> None:
    """Raises ``UserError`` if another process holds ``folder``; creates nothing."""
    if (folder / LOCK).is_file():
        with hold(folder):
            pass


def is_held(folder: Path) -> bool:
    """Returns True if a process holds ``folder``; takes no lock itself and changes nothing."""
    if str(folder.resolve()) in _held:  # closing the file would release this process's lock
        return True
    linux = sys.platform == "linux"
    layout, place = ("hhqqi", 0) if linux else ("qqihh", 3)  # struct flock; BSD's, macOS's
    asked = (fcntl.F_WRLCK, 0, 0, 0, 0) if linux else (0, 0, 0, fcntl.F_WRLCK, 0)
    try:
        with (folder / LOCK).open("rb") as file:
            told = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *asked))
        return bool(struct.unpack(layout, told)[place] != fcntl.F_UNLCK)
    except OSError:  # no such file, or a file system without locks
        return False


def _lock(folder: Path) -> BinaryIO | None:
    """Returns the open, locked file; None if the file system has no locks."""
    path = folder / LOCK
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < ATTEMPTS - 1:
                continue  # another holder ended and removed the empty folder
            raise UserError(f"cannot write to out={folder}: {error}; choose another") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            said = file.read()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_in_use(folder, said)) from error
            log.warning("no lock on out=%s (%s): see that no other run uses it", folder, error)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder ended and removed it between the two calls
    raise UserError(f"out={folder} cannot be locked: give another out=")


def _in_use(folder: Path, said: bytes) -> str:
    try:
        holder = "process {pid} on {host} since {since}".format(**json.loads(said))
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return f"out={folder} is in use by {holder}: wait for it to end, or give another out="
