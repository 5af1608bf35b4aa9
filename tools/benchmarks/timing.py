"""Timing several ways to do one thing: alternating, warmed up, the median of the repeats.

And ``attempted``: a case that fails costs only itself.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm


def attempted(
    case: str, measure: Callable[[], Iterable[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The rows that ``measure()`` gives; where it raises, those so far and a row with ``error``."""
    try:
        yield from measure()
        return
    except Exception as raised:  # what the case holds is free again when this block is left
        traceback.print_exc(file=sys.stderr)
        error = error_line(raised)
    yield {"case": case, "error": error}


def error_line(error: BaseException) -> str:
    """Its kind and the first line that it says, as a traceback ends."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def here() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds that one call takes. On a GPU between two events of the current stream, queue empty
    at the start: the device's time, and the host's where the device waits for it."""
    device = torch.device(device)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def medians(
    ways: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    title: str = "",
    warm_up: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median seconds of one call of each way; the ways take turns, in turning order."""
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there now stays: the collections between calls are short
    try:
        for repeat in tqdm(range(warm_up + repeats), desc=title, leave=False):
            shift = repeat % len(names)
            for name in names[shift:] + names[:shift]:
                gc.collect()
                seconds = seconds_of(ways[name], device)
                if repeat >= warm_up:
                    taken[name].append(seconds)
    finally:
        gc.unfreeze()
    return {name: statistics.median(times) for name, times in taken.items()}
