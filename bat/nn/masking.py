"""Inverse block masks (SPEC section 3), all rows in one batched, seeded operation on the device.

For every row: ``c = int(N (r + adjust) / block^2)`` centres, uniform over the N patches with
replacement; the ``block x block`` squares around them (clipped at the borders) are what is *kept*;
then exactly ``n = int(N r)`` are kept, by dropping uniformly from the kept set or adding uniformly
from the rest. Both adjustments are one operation here: every patch draws a uniform number, kept
patches add 1, and the n largest win. ``tests/reference/masks.py`` has the loop this replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bat.shapes import Grid, Views


def inverse_block_mask(
    rows: int,
    grid: Grid,
    *,
    keep_ratio: float = 0.2,
    block: int = 5,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Views:
    """Draw ``rows`` masks over ``grid``.

    ``generator`` must live on ``device``; its seed decides everything. Returns ``Views`` with
    ``keep_ids`` (rows, n) int64 ascending and ``mask`` (rows, N) bool, True where removed.
    The paper's ratio of 0.8 removed is ``keep_ratio = 1 - 0.8`` (n is truncated, not rounded).
    Raises ``ValueError`` where no patch or every patch would be kept.
    """
    keep = int(grid.tokens * keep_ratio)
    if not 0 < keep < grid.tokens:
        raise ValueError(
            f"keep_ratio={keep_ratio} keeps {keep} of {grid.tokens} patches "
            f"({grid.time} x {grid.freq}): give longer clips or another mask ratio"
        )
    if device is None and generator is not None:
        device = generator.device
    centres = int(grid.tokens * (keep_ratio + adjust) / block**2)
    drawn = torch.randint(grid.tokens, (rows, centres), generator=generator, device=device)
    kept = blocks_around(drawn, grid, block)  # (rows, N)
    priority = kept + torch.rand(kept.shape, generator=generator, device=device)
    keep_ids = priority.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values  # (rows, n)
    mask = torch.ones(rows, grid.tokens, dtype=torch.bool, device=device)
    return Views(keep_ids, mask.scatter_(1, keep_ids, False))


def blocks_around(centres: Tensor, grid: Grid, block: int) -> Tensor:
    """Union of the squares of side ``block`` around ``centres`` (rows, c), clipped at the borders.

    Returns (rows, N) bool. An even side reaches one patch further back than forward.
    """
    # A patch is in a square iff it is close in time AND in frequency: two small tables, one "any".
    back, ahead = block // 2, (block - 1) // 2

    def near(at: Tensor, size: int) -> Tensor:  # (rows, c) -> (rows, c, size)
        offset = torch.arange(size, device=at.device) - at[..., None]
        return (offset >= -back) & (offset <= ahead)

    in_time = near(centres // grid.freq, grid.time)
    in_freq = near(centres % grid.freq, grid.freq)
    square = in_time[..., :, None] & in_freq[..., None, :]  # (rows, c, T, F)
    return square.any(dim=1).flatten(1)
