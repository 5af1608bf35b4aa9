"""Runs one command of ``pipe:`` and sees to it that it ends with whoever reads it.

Started by ``bat.data.pipes`` as ``python -I -S pipe_guard.py COMMAND``, first of a process group of
its own. Its standard input is a pipe that the reader holds open and never writes to: it ends when
the reader does, ``kill -9`` included, and then the whole group is killed. The command has its
signals as a shell would find them: a loader worker, which ignores those meant for the run, hands
that down to its children.

It imports nothing of bat (15 ms to start); the exit code is the command's.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys


def main(command: str) -> None:
    """Run ``command`` by the shell and end as it did."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):  # reserved by the system's library
            continue
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    shell = os.fork()
    if shell == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv("/bin/sh", ["sh", "-c", command])
    os.close(1)  # the output ends when the command and its children have closed it
    os.close(2)
    _thread.start_new_thread(_end_with_the_reader, ())
    code = os.waitstatus_to_exitcode(os.waitpid(shell, 0)[1])
    if code < 0:
        os.kill(os.getpid(), -code)
        signal.pause()
    os._exit(code)


def _end_with_the_reader() -> None:
    os.read(0, 1)
    os.kill(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
