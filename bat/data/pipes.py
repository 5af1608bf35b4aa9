"""Reads ``pipe:COMMAND``: a shard that a user's command writes to its standard output.

A command is run only after ``allow_pipes(True)``, which only the flag ``--allow-pipe`` calls: no
recipe, manifest or URL can do so. ``bat.data.sources.find`` checks this; the ``Shard`` that it
makes carries the permission to loader workers. The output is read like any other stream, from
front to end, anew for each reader and epoch. A command is killed with its children when its reader
stops; where the reader itself is killed, the command ends when it next writes (SIGPIPE).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from bat.redact import redact

PREFIX = "pipe:"
LEAVE_SECONDS = 30.0
"""Longest time that a command may run on after the end of its output."""
DRAIN_BYTES = 1 << 20
"""Bytes that may follow the end of a tar (tar fills up its last block); a command that writes more
is killed."""

_allowed = False


def allow_pipes(allow: bool) -> None:
    """Allow or forbid this process to run the commands of ``pipe:`` sources; forbidden at first."""
    global _allowed
    _allowed = allow


def pipes_allowed() -> bool:
    return _allowed


@contextlib.contextmanager
def output_of(command: str) -> Iterator[BinaryIO]:
    """Opens the output of ``command``; kills the command at the end.

    Raises:
        OSError: at the end, if the output was read to its end and the exit code is not 0: the code
            and the last line of errors.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # its own process group, killed as a whole
        )
        assert process.stdout is not None
        broken: Exception | None = None
        try:
            try:
                yield process.stdout  # type: ignore[misc]
            except Exception as error:  # perhaps because the command failed
                broken = error
            if len(process.stdout.read(DRAIN_BYTES)) < DRAIN_BYTES:
                try:
                    code = process.wait(LEAVE_SECONDS)
                except subprocess.TimeoutExpired:
                    raise OSError(errno.EIO, "its command does not end after its output") from None
                if code:
                    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
                    raise OSError(errno.EIO, f"its command ended {_ended(code, errors.read())}")
            if broken is not None:
                raise broken
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _ended(code: int, errors: bytes) -> str:
    text = "".join(c if c.isprintable() else "\n" for c in errors.decode("utf-8", "replace"))
    lines = [line.strip() for line in redact(text).splitlines() if line.strip()]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"{how}: {lines[-1][-300:] if lines else 'it said nothing'}"
