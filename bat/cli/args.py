"""Flags are argparse's, everything else is ``key=value``: what all commands share.

OmegaConf's own command-line reader takes ``--method cgp`` for a key, so the flags are peeled off
first. A user's mistake (``UserError``) ends in one line on stderr and exit code 2; ``--debug``
shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from contextlib import AbstractContextManager, ExitStack, redirect_stdout, suppress
from typing import Any, NoReturn, Self, TextIO

from bat import __version__
from bat.errors import RESUME_ME, Interrupted, UserError
from bat.redact import printable, redact_tree, shown


class _Parser(argparse.ArgumentParser):
    """Names the flag that a misspelt one is like."""

    def error(self, message: str) -> NoReturn:
        for word in message.split()[2:] if message.startswith("unrecognized arguments") else []:
            close = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions)
            if word.startswith("-") and close:
                message += f". Did you mean {close[0]}?"
        super().error(message)


def parser(command: str, about: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of ``bat-COMMAND`` with the flags every command has."""
    p = _Parser(
        prog=f"bat-{command}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p.add_argument("--version", action="version", version=f"bat {__version__}")
    return p


def recipe_parser(command: str, about: str, epilog: str) -> argparse.ArgumentParser:
    """As ``parser``, for the commands that take ``recipe=`` and ``key=value``."""
    p = parser(command, about, epilog)
    p.add_argument("settings", nargs="*", metavar="key=value", help="recipe=NAME and overrides")
    p.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="build everything, run one batch, train nothing"
    )
    p.add_argument(
        "--force", action="store_true", help="continue the run in out= with other settings"
    )
    return p


def own_recipe(options: argparse.Namespace) -> list[str]:
    """``recipe=own`` where ``data.csv`` is given and no recipe is."""
    words = {word.partition("=")[0] for word in options.settings}
    return ["recipe=own"] if "data.csv" in words and "recipe" not in words else []


class Command(AbstractContextManager["Command"]):
    """One call of a command: ``options`` parsed, and ``code``, what it ends with.

    ``code``: 0; 2 for a user's mistake; 75 for a command that was asked to end by a signal or has
    saved and ended by itself: the same command continues; 130 for a Ctrl-C that nothing was saved
    at.
    """

    def __init__(self, p: argparse.ArgumentParser, argv: list[str] | None) -> None:
        self.parser, self.code = p, 0
        self.options = p.parse_intermixed_args(argv)
        self._around = ExitStack()

    def __enter__(self) -> Self:
        from bat.shutdown import minding_signals

        self._around.enter_context(minding_signals())
        self._around.enter_context(redirect_stdout(_Printable(sys.stdout)))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        with self._around:
            try:
                if error is None:
                    sys.stdout.flush()
            except BrokenPipeError as broken:
                error = broken
            code = 0 if error is None else _code_of(error, self.parser.prog, self.options.debug)
            if code is None:
                return False
            self.code = code
            if "bat.train.ranks" in sys.modules:
                sys.modules["bat.train.ranks"].part()
        return True


class _Printable:
    """Standard output without control characters: names of others' files are printed there."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _code_of(error: BaseException, prog: str, debug: bool) -> int | None:
    """The exit code of a command that ``error`` ends, after a line about it on stderr; None for an
    error of ours, which keeps its traceback."""
    if isinstance(error, UserError) and not debug:
        print(f"{prog}: error: {shown(str(error))}", file=sys.stderr)
        return 2
    if isinstance(error, Interrupted):
        with suppress(ValueError):  # not the main thread
            for number in (signal.SIGTERM, signal.SIGUSR1):  # batch systems send several
                signal.signal(number, signal.SIG_IGN)
        print(
            f"{prog}: ended by {error}: the same command continues (exit code {RESUME_ME})",
            file=sys.stderr,
        )
        return RESUME_ME
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and not debug:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(
                f"{prog}: error: the disk is full ({shown(str(error))}). What was written before "
                "is whole; free some space, then run the same command again",
                file=sys.stderr,
            )
            return 2
        if error.filename is not None:  # a path that somebody gave, and nothing more to say of it
            print(
                f"{prog}: error: {shown(os.fsdecode(error.filename))}: {error.strerror}: give "
                "another file or folder (--debug shows where it is used)",
                file=sys.stderr,
            )
            return 2
    return None


def configure(args: argparse.Namespace, schema: Any, command: str, extra: list[str]) -> Any:
    """The resolved configuration, or None after ``--print-config`` printed it."""
    from bat.config.compose import compose, to_yaml

    config = compose(schema, command, [*args.settings, *extra])
    if args.print_config:
        print(to_yaml(redact_tree(config)), end="")
        return None
    return config
