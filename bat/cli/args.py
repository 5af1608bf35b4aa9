"""Parses the command line of all commands: flags with argparse, the rest as ``key=value``.

OmegaConf's own command-line parser would read ``--method cgp`` as a key, so flags are removed
first. A ``UserError`` prints one line on stderr and exits with code 2; ``--debug`` shows the
traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, redirect_stdout, suppress
from functools import partial
from typing import Any, NoReturn, Self, TextIO

from bat import __version__
from bat.errors import RESUME_ME, Interrupted, UserError
from bat.redact import redact_tree, shown


class _Parser(argparse.ArgumentParser):
    """Parser that suggests the closest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        for word in message.split()[2:] if message.startswith("unrecognized arguments") else []:
            flag = word.partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions)
            near = difflib.get_close_matches(flag, close, cutoff=0.85)
            if word.startswith("-") and not near and flag.lstrip("-") in self._settings():
                message += f". Settings have no dashes: {flag.lstrip('-')}=VALUE"
            elif word.startswith("-") and close:
                message += f". Did you mean {close[0]}?"
        super().error(message)

    def _settings(self) -> set[str]:
        from bat.cli import describe

        command = self.prog.removeprefix("bat-")
        if command not in describe.SCHEMAS:
            return set()
        return {"recipe", *(setting.key for setting in describe.settings(command))}

    lists: dict[str, Callable[[], dict[str, str]]]
    """Names with a line each that the help ends with, by heading."""

    def format_help(self) -> str:
        """Returns the help, with the recipes and components of the command listed."""
        lists = [f"\n{name}:\n{lines(found())}\n" for name, found in self.lists.items()]
        return super().format_help() + "".join(lists)


class _Settings(argparse.Action):
    """``--settings [NAME]``: prints settings and ends, without a recipe."""

    def __call__(self, p: argparse.ArgumentParser, args: Any, name: Any, flag: Any = None) -> None:
        from bat.cli.describe import find_settings

        try:
            print("\n".join(s.text() for s in find_settings(p.prog[4:], name)), flush=True)
        except UserError as error:
            p.error(str(error))
        except BrokenPipeError:
            _close_output()
        p.exit()


def lines(found: dict[str, str]) -> str:
    """Formats names with a line each."""
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name:<{width}}  {line}".rstrip() for name, line in found.items())


def parser(command: str, about: str, epilog: str) -> _Parser:
    """Returns the parser of ``bat-COMMAND`` with the flags that every command has."""
    p = _Parser(
        prog=f"bat-{command}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.lists = {}
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p.add_argument("--version", action="version", version=f"bat {__version__}")
    return p


def recipe_parser(command: str, about: str, epilog: str) -> _Parser:
    """Returns ``parser`` for commands that take ``recipe=`` and ``key=value``."""
    from bat.cli import describe

    p = parser(command, about, epilog)
    p.lists = {"recipes": lambda: describe.recipes(command)}
    if command == "probe":
        p.lists["methods"] = lambda: describe.components("probes")
    p.add_argument(
        "--settings", nargs="?", const="", action=_Settings, metavar="NAME", dest="listed",
        help="list all settings, or a section or key",
    )  # fmt: skip
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


def add_trust(p: argparse.ArgumentParser) -> None:
    """Adds ``--trust-remote-code``."""
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that an hf: checkpoint brings, as trust_remote_code=true",
    )


def trust(options: argparse.Namespace) -> list[str]:
    """Returns the setting of ``add_trust``'s flag."""
    return ["trust_remote_code=true"] if options.trust_remote_code else []


class Command(AbstractContextManager["Command"]):
    """One call of a command, with the parsed ``options`` and the exit ``code``.

    ``code``: 0; 2 for a user's mistake; 75 for a command that was ended by a signal or has saved
    and ended by itself (the same command resumes); 130 for a Ctrl-C without anything saved.
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
            if "bat.train.processes" in sys.modules:
                sys.modules["bat.train.processes"].destroy_groups()
        return True


class _Printable:
    """Standard output with control characters escaped, since it shows names of others' files, and
    without credentials."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(shown(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _code_of(error: BaseException, prog: str, debug: bool) -> int | None:
    """Prints a line about ``error`` on stderr and returns the exit code; None for an internal
    error, which keeps its traceback."""
    if isinstance(error, UserError) and not debug:
        print(f"{prog}: error: {shown(str(error))}", file=sys.stderr)
        return 2
    if isinstance(error, Interrupted):
        with suppress(ValueError):  # not the main thread
            for number in (signal.SIGTERM, signal.SIGUSR1):  # batch systems send several signals
                signal.signal(number, signal.SIG_IGN)
        print(
            f"{prog}: ended by {error}: the same command continues (exit code {RESUME_ME})",
            file=sys.stderr,
        )
        return RESUME_ME
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # `| head` closed the output
        _close_output()
        return 0
    if (remedy := _remedy(error)) and not debug:
        first = shown(str(error) or type(error).__name__).splitlines()[0]
        print(f"{prog}: error: {remedy} ({first})", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and not debug:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(
                f"{prog}: error: the disk is full ({shown(str(error))}). What was written before "
                "is whole; free some space, then run the same command again",
                file=sys.stderr,
            )
            return 2
        if error.filename is not None:  # a path that the user gave; the message is enough
            print(
                f"{prog}: error: {shown(os.fsdecode(error.filename))}: {error.strerror}: give "
                "another file or folder (--debug shows where it is used)",
                file=sys.stderr,
            )
            return 2
    return None


def _remedy(error: BaseException) -> str:
    """Returns what to do about an error of the machine or of a service; empty for others."""
    name, text = type(error).__name__, str(error)
    if name == "DistNetworkError" and "EADDRINUSE" in text:
        port = os.environ.get("MASTER_PORT", "?")
        return (
            f"port {port} is in use by another program: set MASTER_PORT={29500 + os.getpid() % 999}"
            ", or torchrun --master-port"
        )
    if name == "UsageError" and type(error).__module__.startswith("wandb"):
        return "log.wandb=online needs an account: type wandb login, or say log.wandb=offline"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "t allocate memory" in text:
        return (
            "there is too little memory: lower data.batch (commands without settings: --batch), "
            "take a smaller model (model=S), or say hardware.activation_checkpointing=true"
        )
    return ""


def _close_output() -> None:
    """Sends what standard output still holds nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ready(
    options: argparse.Namespace, command: str, extra: list[str], **how: Any
) -> Callable[[], Any]:
    """Returns what runs ``bat-COMMAND`` with the settings of ``options`` and ``extra``, or prints
    them. ``how``: see ``bat.api.runner``."""
    from bat import api

    config = api.settle(command, [*options.settings, *extra], check=not options.print_config)
    if options.print_config:
        from bat.config.compose import to_yaml

        return partial(print, to_yaml(redact_tree(config)), end="")
    run = api.runner(command, **how)
    return partial(run, config, dry_run=options.dry_run, force=options.force)
