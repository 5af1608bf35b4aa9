"""Masks for one step's views: all rows in one operation on the device, against the loop over rows.

*plain* draws on the CPU, row after row, and copies what it makes to the device (where that is the
CPU itself, nothing is copied). *mask*: which patches are removed; ours has the kept ids with it,
since it finds those first. *mask and ids*: all that a step asks for, ours also the removed ids,
plain the kept ids and the places of all patches. ``threads``: PyTorch's on the CPU, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bat.nn.masking import inverse_block_mask, row_seeds
from bat.types import Grid, Views
from benchmarks.memory import peak_mb
from benchmarks.plain_step import plain_ids, plain_masks
from benchmarks.timing import attempted, here, medians

ABOUT = "masks of one step (24 clips x 16 views), without and with ids; ratio = plain / ours"
GRID, KEEP_RATIO, VIEWS = Grid(64, 8), 1 - 0.8, 16


def ours(rows: int, device: torch.device, seed: int) -> Views:
    """Mask and kept ids, drawn as a step does: by clip."""
    clips = torch.arange(-(-rows // VIEWS), device=device)
    seeds = row_seeds(seed, clips, VIEWS)[:rows]
    return inverse_block_mask(rows, GRID, keep_ratio=KEEP_RATIO, seeds=seeds)


def ours_ids(rows: int, device: torch.device, seed: int) -> tuple[Views, Tensor]:
    """Views and the removed ids."""
    views = ours(rows, device, seed)
    return views, views.masked_ids


def plain(rows: int, device: torch.device) -> Tensor:
    """The mask."""
    return plain_masks(rows, GRID, keep_ratio=KEEP_RATIO).to(device)


def plain_with_ids(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The mask, the kept ids and the places of all patches."""
    mask = plain(rows, device)
    return mask, *plain_ids(mask, int(GRID.tokens * KEEP_RATIO))


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device, rows = here(), 8 if quick else 384
    calls = repeats if quick else 10 * repeats  # a call is milliseconds
    cases: dict[str, dict[str, Callable[[], Any]]] = {
        "mask": {"ours": lambda: ours(rows, device, 0), "plain": lambda: plain(rows, device)},
        "mask and ids": {
            "ours": lambda: ours_ids(rows, device, 0),
            "plain": lambda: plain_with_ids(rows, device),
        },
    }

    def measure(case: str, ways: dict[str, Callable[[], Any]]) -> Iterator[dict[str, Any]]:
        taken = medians(ways, repeats=calls, title=case, warm_up=3, device=device)
        yield {
            "case": case,
            "ours_ms": 1e3 * taken["ours"],
            "plain_ms": 1e3 * taken["plain"],
            "ratio": taken["plain"] / taken["ours"],
            "ours_peak_mb": peak_mb(ways["ours"], device),
            "plain_peak_mb": peak_mb(ways["plain"], device),
            "threads": torch.get_num_threads(),
        }

    for name, ways in cases.items():
        case = f"{name}, {rows} rows of {GRID.time} x {GRID.freq}"
        yield from attempted(case, lambda case=case, ways=ways: measure(case, ways))
