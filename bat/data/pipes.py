"""Reads ``pipe:COMMAND``: a shard that a user's command writes to its standard output.

A command is run only after ``allow_pipes(True)``, which only the flag ``--allow-pipe`` calls: no
recipe, manifest or URL can do so. ``bat.data.sources.find`` checks this; the ``Shard`` that it
makes carries the permission to loader workers, however they are started. The output is read like
any other stream, from front to end, anew for each reader and epoch. A command ends with its reader,
however that ends: see ``pipe_guard``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Generator

from bat.data import pipe_guard
from bat.redact import redact

PREFIX = "pipe:"
PIECE_BYTES = 1 << 20
LAST_WORDS_BYTES = 4096
LEAVE_SECONDS = 30.0
"""Longest time that a command may run on after the end of its output."""
POLL_SECONDS = 0.5

_allowed = False


def allow_pipes(allow: bool) -> None:
    """Allow or forbid this process to run the commands of ``pipe:`` sources; forbidden at first."""
    global _allowed
    _allowed = allow


def pipes_allowed() -> bool:
    return _allowed


def output_of(command: str) -> Generator[bytes, None, None]:
    """Yields the output of ``command`` in pieces; kills the command if the generator is closed.

    Raises:
        OSError: at the end, if its exit code is not 0: the code and its last line of errors.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", pipe_guard.__file__, command],
        stdin=subprocess.PIPE,  # ends with this process
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its own process group, killed as a whole
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    out, errors = process.stdout.fileno(), process.stderr.fileno()
    words = b""
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor in (out, errors):
                selector.register(descriptor, selectors.EVENT_READ)
            until: float | None = None
            while until is None or process.poll() is None:
                ready = selector.select(POLL_SECONDS if until is None else 0.02)
                for key, _ in ready:
                    data = os.read(key.fd, PIECE_BYTES)
                    if key.fd == errors:
                        words = (words + data)[-LAST_WORDS_BYTES:]
                    if not data:
                        selector.unregister(key.fd)
                        until = time.monotonic() + LEAVE_SECONDS if key.fd == out else until
                    elif key.fd == out:
                        yield data
                if until is not None and time.monotonic() > until:
                    raise OSError(errno.EIO, "its command does not end after its output")
            while any(key.fd == errors for key, _ in selector.select(0)):
                data = os.read(errors, PIECE_BYTES)
                words = (words + data)[-LAST_WORDS_BYTES:]
                if not data:
                    break
        if process.returncode:
            raise OSError(errno.EIO, f"its command ended {_how(process.returncode, words)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        process.stderr.close()


def _how(code: int, words: bytes) -> str:
    text = "".join(c if c.isprintable() else "\n" for c in words.decode("utf-8", "replace"))
    said = ([line.strip() for line in redact(text).splitlines() if line.strip()] or [""])[-1][-300:]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"{how}: {said or 'it said nothing'}"
