"""The teacher: an exponential moving average of the student (SPEC section 3).

The decay rises linearly from ``start`` to ``end`` over ``steps`` optimiser steps; float32 as the
paper's table. Parameters and buffers alike are averaged, all in one ``foreach`` call.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def ema_decay(updates: int, *, start: float, end: float, steps: int) -> float:
    """Decay of the next update after ``updates`` were done."""
    if updates >= steps:
        return end
    fraction = updates / (steps - 1) if steps > 1 else 0.0
    return float(np.float32(start + (end - start) * fraction))


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """``teacher = decay * teacher + (1 - decay) * student``, in place.

    Both must have the same parameters and buffers in the same order; integer buffers are copied.
    """
    pairs = [
        *zip(teacher.parameters(), student.parameters(), strict=True),
        *zip(teacher.buffers(), student.buffers(), strict=True),
    ]
    floating = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floating], [s for _, s in floating], 1.0 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)
