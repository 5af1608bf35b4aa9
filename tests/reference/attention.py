"""Gated attention the slow way: one clip, one head, one query at a time, in float64."""

import torch
from torch import Tensor


def gated_attention(x: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """(B, n, D) with weights ``qkv``, ``proj`` and optionally ``gate`` (.weight, .bias)."""
    B, n, D = x.shape
    d = D // heads
    out = torch.zeros_like(x)
    for b in range(B):
        joined = torch.zeros(n, D, dtype=x.dtype)
        for h in range(heads):
            rows = slice(h * d, (h + 1) * d)
            part = []
            for which in range(3):
                weight = w["qkv.weight"][which * D : (which + 1) * D][rows]
                bias = w["qkv.bias"][which * D : (which + 1) * D][rows]
                part.append(torch.stack([weight @ x[b, i] + bias for i in range(n)]))
            q, k, v = part
            for i in range(n):
                scores = torch.stack([torch.dot(q[i], k[j]) / d**0.5 for j in range(n)])
                shares = torch.exp(scores - scores.max())
                shares = shares / shares.sum()
                joined[i, rows] = sum(shares[j] * v[j] for j in range(n))
        for i in range(n):
            token = joined[i]
            if "gate.weight" in w:
                gate = w["gate.weight"] @ x[b, i] + w["gate.bias"]
                token = token * (1 / (1 + torch.exp(-gate)))
            out[b, i] = w["proj.weight"] @ token + w["proj.bias"]
    return out
