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
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bat import __version__
from bat.data.loader import Loader
from bat.data.windows import Windows
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import progress_bar
from bat.interfaces.recordings import (
    LeftOut,
    Reader,
    Recordings,
    batches_of,
    cut,
    list_recordings,
)
from bat.io import replace_durably, temporary, write_json
from bat.logs import is_main
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


class Results(NamedTuple):
    """Results of some windows, none, one or several of each."""

    window: NDArray[np.int64]
    """(R,), ascending."""
    values: NDArray[Any]
    """(R, ...)"""

    @classmethod
    def of(cls, found: Mapping[int, NDArray[Any]]) -> Results:
        """``found``: results (n, ...) of windows by number."""
        rows = sorted(found)
        counts = [len(found[row]) for row in rows]
        values = np.concatenate([found[row] for row in rows]) if rows else np.zeros(0)
        return cls(np.repeat(np.array(rows, np.int64), counts), values)


class Compute(Protocol):
    """Computes the results of clips: ``bat.interfaces.embed``, ``.predict``."""

    backbone: Encoder
    settings: dict[str, Any]
    """Named in the manifest; a job with others does not continue this one."""

    def __call__(self, batch: WaveBatch) -> list[NDArray[Any]]:
        """Returns the results of each clip of a batch, (n, ...) each."""

    def window(self, value: float | str | None) -> float | None:
        """Returns the seconds of a window for what the user gave, None for whole recordings."""

    def size(self, seconds: float) -> float:
        """Returns the bytes of the results of one window, about."""


