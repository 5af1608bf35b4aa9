"""Pre-norm vision transformers, head by head, and position codes entry by entry, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def norm(x: Tensor, state: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def blocks(
    x: Tensor, state: Mapping[str, Tensor], *, heads: int, depth: int, eps: float = 1e-6
) -> list[Tensor]:
    """Tokens (n, D) of one clip -> the tokens after each block; the last after ``norm``, if any."""
    n, D = x.shape
    d = D // heads
    found = []
    for b in range(depth):
        at = f"blocks.{b}"
        z = norm(x, state, f"{at}.norm1", eps)
        qkv = z @ state[f"{at}.attn.qkv.weight"].T + state[f"{at}.attn.qkv.bias"]
        mixed = torch.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, i * D + h * d : i * D + (h + 1) * d] for i in range(3))
            for i in range(n):
                share = torch.softmax(torch.stack([q[i] @ k[j] for j in range(n)]) / d**0.5, 0)
                mixed[i, h * d : (h + 1) * d] = share @ v
        x = x + mixed @ state[f"{at}.attn.proj.weight"].T + state[f"{at}.attn.proj.bias"]
        z = norm(x, state, f"{at}.norm2", eps)
        z = z @ state[f"{at}.mlp.fc1.weight"].T + state[f"{at}.mlp.fc1.bias"]
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        x = x + z @ state[f"{at}.mlp.fc2.weight"].T + state[f"{at}.mlp.fc2.bias"]
        found.append(x)
    if "norm.weight" in state:
        found[-1] = norm(x, state, "norm", eps)
    return found


def code(width: int, first: int, second: int) -> list[float]:
    """Sin-cos code of a place: the first half of the channels from ``first``, then ``second``."""
    rates = [10000 ** (-k / (width // 4)) for k in range(width // 4)]
    values = []
    for place in (first, second):
        values += [math.sin(place * w) for w in rates]
        values += [math.cos(place * w) for w in rates]
    return values
