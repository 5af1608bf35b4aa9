"""Computes a result for each window of many recordings in parts, and joins them into one output.

A part is a fixed range of windows; its results lie in ``OUT.parts/part-00000.npz``, which appears
whole or not at all. The same command computes the parts that are missing. Process r of n (torchrun:
``RANK``, ``WORLD_SIZE``; on several machines with ``OUT`` on a shared disk) takes a contiguous
range of parts, and process 0 joins all of them, part after part, removes them and writes the
manifest. Parts and batches depend only on the inputs and the settings, so the output has the same
bytes however often it was interrupted and however many processes there were.

Files: ``OUT``, ``OUT.json`` (the manifest: settings and counts) and, if something was left out,
``OUT.skipped.csv``; of a folder ``OUT/manifest.json`` and ``OUT/skipped.csv``.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bat import __version__
from bat.data.loader import Loader
from bat.errors import UserError
from bat.eval.encoding import progress_bar
from bat.interfaces.recordings import Batches, LeftOut, Recordings, WindowReader, Windows
from bat.io import replace_durably, temporary, write_json
from bat.types import WaveBatch

log = logging.getLogger("bat")

PART_BYTES = 1 << 26
"""Bytes of results that a part holds at most, about."""
MOST_PARTS = 64
"""Parts that a small job has at most, so that this many processes have some."""
MAX_PART = 4096
"""Greatest number of windows of a part."""
POLL_SECONDS = 0.2
SAY_SECONDS = 60.0


class Block(NamedTuple):
    """Results of some windows."""

    rows: NDArray[np.int64]
    """(n,) windows, ascending."""
    counts: NDArray[np.int64]
    """(n,) results of each."""
    values: NDArray[Any]
    """(sum of counts, ...) the results."""


@dataclass(frozen=True)
class Job:
    """Everything that determines the results, and how they are computed.

    ``compute``: returns the results of each clip of a batch, (count, ...) each. ``settings``: named
    in the manifest; a job with others does not continue this one. ``window_bytes``: size of the
    results of one window, about, for the size of the parts.
    """

    recordings: Recordings
    windows: Windows
    sample_rate: int
    compute: Callable[[WaveBatch], Sequence[NDArray[Any]]]
    settings: Mapping[str, Any]
    batch: int
    window_bytes: float
    workers: int = 0
    progress: bool = False

    @property
    def parts(self) -> list[range]:
        """The ranges of windows of the parts."""
        total = len(self.windows)
        fits = math.floor(PART_BYTES / max(1.0, self.window_bytes))
        size = max(self.batch, math.ceil(total / MOST_PARTS))
        size = max(1, min(size, fits, MAX_PART))
        return [range(at, min(at + size, total)) for at in range(0, total, size)]

    def said(self) -> dict[str, Any]:
        """Returns the settings with a hash of the inputs."""
        counts = {"recordings": len(self.recordings), "windows": len(self.windows)}
        return {
            "bat": __version__,
            **self.settings,
            "batch": self.batch,
            **counts,
            "inputs": self.recordings.hash,
        }


def processes() -> tuple[int, int]:
    """Returns this process's rank and their number, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Output:
    """The files of an output ``out``; a folder if it has no suffix."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = not out.suffix
        self.manifest = out / "manifest.json" if self.folder else beside(out, ".json")
        self.skipped = out / "skipped.csv" if self.folder else beside(out, ".skipped.csv")
        self.parts = beside(out, ".parts")
        self.begun = self.parts / "settings.json"
        self.headers = self.parts / "headers.json"

    def part(self, number: int) -> Path:
        return self.parts / f"part-{number:05d}.npz"

    def done(self, said: Mapping[str, Any]) -> bool:
        """Returns True if the output is complete; raises ``UserError`` if it, or its parts, are of
        another command."""
        for file in (self.manifest, self.begun):
            found = _read(file)
            if found is None:
                continue
            before = found.get("settings", found)
            other = [
                f"{key} is {_short(said.get(key))}, there {_short(before.get(key))}"
                for key in dict.fromkeys([*said, *before])
                if said.get(key) != before.get(key)
            ]
            if other:
                raise UserError(
                    f"{file} is of another command: {'; '.join(other)}. Give another --out, or "
                    f"remove {self.out} and {self.parts}"
                )
            if file == self.manifest:
                return True
        return False

    def check(self) -> None:
        """Raises ``UserError`` if ``out`` exists and is no output, or its folder does not exist."""
        if not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}; make it")
        there = self.out.exists()
        if self.out.is_dir():
            there = any(file != self.skipped for file in self.out.iterdir())
        if there and not (self.manifest.is_file() or self.begun.is_file()):
            raise UserError(f"{self.out} exists and is not of this command: give another --out")

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Checks ``out``; a ``UserError`` in the body leaves no parts' folder without parts."""
        self.check()
        try:
            yield
        except UserError:
            self.forget()
            raise

    def forget(self) -> None:
        """Removes the parts' folder if it has no parts, or the output is complete."""
        if self.manifest.is_file() or not self.begun.is_file():
            shutil.rmtree(self.parts, ignore_errors=True)


def beside(path: Path, suffix: str) -> Path:
    """Returns ``path`` with ``suffix`` after its name."""
    return path.with_name(path.name + suffix)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it") from error


