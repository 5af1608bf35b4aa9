"""A slow and obvious version of the CTC loss."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def ctc(logits: Tensor, target: list[int]) -> Tensor:
    """Minus the log of the summed probability of all paths (T,) that spell ``target``; (T, C)."""
    T, C = logits.shape
    p = logits.softmax(-1)
    total = logits.new_zeros(())
    for path in itertools.product(range(C), repeat=T):
        spelt = [n for n, _ in itertools.groupby(path) if n]
        if spelt == target:
            total = total + torch.stack([p[t, n] for t, n in enumerate(path)]).prod()
    return -total.log()
