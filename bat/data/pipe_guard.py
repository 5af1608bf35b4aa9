"""Runs one command of ``pipe:`` and ends it together with its reader.

Started by ``bat.data.pipes`` as ``python -I -S pipe_guard.py COMMAND``, as the leader of its own
process group. Its standard input is a pipe that the reader holds open and never writes to: the pipe
closes when the reader ends, also by ``kill -9``, and then the whole group is killed. The command
starts with the default signal handlers: a loader worker ignores the signals meant for the run, and
its children would inherit that.

It imports nothing of bat (15 ms to start); the exit code is the command's.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys


def main(command: str) -> None:
    """Run ``command`` by the shell and exit with its exit code."""
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
