"""Exponential moving average of the student, for the teacher (docs/method.md 3).

The decay rises linearly from ``start`` to ``end`` over ``steps`` optimiser steps; float32 as in
the paper's table. Parameters and buffers are averaged in one ``foreach`` call; if both models are
sharded (FSDP2), each process averages its own part without communication.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def ema_decay(updates: int, *, start: float, end: float, steps: int) -> float:
    """Returns the decay of the next update after ``updates`` updates."""
    if updates >= steps:
        return end
    fraction = updates / (steps - 1) if steps > 1 else 0.0
    return float(np.float32(start + (end - start) * fraction))


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, or the tensor itself."""
    # importing DTensor for an isinstance takes a second, in every command
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, decay: float, *, skip: Tensor | None = None
) -> None:
    """Computes ``teacher = decay * teacher + (1 - decay) * student`` in place.

    Both must have the same parameters and buffers in the same order, and the same sharding; integer
    buffers are copied.
    ``skip``: 0-dim on the device, 1.0 for no update (without host synchronisation).
    """
    pairs = [
        *zip(teacher.parameters(), student.parameters(), strict=True),
        *zip(teacher.buffers(), student.buffers(), strict=True),
    ]
    pairs = [(local(t), local(s)) for t, s in pairs]
    assert all(t.shape == s.shape for t, s in pairs), "teacher and student are not split alike"
    floating = [(t, s) for t, s in pairs if t.is_floating_point()]
    ours, theirs = [t for t, _ in floating], [s for _, s in floating]
    if skip is None:
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)
    else:
        torch._foreach_lerp_(ours, theirs, [(1.0 - decay) * (1.0 - skip)] * len(ours))
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)
