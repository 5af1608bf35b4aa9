"""Masks for one step's views: all rows in one operation on the device, against the loop over rows.

*plain* draws on the CPU, row after row, and copies the mask and both index tables to the device
(where that is the CPU itself, nothing is copied).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bat.nn.masking import inverse_block_mask
from bat.shapes import Grid, Views
from benchmarks.memory import peak_mb
from benchmarks.plain_step import plain_ids, plain_masks
from benchmarks.timing import here, medians

ABOUT = "masks of one step (24 clips x 16 views), ids included; ratio = plain / ours"
GRID, KEEP_RATIO = Grid(64, 8), 1 - 0.8


def ours(rows: int, device: torch.device, seed: int) -> tuple[Views, Tensor]:
    """Views and the removed ids."""
    generator = torch.Generator(device).manual_seed(seed)
    views = inverse_block_mask(rows, GRID, keep_ratio=KEEP_RATIO, generator=generator)
    return views, views.masked_ids


def plain(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The mask, the kept ids and the places of all patches."""
    mask = plain_masks(rows, GRID, keep_ratio=KEEP_RATIO).to(device)
    return mask, *plain_ids(mask, int(GRID.tokens * KEEP_RATIO))


def run(*, repeats: int, quick: bool) -> list[dict[str, Any]]:
    device, rows = here(), 8 if quick else 384
    ways = {"ours": lambda: ours(rows, device, 0), "plain": lambda: plain(rows, device)}
    calls = 1 if quick else 10  # a call is milliseconds
    taken = medians(ways, repeats=calls * repeats, title="masks", warm_up=3, device=device)
    return [
        {
            "case": f"{rows} rows of {GRID.time} x {GRID.freq}",
            "ours_ms": 1e3 * taken["ours"],
            "plain_ms": 1e3 * taken["plain"],
            "ratio": taken["plain"] / taken["ours"],
            "ours_peak_mb": peak_mb(ways["ours"], device),
            "plain_peak_mb": peak_mb(ways["plain"], device),
        }
    ]
