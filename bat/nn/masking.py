"""Draws inverse block masks (docs/method.md 3) in one batched, seeded operation on the device.

For every row: ``c = int(N (r + adjust) / block^2)`` centres, uniform over the N patches with
replacement; the ``block x block`` squares around them (clipped at the borders) are what is *kept*;
then exactly ``n = int(N r)`` are kept, by dropping uniformly from the kept set or adding uniformly
from the rest. Both adjustments are one operation here: every patch draws a random integer, kept
patches add a number larger than any draw, and the n largest are kept. ``tests/reference/masks.py``
has the equivalent loop. On a grid so small that ``c`` is 0 patches are kept uniformly, as in the
paper's code; ``block_that_fits`` gives the side of a block that is drawn there.

Random bits come from a generator, or from a seed per row: number j of a row is splitmix64's j-th of
that seed (Steele, Lea, Flood 2014), integer arithmetic alone, so CPU and GPU draw the same mask.
With ``row_seeds`` a clip's masks depend on its place in the stream, whichever rank reads it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bat.types import Grid, Views

# splitmix64's constants, as signed 64-bit numbers
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def inverse_block_mask(
    rows: int,
    grid: Grid,
    *,
    keep_ratio: float = 0.2,
    block: int = 5,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Views:
    """Draws ``rows`` masks over ``grid``.

    ``generator`` must live on ``device``; its seed determines all masks. Alternatively ``seeds``
    (rows,) int64, one per row, gives the same masks on every device.
    Returns ``Views`` with ``keep_ids`` (rows, n) int64 ascending and
    ``mask`` (rows, N) bool, True where removed.
    The paper's ratio of 0.8 removed is ``keep_ratio = 1 - 0.8`` (n is truncated, not rounded).
    Raises ``ValueError`` if no patch or every patch would be kept.
    """
    keep = int(grid.tokens * keep_ratio)
    if not 0 < keep < grid.tokens:
        raise ValueError(
            f"keep_ratio={keep_ratio} keeps {keep} of {grid.tokens} patches "
            f"({grid.time} x {grid.freq}): give longer clips or another mask ratio"
        )
    centres = int(grid.tokens * (keep_ratio + adjust) / block**2)
    pairs = (grid.tokens + 1) // 2  # two patches per draw
    if seeds is not None:
        assert generator is None, "a generator and seeds: one of them decides"
        assert seeds.shape == (rows,), f"{tuple(seeds.shape)} seeds for {rows} rows"
        device = seeds.device
        bits = splitmix64(seeds, centres + pairs)  # (rows, centres + pairs)
        drawn = ((bits[:, :centres] >> 33) & (2**31 - 1)) % grid.tokens
        bits = bits[:, centres:].contiguous()
    else:
        if device is None and generator is not None:
            device = generator.device
        drawn = torch.randint(grid.tokens, (rows, centres), generator=generator, device=device)
        bits = torch.empty(rows, pairs, dtype=torch.int64, device=device)
        bits = bits.random_(generator=generator)
    # 30 random bits, and the 31st for kept patches
    bits = bits.view(torch.int32)[:, : grid.tokens]
    priority = (bits & (2**30 - 1)) + (blocks_around(drawn, grid, block).int() << 30)  # (rows, N)
    keep_ids = priority.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values  # (rows, n)
    mask = torch.ones(rows, grid.tokens, dtype=torch.bool, device=device)
    return Views(keep_ids, mask.scatter_(1, keep_ids, False))


def block_that_fits(grid: Grid, *, keep_ratio: float, block: int, adjust: float) -> int:
    """Returns ``block``, or the largest side of which one block is drawn on ``grid``, at least 1.

    With 56 patches and the paper's ratios (``N (r + adjust) = 15``) no block of side 5 is drawn,
    and masks are uniform: side 3.
    """
    return min(block, max(1, math.isqrt(int(grid.tokens * (keep_ratio + adjust)))))


def choose_predicted(views: Views, share: float, seeds: Tensor) -> Views:
    """Returns ``views`` with ``int(share * masked)`` of the masked tokens chosen to be predicted.

    At least one; drawn uniformly, for each view by its seed in ``seeds`` (rows,) int64.
    ``share`` 1: all of them.
    """
    if share == 1:
        return views
    masked = views.masked_ids  # (rows, N - n)
    bits = splitmix64(seeds, (masked.shape[1] + 1) // 2).view(torch.int32)[:, : masked.shape[1]]
    drawn = bits.topk(max(1, int(share * masked.shape[1])), dim=1, sorted=False).indices
    return views._replace(chosen=masked.gather(1, drawn.sort(dim=1).values))


def splitmix64(seeds: Tensor, count: int) -> Tensor:
    """Returns the first ``count`` numbers of each seed: (rows,) int64 -> (rows, count) int64, all
    bits random. Sums and products wrap at 64 bits."""
    steps = torch.arange(1, count + 1, device=seeds.device).mul_(_GOLDEN)
    bits = seeds[:, None] + steps
    for shift, factor in _MIX:  # ">>" copies the sign bit: masked off
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(2**33 - 1))


def row_seeds(seed: int, positions: Tensor, views: int) -> Tensor:
    """Returns seeds of ``views`` masks per clip at ``positions`` (B,) int64 of the stream of
    ``seed``: (B * views,) int64, clip-major."""
    assert 0 <= seed < 2**63, f"seed {seed} does not fit 63 bits"
    key = splitmix64(torch.tensor([seed]), 1).flatten().to(positions.device)
    return splitmix64(positions ^ key, views).flatten()


def blocks_around(centres: Tensor, grid: Grid, block: int) -> Tensor:
    """Returns the union of squares of side ``block`` around ``centres`` (rows, c), clipped.

    Result: (rows, N) bool. Squares are clipped at the borders; an even side reaches one patch
    further back than forward.
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
