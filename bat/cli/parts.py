"""Parses the flags that divide a command among machines: ``--part``, ``--join``, ``--on``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bat.errors import UserError


def add_parts(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("on many machines (docs/many_machines.md)")
    group.add_argument("--part", metavar="K/N", help="do the K-th of N parts; the last one joins")
    group.add_argument("--join", action="store_true", help="only join what the parts have made")
    group.add_argument("--on", metavar="ray[://HOST:PORT]", help="run the parts on a Ray cluster")
    group.add_argument("--parts", type=int, metavar="N", help="with --on (4 for each at once)")


def place(text: str) -> Path | str:
    """Parses a path; a URL stays a string."""
    from bat.data.sources import is_url

    return text if is_url(text) else Path(text)


def spread(options: argparse.Namespace, task: str, *, cpus: int, gpu: bool = False) -> None:
    """Runs the parts on Ray if the user asks for it; sets ``part`` and ``join`` for ``task``.

    ``task, cpus, gpu``: see ``bat.data.parts.on_ray``.
    """
    from bat.data.parts import WHOLE, Part, on_ray

    given = [f"--{name}" for name in ("part", "join", "on") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if options.parts is not None and (options.on is None or options.parts < 1):
        raise UserError(f"--parts {options.parts}: 1 or more, with --on ray")
    options.progress = True
    options.part = Part.parse(options.part) if options.part else WHOLE
    if options.on is not None:
        on_ray(task, options, address=options.on, count=options.parts, cpus=cpus, gpu=gpu)
        options.join = True
