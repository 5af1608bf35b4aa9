"""Timing several ways to do one thing: alternating, warmed up, the median of the repeats."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def medians(
    ways: dict[str, Callable[[], Any]], *, repeats: int, title: str = "", warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of one call of each way; the ways take turns, in turning order."""
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in tqdm(range(warm_up + repeats), desc=title, leave=False):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            start = time.perf_counter()
            ways[name]()
            if repeat >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}
