"""The items of ``gpu_check.py``: parts of the benchmark, and variants of our step.

Every item yields rows; ``quick`` is tiny, on whatever device is there, nothing compiled. Variants
are compiled block by block (quick to compile), all from the same weights, masks and batch. The
largest batch is read off a line through two batch sizes (``largest_batch``). With CUDA graphs
``ours_peak_mb`` misses the memory that the recorded graphs hold all the time.

``step`` and ``step-S`` compile four whole models from cold (ours and plain, student and teacher),
eight where plain does not fit at 24 clips and both run again at 12; ours comes first, so that an
overrun costs the comparison only. All items are expected to take more than one run has; the last
six usually need another:
``gpu_check.py --items checkpointing,eager,cudagraphs,step-S,reliability,laboratory``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]

RESERVED_MB = 1000.0
"""Taken off a card's memory for the CUDA context and what the allocator cannot join."""
CARDS_GB = (24, 80)
BATCHES = (12, 24)


class Item(NamedTuple):
    run: Callable[..., Iterator[Row]]
    expected_seconds: float
    """Needed to begin; a guess for one H100 with cold compile caches, not yet measured."""
    limit_seconds: float


def largest_batch(small: tuple[int, float], large: tuple[int, float], card_gb: float) -> int:
    """Clips a step that fit a card, by the line through two (batch, MB in all) pairs."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    fixed = small[1] - slope * small[0]
    return max(0, int((1000 * card_gb - RESERVED_MB - fixed) // slope))


@functools.cache
def matmul(quick: bool) -> float:
    """TFLOP/s of the large product, measured once a process."""
    step, timing = _load("step"), _load("timing")
    return step.matmul_tflops(timing.here(), quick=quick)


def _load(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def part(name: str) -> Callable[..., Iterator[Row]]:
    """The rows of a part of ``tools/bench.py``, each as it comes."""

    def run(*, repeats: int, quick: bool) -> Iterator[Row]:
        yield from _load(name).run(repeats=repeats, quick=quick)

    return run


def compared(model: str) -> Callable[..., Iterator[Row]]:
    """The whole step against plain: the cases of that model."""

    def run(*, repeats: int, quick: bool) -> Iterator[Row]:
        step, device = _load("step"), _load("timing").here()
        words = {"device": device, "repeats": repeats, "matmul": matmul(quick)}
        for case in step.CASES["quick" if quick else device.type]:
            if quick or case.name == model:
                yield from step.compare(case, **words)

    return run


def variant(name: str, *words: str, batch: int = 24) -> Callable[..., Iterator[Row]]:
    """Ours alone with other settings; compiled as ``words`` say; a quick run leaves out
    what the CPU is slow at (compiling) or lacks (cuDNN)."""

    def run(*, repeats: int, quick: bool) -> Iterator[Row]:
        step, device = _load("step"), _load("timing").here()
        gone = ("hardware.compile=", "model.attention=cudnn") if quick else ()
        own = [w for w in words if not w.startswith(gone)]
        size = [*step.QUICK, "objective.mask.views=2"] if quick else []
        clips = batch // 6 if quick else batch
        yield step.alone(
            f"{name}, {clips} clips",
            [*size, f"data.batch={clips}", *own],
            device=device,
            repeats=repeats,
            matmul=matmul(quick),
        )

    return run


def memory(*, repeats: int, quick: bool) -> Iterator[Row]:
    """Peak memory at two batch sizes, and what that means for cards of 24 and 80 GB."""
    pairs = []
    for batch in BATCHES:
        for row in variant("Base, memory", "hardware.compile=blocks", batch=batch)(
            repeats=repeats, quick=quick
        ):
            clips = int(row["words"][-1 if quick else -2].removeprefix("data.batch="))
            pairs.append((clips, row["held_mb"] + row["ours_peak_mb"]))
            yield {**row, "in_all_mb": pairs[-1][1]}
    fits = {f"largest_batch_{gb}_gb": largest_batch(*pairs, gb) for gb in CARDS_GB}
    note = f"by the line through {pairs} (clips, MB), {RESERVED_MB:.0f} MB kept free; not tried"
    yield {"case": "largest batch", **fits, "note": note}


BLOCKS = "hardware.compile=blocks"
ITEMS: dict[str, Item] = {
    "masks": Item(part("masks"), 10, 40),
    "frontend": Item(part("frontend"), 20, 60),
    "step": Item(compared("Base"), 180, 330),
    "memory": Item(memory, 40, 90),
    "cgp": Item(part("cgp"), 60, 120),
    "sdpa": Item(variant("attention=sdpa", BLOCKS, "model.attention=sdpa"), 20, 60),
    "flash": Item(variant("attention=flash", BLOCKS, "model.attention=flash"), 20, 60),
    "cudnn": Item(variant("attention=cudnn", BLOCKS, "model.attention=cudnn"), 20, 60),
    "checkpointing": Item(
        variant("activation checkpointing", BLOCKS, "hardware.activation_checkpointing=true"),
        25,
        60,
    ),
    "eager": Item(variant("nothing compiled", "hardware.compile=off"), 15, 40),
    "cudagraphs": Item(variant("CUDA graphs", "hardware.compile=cudagraphs"), 80, 160),
    "step-S": Item(compared("S"), 150, 300),
    "reliability": Item(part("reliability"), 60, 150),
    "laboratory": Item(part("laboratory"), 40, 90),
}
"""In the order of a run. ``memory``'s second row is the blocks-compiled step with attention=auto,
to which the variants compare."""
