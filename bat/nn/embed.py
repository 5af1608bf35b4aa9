"""The fixed 2-D sin-cos position code, in the paper's layout and in the faithful one.

Half of the channels encode time, half frequency, each half ``[sin, cos]`` with D/4 frequencies
``10000^(-k / (D/4))``.

``grid``: token (t, f) carries (t, f), as one would draw it.
``reference``: the paper's released code generates the table on an (F, T) grid flattened
frequency-major and adds it to *time-major* tokens, so row n carries time ``n mod T`` and frequency
``n div T``. Its checkpoints depend on this bijection (SPEC section 2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bat.shapes import Grid

PosLayout = Literal["reference", "grid"]


def position_code(width: int, grid: Grid, layout: PosLayout = "reference") -> Tensor:
    """The table (1, N, D) float32. ``width`` must be a multiple of 4."""
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4 for a 2-D sin-cos code")
    row = torch.arange(grid.tokens, dtype=torch.float64)
    if layout == "reference":
        time, freq = row % grid.time, row // grid.time
    elif layout == "grid":
        time, freq = row // grid.freq, row % grid.freq
    else:
        raise ValueError(f"unknown pos_layout '{layout}': 'reference' or 'grid'")
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def code(at: Tensor) -> Tensor:  # (N,) -> (N, D/2)
        angle = at[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    return torch.cat([code(time), code(freq)], dim=1)[None].float()  # (1, N, D)
