"""Inverse block masks (SPEC section 3), all rows in one batched, seeded operation on the device.

For every row: ``c = int(N (r + adjust) / block^2)`` centres, uniform over the N patches with
replacement; the ``block x block`` squares around them (clipped at the borders) are what is *kept*;
then exactly ``n = int(N r)`` are kept, by dropping uniformly from the kept set or adding uniformly
from the rest. Both adjustments are one operation here: every patch draws a random integer, kept
patches add more than any, and the n largest win. ``tests/reference/masks.py`` has the loop that
this replaces.
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
    # 30 random bits, two patches a draw, and the 31st bit for kept patches
    bits = torch.empty(rows, (grid.tokens + 1) // 2, dtype=torch.int64, device=device)
    bits = bits.random_(generator=generator).view(torch.int32)[:, : grid.tokens]
    priority = (bits & (2**30 - 1)) + (blocks_around(drawn, grid, block).int() << 30)  # (rows, N)
    keep_ids = priority.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values  # (rows, n)
    mask = torch.ones(rows, grid.tokens, dtype=torch.bool, device=device)
    return Views(keep_ids, mask.scatter_(1, keep_ids, False))


def blocks_around(centres: Tensor, grid: Grid, block: int) -> Tensor:
    """Union of the squares of side ``block`` around ``centres`` (rows, c), clipped at the borders.

    Returns (rows, N) bool. An even side reaches one patch further back than forward.
    """
    # A patch is in a square iff it is close in time AND in frequency: the product of two small
    # tables counts the squares around it.
    back, ahead = block // 2, (block - 1) // 2

    def near(at: Tensor, size: int) -> Tensor:  # (rows, c) -> (rows, c, size)
        axis = torch.arange(size, device=at.device)
        offset = axis - axis[:, None]  # (size, size)
        table = ((offset >= -back) & (offset <= ahead)).float()
        return table.index_select(0, at.flatten()).view(*at.shape, size)

    in_time = near(centres // grid.freq, grid.time)  # (rows, c, T)
    in_freq = near(centres % grid.freq, grid.freq)  # (rows, c, F)
    return (in_time.transpose(1, 2) @ in_freq > 0).flatten(1)  # (rows, N)
