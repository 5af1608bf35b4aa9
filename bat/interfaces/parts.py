"""Computes a result for each window of many recordings in parts, and joins them into one output.

The units of the job (``bat.data.parts``) are blocks: fixed ranges of windows, whose results lie in
``OUT.parts/block-00000.npz``. Process r of n (torchrun: ``RANK``, ``WORLD_SIZE``) is part r + 1 of
n. Blocks and batches depend only on the inputs and the settings. The last part to end joins all,
block after block, and removes them.

Files: ``OUT``, ``OUT.json`` (the manifest: settings and counts) and, if something was left out,
``OUT.skipped.csv``; of a folder ``OUT/manifest.json`` and ``OUT/skipped.csv``.
"""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import logging
import os
import tempfile
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
from bat.data.parts import WHOLE, Part
from bat.data.parts import run as run_parts
from bat.data.store import Store
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
from bat.logs import is_main
from bat.types import WaveBatch

log = logging.getLogger("bat")

BEGUN = "settings.json"
BLOCK_BYTES = 1 << 26
"""Bytes of results that a block holds at most, about."""
MOST_BLOCKS = 64
"""Blocks that a small job has at most, so that this many processes have some."""
MAX_BLOCK = 4096
"""Greatest number of windows of a block."""


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
    def blocks(self) -> list[range]:
        """The ranges of windows of the blocks."""
        total = len(self.windows)
        size = min(max(self.batch, -(-total // MOST_BLOCKS)), MAX_BLOCK)
        longest = np.minimum(self.windows.window, self.windows.lengths).max(initial=1.0)
        size = max(1, min(size, int(BLOCK_BYTES / max(1.0, self.compute.size(float(longest))))))
        return [range(at, min(at + size, total)) for at in range(0, total, size)]

    def said(self) -> dict[str, Any]:
        """Returns the settings with a hash of the inputs."""
        inputs = {"recordings": len(self.recordings.names), "windows": len(self.windows)}
        inputs |= {"batch": self.batch, "inputs": self.recordings.hash}  # type: ignore[dict-item]
        return {"bat": __version__, **self.settings, **inputs}


class Output:
    """The files of an output ``out``, a path or a URL; a folder if it has no suffix."""

    def __init__(self, out: str | Path) -> None:
        self.out = place = Store(out).place
        if isinstance(place, Path):
            parent, self.name = Store(place.parent), place.name
        else:
            folder, _, self.name = place.rpartition("/")
            if folder.endswith("/"):
                raise UserError(f"--out {out}: name a file or a folder in this bucket")
            parent = Store(folder)
        self.parent, self.folder = parent, not Path(self.name).suffix
        self.home = parent.below(self.name) if self.folder else parent
        self.manifest = "manifest.json" if self.folder else f"{self.name}.json"
        self.skipped = "skipped.csv" if self.folder else f"{self.name}.skipped.csv"
        self.parts = parent.below(f"{self.name}.parts")

    def __str__(self) -> str:
        return str(self.parent.below(self.name))

    def block(self, number: int) -> str:
        return f"block-{number:05d}.npz"

    def check(self) -> None:
        """Raises ``UserError`` if ``out`` exists and is no output, or its folder does not exist."""
        if self.parent.local is not None and not self.parent.local.absolute().is_dir():
            raise UserError(f"--out {self}: there is no folder {self.parent}; make it")
        names = set(self.home.sizes())
        there = names - {self.skipped} if self.folder else names & {self.name}
        if self.folder and self.home.local is not None and self.home.local.is_file():
            there.add(self.name)
        if there and self.manifest not in names and BEGUN not in self.parts.sizes():
            raise UserError(f"{self} exists and is not of this command: give another --out")

    def done(self, said: Mapping[str, Any]) -> bool:
        """Returns True if the output is complete; raises ``UserError`` if it, or its parts, are of
        another command."""
        for store, name in ((self.home, self.manifest), (self.parts, BEGUN)):
            file = f"{store}/{name}"
            try:
                found = dict(json.loads(store.read(name)))
            except (FileNotFoundError, NotADirectoryError):
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
                    f"remove {self} and {self.parts}"
                )
            if name == self.manifest:
                return True
        return False


class Parts:
    """The results of a job: iterating yields the ``Results`` of each block that has some."""

    def __init__(self, job: Job, output: Output) -> None:
        self.job, self.output = job, output
        self.count = len(job.blocks)

    def _read(self, *names: str) -> Iterator[list[NDArray[Any]]]:
        for number in range(self.count):
            data = self.output.parts.read(self.output.block(number))
            with np.load(io.BytesIO(data)) as held:
                yield [held[name] for name in names]

    def __iter__(self) -> Iterator[Results]:
        for window, values in self._read("window", "values"):
            if len(window):
                yield Results(window, values)

    def windows(self) -> Iterator[NDArray[np.int64]]:
        """Yields the windows of the results of each block."""
        for (window,) in self._read("window"):
            yield window

    def left_out(self) -> Iterator[LeftOut]:
        """Yields what was left out: of the listing, then in the order of the windows."""
        yield from self.job.recordings.left_out
        for (skipped,) in self._read("skipped"):
            for row, reason in json.loads(str(skipped)):
                rows = np.array([row], np.int64)
                name = self.job.recordings.names[int(self.job.windows.recording(rows)[0])]
                yield LeftOut(name, float(self.job.windows.times(rows)[0][0]), reason)


def run(
    paths: Sequence[str | Path],
    out: str | Path,
    load: Callable[[], Any],
    write: Callable[[Any, Parts, Path], None],
    *,
    window: float | str | None = None,
    hop: float | None = None,
    batch: int = 32,
    workers: int = 0,
    progress: bool = False,
    part: Part = WHOLE,
    join_only: bool = False,
) -> None:
    """Computes the results of the recordings at ``paths`` (see ``list_recordings``) into ``out``.

    Args:
        out: a path, or a URL that fsspec can write.
        load: makes what computes, once ``out`` is checked.
        write: ``write(compute, parts, path)`` writes the output to ``path`` (a temporary name, or
            a temporary folder).
        window: seconds; ``whole``; None: as ``compute.window`` says. hop: seconds from one window
            to the next; None: ``window``.
        part, join_only: see ``bat.data.parts.run``; a process of torchrun is a part.

    Raises:
        UserError: ``out`` is of another command, or not a single window can be read.
    """
    if batch < 1 or workers < 0:
        raise UserError(f"batch={batch}, workers={workers}: at least 1, and 0")
    output = Output(out)
    output.check()
    compute: Compute = load()
    show = progress and is_main()
    recordings = list_recordings(paths, progress=show)
    seconds, rest = compute.window(window), compute.backbone.hop_seconds
    windows = cut(recordings.seconds, window=seconds, hop=hop, rest=rest)
    settings = {**compute.settings, "window": seconds, "hop": windows.hop}
    job = Job(recordings, windows, compute, settings, batch, workers, show)
    if part == WHOLE and "WORLD_SIZE" in os.environ and not join_only:
        part = Part(int(os.environ.get("RANK", 0)) + 1, int(os.environ["WORLD_SIZE"]))
    run_parts(_Blocks(job, output, functools.partial(write, compute)), part, join_only=join_only)


class _Blocks:
    """The blocks of windows as units of work (``bat.data.parts.Job``)."""

    noun = "blocks"

    def __init__(self, job: Job, output: Output, write: Callable[[Parts, Path], None]) -> None:
        self.job, self.output, self.write = job, output, write
        self.said, self.blocks = job.said(), job.blocks

    @property
    def units(self) -> int:
        return len(self.blocks)

    def finished(self) -> bool | None:
        if not self.output.done(self.said):
            return None
        self.output.parts.clear()
        log.info("nothing to do: %s is complete", self.output)
        return True

    def listed(self) -> set[int]:
        names = self.output.parts.sizes()
        return {k for k in range(self.units) if self.output.block(k) in names}

    def intact(self, unit: int) -> bool:
        return True

    def do(self, units: Sequence[int]) -> None:
        job, output = self.job, self.output
        if not units:
            return
        output.parts.write(BEGUN, json.dumps(self.said, indent=2).encode())
        batches = [list(batches_of(job.windows, self.blocks[k], job.batch)) for k in units]
        reader = Reader(job.recordings, job.windows, sample_rate=job.compute.backbone.sample_rate)
        plan: Any = [rows for block in batches for rows in block]
        made = iter(Loader(reader, plan, workers=job.workers))
        total, begin = sum(len(self.blocks[k]) for k in units), time.monotonic()
        with progress_bar(total, "clips", unit="clip", show=job.progress) as bar:
            for k, block in zip(units, batches, strict=True):
                found: dict[int, NDArray[Any]] = {}
                skipped: list[tuple[int, str]] = []
                for _ in block:
                    batch = next(made)
                    skipped += [(clip.position, clip.why) for clip in batch.skipped]
                    if batch.keys:
                        values = job.compute(batch)
                        found |= dict(zip(batch.positions.tolist(), values, strict=True))
                    bar.update(len(batch.keys) + len(batch.skipped))
                with output.parts.put(output.block(k)) as temp, temp.open("wb") as target:
                    said = np.array(json.dumps(sorted(skipped)))
                    np.savez(target, skipped=said, **Results.of(found)._asdict())
        seconds = time.monotonic() - begin
        log.info("%d clips in %.1f s: %.1f clips/s", total, seconds, total / max(seconds, 1e-9))

    def join(self) -> bool:
        output, job = self.output, self.job
        parts = Parts(job, output)
        windows = sum(len(rows) for rows in self.blocks)
        left_out = list(parts.left_out())
        if left_out:
            with (
                output.home.put(output.skipped) as temp,
                open_csv(temp, "path", "start", "reason") as table,
            ):
                table.writerows((name, f"{start:.6g}", why) for name, start, why in left_out)
        else:
            output.home.remove([output.skipped])
        if len(left_out) - len(job.recordings.left_out) == windows:
            output.parts.clear()
            raise UserError(
                f"nothing can be read: {left_out[0].name}, {left_out[0].reason}; all "
                f"{len(left_out)} are listed in {output.home}/{output.skipped}"
            )
        if output.folder:
            with tempfile.TemporaryDirectory(dir=output.parts.local) as folder:
                self.write(parts, Path(folder))
                for file in sorted(Path(folder).iterdir()):
                    output.home.adopt(file, file.name)
        else:
            with output.home.put(output.name) as temp:
                self.write(parts, temp)
        done = windows - (len(left_out) - len(job.recordings.left_out))
        text = json.dumps(
            {"settings": self.said, "results": done, "left_out": len(left_out)}, indent=2
        )
        output.home.write(output.manifest, f"{text}\n".encode())
        output.home.sweep("*" if output.folder else f"{glob.escape(output.name)}*")
        output.parts.clear()
        log.info("%s: %d of %d windows", output, done, windows)
        if left_out:
            where = f"{output.home}/{output.skipped}"
            log.warning("%d left out, with reasons: %s", len(left_out), where)
        return True


@contextmanager
def open_csv(path: Path, *header: str) -> Iterator[Any]:
    """Gives a CSV writer of a new file with this header."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        yield writer