class Parts:
    """The parts of a job, in order: iterating yields a ``Block`` for each."""

    def __init__(self, job: Job, output: Output) -> None:
        self.job, self.output = job, output
        self.files = [output.part(number) for number in range(len(job.parts))]

    def __iter__(self) -> Iterator[Block]:
        for file in self.files:
            with np.load(file) as held:
                if len(held["rows"]):
                    yield Block(held["rows"], held["counts"], held["values"])

    def counts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yields rows and counts of each part, without its values."""
        for file in self.files:
            with np.load(file) as held:
                yield held["rows"], held["counts"]

    def left_out(self) -> Iterator[LeftOut]:
        """Yields what was left out: of the listing, then in the order of the windows."""
        yield from self.job.recordings.left_out
        for file in self.files:
            with np.load(file) as held:
                for row, reason in json.loads(str(held["skipped"])):
                    rows = np.array([row], np.int64)
                    name = self.job.recordings.name(int(self.job.windows.recording(rows)[0]))
                    yield LeftOut(name, float(self.job.windows.times(rows)[0][0]), reason)


def run(
    job: Job, out: Path, write: Callable[[Parts, Path], None], *, stop_after: int | None = None
) -> None:
    """Computes the parts of this process that are missing; process 0 then joins all with ``write``.

    ``write(parts, path)`` writes the output to ``path`` (a temporary name, or the folder).
    ``stop_after``: return after this many parts, without joining (tests).

    Raises ``UserError`` if ``out`` is of another command or not a single window can be read.
    """
    output, said = Output(out), job.said()
    rank, world = processes()
    if output.done(said):
        if rank == 0:
            output.forget()
        log.info("nothing to do: %s is complete", out)
        return
    output.parts.mkdir(exist_ok=True)
    write_json(output.begun, said)
    ranges = job.parts
    mine = range(len(ranges) * rank // world, len(ranges) * (rank + 1) // world)
    missing = [k for k in mine if not output.part(k).is_file()]
    if missing and output.done(said):  # joined while this process was starting
        return
    if len(missing) < len(mine):
        log.info("continuing: %d of %d parts are there", len(mine) - len(missing), len(mine))
    _compute(job, output, missing[:stop_after], ranges)
    if rank == 0 and stop_after is None:
        _wait(output, len(ranges))
        _join(job, output, said, write)


def _compute(job: Job, output: Output, missing: Sequence[int], ranges: Sequence[range]) -> None:
    batches = Batches(job.windows, [ranges[k] for k in missing], batch=job.batch)
    reader = WindowReader(job.recordings, job.windows, sample_rate=job.sample_rate)
    made = iter(Loader(reader, batches, workers=job.workers)) if missing else iter(())
    total, begin = sum(len(ranges[k]) for k in missing), time.monotonic()
    with progress_bar(total, "clips", unit="clip", show=job.progress) as bar:
        for k in missing:
            found: dict[int, NDArray[Any]] = {}
            skipped: list[tuple[int, str]] = []
            for _ in batches.of(ranges[k]):
                batch = next(made)
                skipped += [(clip.position, clip.why) for clip in batch.skipped]
                if batch.keys:
                    values = job.compute(batch)
                    found |= dict(zip(batch.positions.tolist(), values, strict=True))
                bar.update(len(batch.keys) + len(batch.skipped))
            _save(output.part(k), found, sorted(skipped))
    seconds = time.monotonic() - begin
    if missing:
        log.info("%d clips in %.1f s: %.1f clips/s", total, seconds, total / max(seconds, 1e-9))


def _save(file: Path, found: dict[int, NDArray[Any]], skipped: list[tuple[int, str]]) -> None:
    rows = sorted(found)
    values = [found[row] for row in rows]
    temp = temporary(file)
    try:
        with temp.open("wb") as target:
            np.savez(
                target,
                rows=np.array(rows, np.int64),
                counts=np.array([len(v) for v in values], np.int64),
                values=np.concatenate(values) if values else np.zeros(0),
                skipped=np.array(json.dumps(skipped)),
            )
        replace_durably(temp, file)
    finally:
        temp.unlink(missing_ok=True)


def _wait(output: Output, count: int) -> None:
    """Waits until the parts of all processes are there."""
    waiting = [output.part(k) for k in range(count)]
    said = time.monotonic()
    while waiting := [file for file in waiting if not file.is_file()]:
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            log.info("waiting for %d parts of other processes in %s", len(waiting), output.parts)
        time.sleep(POLL_SECONDS)


def _join(
    job: Job, output: Output, said: dict[str, Any], write: Callable[[Parts, Path], None]
) -> None:
    parts = Parts(job, output)
    rows = sum(len(rows) for rows, _ in parts.counts())
    if output.folder:
        output.out.mkdir(exist_ok=True)
    left_out = _write_skipped(parts, output.skipped)
    if not rows:
        first = next(parts.left_out())
        shutil.rmtree(output.parts)
        raise UserError(
            f"nothing can be read: {first.name}, {first.reason}; all {left_out} are listed in "
            f"{output.skipped}"
        )
    if output.folder:
        write(parts, output.out)
    else:
        temp = temporary(output.out)
        try:
            write(parts, temp)
            replace_durably(temp, output.out)
        finally:
            temp.unlink(missing_ok=True)
    write_json(output.manifest, {"settings": said, "results": rows, "left_out": left_out})
    shutil.rmtree(output.parts)
    log.info("%s: %d of %d windows", output.out, rows, len(job.windows))
    if left_out:
        log.warning("%d left out, with reasons: %s", left_out, output.skipped)


def _write_skipped(parts: Parts, file: Path) -> int:
    """Writes what was left out, if anything; returns how many."""
    count, temp = 0, temporary(file)
    try:
        with temp.open("w", encoding="utf-8", errors="backslashreplace", newline="") as target:
            writer = csv.writer(target)
            writer.writerow(("path", "start", "reason"))
            for count, entry in enumerate(parts.left_out(), start=1):  # noqa: B007
                writer.writerow((entry.name, f"{entry.start_seconds:.6g}", entry.reason))
        if count:
            replace_durably(temp, file)
        else:
            file.unlink(missing_ok=True)
    finally:
        temp.unlink(missing_ok=True)
    return count