@dataclass(frozen=True)
class Job:
    """Everything that determines the results, and how they are computed."""

    recordings: Recordings
    windows: Windows
    compute: Compute
    settings: Mapping[str, Any]
    batch: int
    workers: int
    progress: bool

    @property
    def parts(self) -> list[range]:
        """The ranges of windows of the parts."""
        total = len(self.windows)
        size = min(max(self.batch, -(-total // MOST_PARTS)), MAX_PART)
        longest = np.minimum(self.windows.window, self.windows.lengths).max(initial=1.0)
        size = max(1, min(size, int(PART_BYTES / max(1.0, self.compute.size(float(longest))))))
        return [range(at, min(at + size, total)) for at in range(0, total, size)]

    def said(self) -> dict[str, Any]:
        """Returns the settings with a hash of the inputs."""
        inputs = {"recordings": len(self.recordings.names), "windows": len(self.windows)}
        inputs |= {"batch": self.batch, "inputs": self.recordings.hash}  # type: ignore[dict-item]
        return {"bat": __version__, **self.settings, **inputs}


class Output:
    """The files of an output ``out``; a folder if it has no suffix."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, not out.suffix

        def file(name: str) -> Path:
            return out / name if self.folder else out.with_name(f"{out.name}.{name}")

        self.manifest = file("manifest.json") if self.folder else out.with_name(f"{out.name}.json")
        self.skipped = file("skipped.csv")
        self.parts = out.with_name(f"{out.name}.parts")
        self.begun = self.parts / "settings.json"

    def part(self, number: int) -> Path:
        return self.parts / f"part-{number:05d}.npz"

    def check(self) -> None:
        """Raises ``UserError`` if ``out`` exists and is no output, or its folder does not exist."""
        if not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}; make it")
        there = self.out.exists()
        if self.out.is_dir():
            there = any(file != self.skipped for file in self.out.iterdir())
        if there and not (self.manifest.is_file() or self.begun.is_file()):
            raise UserError(f"{self.out} exists and is not of this command: give another --out")

    def done(self, said: Mapping[str, Any]) -> bool:
        """Returns True if the output is complete; raises ``UserError`` if it, or its parts, are of
        another command."""
        for file in (self.manifest, self.begun):
            try:
                found = dict(json.loads(file.read_text(encoding="utf-8")))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{file} is damaged ({error}): remove it") from error
            before = found.get("settings", found)
            other = [
                f"{key} is {str(said.get(key))[:60]}, there {str(before.get(key))[:60]}"
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


class Parts:
    """The parts of a job: iterating yields the ``Results`` of each that has some, in order."""

    def __init__(self, job: Job, output: Output) -> None:
        self.job = job
        self.files = [output.part(number) for number in range(len(job.parts))]

    def __iter__(self) -> Iterator[Results]:
        for file in self.files:
            with np.load(file) as held:
                if len(held["window"]):
                    yield Results(held["window"], held["values"])

    def windows(self) -> Iterator[NDArray[np.int64]]:
        """Yields the windows of the results of each part, without their values."""
        for file in self.files:
            with np.load(file) as held:
                yield held["window"]

    def left_out(self) -> Iterator[LeftOut]:
        """Yields what was left out: of the listing, then in the order of the windows."""
        yield from self.job.recordings.left_out
        for file in self.files:
            with np.load(file) as held:
                skipped = json.loads(str(held["skipped"]))
            for row, reason in skipped:
                rows = np.array([row], np.int64)
                name = self.job.recordings.names[int(self.job.windows.recording(rows)[0])]
                yield LeftOut(name, float(self.job.windows.times(rows)[0][0]), reason)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, to which it is moved if the body succeeds."""
    temp = temporary(path)
    try:
        yield temp
        replace_durably(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def run(
    paths: Sequence[str | Path],
    out: Path,
    load: Callable[[], Any],
    write: Callable[[Any, Parts, Path], None],
    *,
    window: float | str | None = None,
    hop: float | None = None,
    batch: int = 32,
    workers: int = 0,
    progress: bool = False,
    stop_after: int | None = None,
) -> None:
    """Computes the results of the recordings at ``paths`` (see ``list_recordings``) into ``out``.

    The parts of this process that are missing are computed; process 0 then joins all.

    Args:
        load: makes what computes, once ``out`` is checked.
        write: ``write(compute, parts, path)`` writes the output to ``path`` (a temporary name, or
            the folder).
        window: seconds; ``whole``; None: as ``compute.window`` says. hop: seconds from one window
            to the next; None: ``window``.
        stop_after: return after this many parts, without joining (tests).

    Raises:
        UserError: ``out`` is of another command, or not a single window can be read.
    """
    if batch < 1 or workers < 0:
        raise UserError(f"batch={batch}, workers={workers}: at least 1, and 0")
    Output(out).check()
    compute: Compute = load()
    show = progress and is_main()
    recordings = list_recordings(paths, progress=show)
    seconds, rest = compute.window(window), compute.backbone.hop_seconds
    windows = cut(recordings.seconds, window=seconds, hop=hop, rest=rest)
    settings = {**compute.settings, "window": seconds, "hop": windows.hop}
    job = Job(recordings, windows, compute, settings, batch, workers, show)
    output, said = Output(out), job.said()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if output.done(said):
        if rank == 0:
            shutil.rmtree(output.parts, ignore_errors=True)
        log.info("nothing to do: %s is complete", out)
        return
    output.parts.mkdir(exist_ok=True)
    write_json(output.begun, said)
    count = len(job.parts)
    mine = range(count * rank // world, count * (rank + 1) // world)
    missing = [k for k in mine if not output.part(k).is_file()]
    if missing and output.done(said):  # joined while this process was starting
        return
    if len(missing) < len(mine):
        log.info("continuing: %d of %d parts are there", len(mine) - len(missing), len(mine))
    _compute(job, output, missing[:stop_after])
    if rank == 0 and stop_after is None:
        _wait(output, count)
        _join(job, output, said, functools.partial(write, compute))


def _compute(job: Job, output: Output, missing: Sequence[int]) -> None:
    ranges = job.parts
    batches = [list(batches_of(job.windows, ranges[k], job.batch)) for k in missing]
    reader = Reader(job.recordings, job.windows, sample_rate=job.compute.backbone.sample_rate)
    plan: Any = [rows for part in batches for rows in part]
    made = iter(Loader(reader, plan, workers=job.workers)) if plan else iter(())
    total, begin = sum(len(ranges[k]) for k in missing), time.monotonic()
    with progress_bar(total, "clips", unit="clip", show=job.progress) as bar:
        for k, part in zip(missing, batches, strict=True):
            found: dict[int, NDArray[Any]] = {}
            skipped: list[tuple[int, str]] = []
            for _ in part:
                batch = next(made)
                skipped += [(clip.position, clip.why) for clip in batch.skipped]
                if batch.keys:
                    values = job.compute(batch)
                    found |= dict(zip(batch.positions.tolist(), values, strict=True))
                bar.update(len(batch.keys) + len(batch.skipped))
            with replacing(output.part(k)) as temp, temp.open("wb") as target:
                said = np.array(json.dumps(sorted(skipped)))
                np.savez(target, skipped=said, **Results.of(found)._asdict())
    seconds = time.monotonic() - begin
    if missing:
        log.info("%d clips in %.1f s: %.1f clips/s", total, seconds, total / max(seconds, 1e-9))


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
    windows = sum(len(rows) for rows in job.parts)
    left_out = list(parts.left_out())
    if output.folder:
        output.out.mkdir(exist_ok=True)
    output.skipped.unlink(missing_ok=True)
    if left_out:
        with replacing(output.skipped) as temp, open_csv(temp, "path", "start", "reason") as table:
            table.writerows((name, f"{start:.6g}", why) for name, start, why in left_out)
    if len(left_out) - len(job.recordings.left_out) == windows:
        shutil.rmtree(output.parts)
        raise UserError(
            f"nothing can be read: {left_out[0].name}, {left_out[0].reason}; all {len(left_out)} "
            f"are listed in {output.skipped}"
        )
    if output.folder:
        write(parts, output.out)
    else:
        with replacing(output.out) as temp:
            write(parts, temp)
    done = windows - (len(left_out) - len(job.recordings.left_out))
    write_json(output.manifest, {"settings": said, "results": done, "left_out": len(left_out)})
    shutil.rmtree(output.parts)
    log.info("%s: %d of %d windows", output.out, done, windows)
    if left_out:
        log.warning("%d left out, with reasons: %s", len(left_out), output.skipped)


@contextmanager
def open_csv(path: Path, *header: str) -> Iterator[Any]:
    """Gives a CSV writer of a new file with this header."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        yield writer
