"""Divides a job among processes and machines: ``--part``, ``--on ray`` (docs/many_machines.md).

A job has ``units`` (shards, blocks of windows): each depends on the inputs and the settings alone,
and its result appears whole or not at all. Part k of n does the units from ``units (k - 1) / n`` to
``units k / n`` that are missing. Whoever finds that no unit is missing joins them; so the output
has the same bytes for any number of parts, and what is lost is done again and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

from bat.errors import UserError
from bat.redact import redact

RETRIES = 5
"""Times that Ray does a part again whose worker died."""
SLOW, SLOW_SECONDS = 2.0, 30.0
"""The last parts are begun once more after so many times the median, and at least so long."""
log = logging.getLogger("bat")
T_co = TypeVar("T_co", covariant=True)


class Part(NamedTuple):
    """Part ``number`` of ``total``, from 1."""

    number: int = 1
    total: int = 1
    joins: bool = True
    """False: another process joins."""

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads ``3/64``."""
        number, _, count = text.partition("/")
        with suppress(ValueError):
            if 1 <= int(number) <= int(count):
                return cls(int(number), int(count))
        raise UserError(f"--part {text}: K/N, the K-th of N parts, from 1/N to N/N")

    def of(self, units: int) -> range:
        """Returns the units of this part."""
        return range(units * (self.number - 1) // self.total, units * self.number // self.total)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Part()


class Job(Protocol[T_co]):
    """Work in units; ``noun`` names them."""

    noun: str

    @property
    def units(self) -> int: ...

    def finished(self) -> T_co | None:
        """Returns the joined result if it is there already."""

    def listed(self) -> set[int]:
        """Returns the units whose results are there."""

    def intact(self, unit: int) -> bool:
        """Returns False if the result of a unit is damaged; it counts as missing then."""

    def do(self, units: Sequence[int]) -> None:
        """Makes the results of ``units``."""

    def join(self) -> T_co | None:
        """Joins the results and removes what only parts need. ``UserError`` for damaged ones."""


def run(job: Job[T_co], part: Part = WHOLE, *, join_only: bool = False) -> T_co | None:
    """Does the missing units of ``part``, and joins all if none is missing then.

    Returns:
        The joined result; None: units of other parts are missing, or another part joins.

    Raises:
        UserError: ``join_only``, and units are missing.
    """
    if (made := job.finished()) is not None:
        return made
    if not join_only:
        mine, listed = part.of(job.units), job.listed()
        missing = [unit for unit in mine if unit not in listed or not job.intact(unit)]
        if len(missing) < len(mine):
            done = len(mine) - len(missing)
            log.info("continuing: %d of %d %s are there", done, len(mine), job.noun)
        job.do(missing)
    if not part.joins:
        return None
    lacking = sorted(set(range(job.units)) - job.listed())
    if lacking:
        if (made := job.finished()) is not None:  # joined meanwhile
            return made
        count = part.total if part.total > 1 else min(job.units, 64)
        said = f"{len(lacking)} of {job.units} {job.noun} are missing"
        said += f" ({_parts(lacking, job.units, count)})"
        if join_only:
            raise UserError(
                f"--join: {said}: run these parts, or the command without --part; other machines "
                "must write where this one reads"
            )
        log.info("part %s is done; %s: the last part to end joins all", part, said)
        return None
    try:
        return job.join()
    except FileNotFoundError:  # joined, and removed, by another process
        if (made := job.finished()) is not None:
            return made
        raise


def _parts(units: Sequence[int], total: int, count: int) -> str:
    """Names the parts, of ``count``, that hold ``units`` of ``total``."""
    held = [k for k in range(1, count + 1) if set(Part(k, count).of(total)).intersection(units)]
    names = [str(Part(k, count)) for k in held[:8]]
    return ", ".join(names) + f" and {len(held) - 8} other parts" * (len(held) > 8)


def on_ray(
    task: str, options: argparse.Namespace, *, address: str, count: int | None, cpus: int, gpu: bool
) -> None:
    """Runs all parts of a command on a Ray cluster; joins nothing.

    Args:
        task: ``module:function``, called as ``function(options)`` with ``options.part`` set.
        address: ``ray``: the cluster of ``RAY_ADDRESS``, else this machine; or
            ``ray://HOST:PORT``.
        count: number of parts; None: four for each that the cluster can do at once.
        cpus: cores of a part. gpu: a part needs a GPU where the cluster has some.

    Raises:
        UserError: Ray is missing or cannot be reached; of a part; a part whose workers all died.
    """
    ray = _connect(address)
    try:
        each = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = gpu and any(has.get("GPU", 0) for has in each)
        most = [has.get("GPU", 0) if gpu else math.inf for has in each]
        slots = sum(
            int(min(has.get("CPU", 0) // cpus, gpus)) for has, gpus in zip(each, most, strict=True)
        )
        if slots < 1:
            raise UserError(
                f"a part takes {cpus} cores{' and a GPU' * gpu}, and no machine of this Ray "
                "cluster has so many: lower --jobs (bat-embed, bat-predict: --workers)"
            )
        function = ray.remote(_on_worker).options(
            num_cpus=cpus, num_gpus=int(gpu), max_retries=RETRIES, retry_exceptions=[OSError]
        )
        total = count or 4 * slots
        log.info("%d parts on Ray, %d at once", total, slots)
        _await(ray, function, task, options, total, slots)
    finally:
        ray.shutdown()


def _await(
    ray: Any, function: Any, task: str, options: argparse.Namespace, total: int, slots: int
) -> None:
    """Submits the parts and waits for all; begins the last ones again where they take long."""
    from tqdm import tqdm

    def submit(number: int) -> Any:
        given = argparse.Namespace(**vars(options))
        given.part = Part(number, total, joins=False)
        return function.remote(task, given, os.getcwd())

    running = {submit(number): number for number in range(1, total + 1)}
    left, seconds = set(running.values()), list[float]()
    again, since = set[int](), time.monotonic()
    with tqdm(total=total, unit="part", disable=not options.progress) as bar:
        while left:
            for done in ray.wait(list(running), timeout=1.0)[0]:
                number = running.pop(done)
                if number not in left:
                    continue  # its other copy was first
                try:
                    seconds.append(ray.get(done))
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise UserError(f"part {number}/{total}: {error.cause}") from None
                    raise
                except ray.exceptions.RayError as error:
                    if number not in running.values():
                        why = redact(str(error)).strip().splitlines()[0][:200]
                        raise UserError(
                            f"part {number}/{total} died {RETRIES + 1} times ({why}): run the "
                            "same command again, if memory is short with fewer --jobs (--workers) "
                            "or a smaller --batch"
                        ) from None
                    continue
                left.remove(number)
                since = time.monotonic()
                bar.update()
            waited = time.monotonic() - since
            if (
                seconds
                and len(left) < slots
                and waited > max(SLOW_SECONDS, SLOW * _median(seconds))
            ):
                for number in left - again:  # a slow machine: whoever is first counts
                    log.info("part %d/%d takes long: begun once more", number, total)
                    running[submit(number)] = number
                again |= left
        for slow in running:
            ray.cancel(slow, force=True)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _on_worker(task: str, options: argparse.Namespace, folder: str) -> float:
    """Does one part in a process of Ray; returns the seconds that it took."""
    begin = time.monotonic()
    with suppress(OSError):
        os.chdir(folder)  # relative paths are those of the command, where its disk is shared
    options.progress = False
    module, _, name = task.partition(":")
    getattr(importlib.import_module(module), name)(options)
    return time.monotonic() - begin


def _connect(address: str) -> Any:
    """Starts or joins the cluster; returns the module ``ray``."""
    if address != "ray" and not address.startswith("ray://"):
        raise UserError(f"--on {address}: ray, or ray://HOST:10001")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # under `uv run` the workers would each build an environment: they take this one
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise UserError(f"--on {address} needs Ray: pip install 'bat-audio[ray]'") from None
    place = (os.environ.get("RAY_ADDRESS") or "local") if address == "ray" else address
    own: dict[str, Any] = {"include_dashboard": False} if place == "local" else {}
    try:
        ray.init(address=place, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises many kinds
        why = redact(str(error)).strip().splitlines()[0][:200]
        raise UserError(
            f"no Ray cluster answers at {place} ({why}): start one "
            "(`ray start --head`), or correct --on or RAY_ADDRESS"
        ) from None
    return ray
