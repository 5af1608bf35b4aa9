"""Measures attention sinks, tokens with much of a head's attention (Xiao et al. 2023, 2309.17453).

    received[j] = mean over queries i of softmax_j(q_i . k_j / sqrt(d)),     sum_j received[j] = 1
    sink share  = max over tokens j of received[j],                  1/n for uniform attention

Computed for each clip and head; the sink may be any token, including the class token. Fused kernels
do not return their weights, so they are computed here, for some queries at a time and in float32.
Padded patches count as keys and queries, as in the encoder, which has no padding mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bat.nn.attention import Attention

WEIGHTS = 2**22
"""Number of attention weights computed at a time: 16 MB."""


@torch.no_grad()
def received(attention: Attention, x: Tensor) -> Tensor:
    """Returns the attention each token receives, mean over queries: (B, n, D) -> (B, H, n) float32.

    ``x`` is the input of the attention module; computed without gradient.
    """
    B, n, D = x.shape
    q, k = (
        t.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (B, H, n, d)
        for t in attention.project(x)[..., : 2 * D].split(D, dim=-1)
    )
    total = torch.zeros(B, attention.heads, n, device=x.device)
    step = max(1, WEIGHTS // (attention.heads * n))
    with torch.autocast(x.device.type, enabled=False):
        for b in range(B):
            key = k[b].float().transpose(1, 2) * q.shape[-1] ** -0.5  # (H, d, n)
            for query in q[b].split(step, dim=1):  # (H, m, d)
                total[b] += (query.float() @ key).softmax(-1).sum(1)
    return total / n


def sink_share(attention: Attention, x: Tensor) -> Tensor:
    """Returns the share of the most attended token: (B, n, D) -> (B, H) float32 in [1/n, 1]."""
    return received(attention, x).amax(-1)
