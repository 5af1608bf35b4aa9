"""The items of ``gpu_check.py``, most wanted first, each with a bound of its own time.

Every item yields rows; ``quick`` is tiny, on whatever device is there, nothing compiled. ``step``
compiles four whole models from cold (ours and plain, student and teacher), eight where plain does
not fit at 24 clips and both run again at 12; ours comes first, so that an overrun costs the
comparison only. The other parts of ``tools/bench.py`` run on a GPU by themselves.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESERVED_MB = 1000.0
"""Taken off a card's memory for the CUDA context and what the allocator cannot join."""
CARDS_GB = (24, 80)
BATCHES = (12, 24)


class Item(NamedTuple):
    run: Callable[..., Iterator[Row]]
    limit_seconds: float


def largest_batch(small: tuple[int, float], large: tuple[int, float], card_gb: float) -> int:
    """Clips a step that fit a card, by the line through two (batch, MB in all) pairs."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    fixed = small[1] - slope * small[0]
    return max(0, int((1000 * card_gb - RESERVED_MB - fixed) // slope))


def _load(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def part(name: str, **words: Any) -> Callable[..., Iterator[Row]]:
    """The rows of a part of ``tools/bench.py``, each as it comes."""

    def run(*, repeats: int, quick: bool) -> Iterator[Row]:
        yield from _load(name).run(repeats=repeats, quick=quick, **words)

    return run


def compared(model: str, *, compiled: bool) -> Callable[..., Iterator[Row]]:
    """The whole step against plain: the case of that model."""

    def run(*, repeats: int, quick: bool) -> Iterator[Row]:
        step, device = _load("step"), _load("timing").here()
        matmul = step.matmul_tflops(device, quick=quick)
        for case in step.CASES["quick" if quick else "cuda"]:
            if quick or case.name == model:
                case = case._replace(compiled=compiled and not quick)
                yield from step.compare(case, device=device, repeats=repeats, matmul=matmul)

    return run


VARIANTS = {
    "blocks": ["hardware.compile=blocks"],
    "blocks, activation checkpointing": [
        "hardware.compile=blocks",
        "hardware.activation_checkpointing=true",
    ],
    "CUDA graphs": ["hardware.compile=cudagraphs"],
}


def variants(*, repeats: int, quick: bool) -> Iterator[Row]:
    """Our Base step with other settings, then the largest batches by the line through two sizes.

    With CUDA graphs ``ours_peak_mb`` misses the memory that the recorded graphs hold all the time.
    """
    step, timing = _load("step"), _load("timing")
    device = timing.here()
    matmul = step.matmul_tflops(device, quick=quick)
    size = [*step.QUICK, "objective.mask.views=2"] if quick else []
    in_all: list[tuple[int, float]] = []
    for clips in (2, 4) if quick else BATCHES:
        words = [*size, f"data.batch={clips}"]
        for name, own in VARIANTS.items():
            if name != "blocks" and (quick or clips < max(BATCHES)):
                continue  # the smaller batch is for the line alone
            own = own if not quick else []
            row = step.alone(
                f"Base, {name}, {clips} clips",
                [*words, *own],
                device=device,
                repeats=repeats,
                matmul=matmul,
            )
            if name == "blocks":
                in_all.append((clips, row["held_mb"] + row["ours_peak_mb"]))
            yield row
    fits = {f"largest_batch_{gb}_gb": largest_batch(*in_all, gb) for gb in CARDS_GB}
    note = f"by the line through {in_all} (clips, MB), {RESERVED_MB:.0f} MB kept free; not tried"
    yield {"case": "largest batch", **fits, "note": note}


def gpu_tests(*, repeats: int, quick: bool) -> Iterator[Row]:
    """Runs ``tests/gpu`` once; a row for each file as it is finished, an error for each failure."""
    del repeats
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "tests/gpu"]
    command += ["--collect-only"] if quick else ["-vv"]  # the settings of pytest have a -q
    counts: dict[str, dict[str, int]] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"(\S+\.py)::(\S+)\s*(PASSED|FAILED|ERROR|SKIPPED)?", line)
            if found is None:
                continue
            file, test, how = found[1], found[2], (found[3] or "collected").lower()
            if counts and file not in counts:
                yield _file_row(counts)
            of_file = counts.setdefault(file, {})
            of_file[how] = of_file.get(how, 0) + 1
            if how in ("failed", "error"):
                yield {"case": f"{file}::{test}", "error": how}
    if counts:
        yield _file_row(counts)
    if process.returncode not in (0, 1, 5):  # 1: failures, which have rows; 5: no tests
        yield {"case": "tests/gpu", "error": f"pytest ended with {process.returncode}"}


def _file_row(counts: dict[str, dict[str, int]]) -> Row:
    file, numbers = list(counts.items())[-1]
    return {"case": file, **numbers}


ITEMS: dict[str, Item] = {
    "step-eager": Item(compared("Base", compiled=False), 90),
    "step": Item(compared("Base", compiled=True), 240),
    "attention": Item(part("attention"), 80),
    "decoders": Item(part("decoders"), 80),
    "cgp": Item(part("cgp", only="cgp"), 70),
    "step-S-eager": Item(compared("S", compiled=False), 50),
    "step-S": Item(compared("S", compiled=True), 150),
    "tests": Item(gpu_tests, 170),
    "variants": Item(variants, 150),
}
"""In the order of a run."""
