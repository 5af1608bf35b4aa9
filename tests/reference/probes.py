"""The probes of SPEC section 4 the slow way: loops over clips, patches and prototypes.

Tokens are (L, B, T, F, D), class tokens (L, B, D); weights are those of ``bat.probes``.
"""

import torch
from torch import Tensor


def direction(x: Tensor) -> Tensor:
    """A vector divided by its L2 norm."""
    return x / (x * x).sum() ** 0.5


def mixed(layers: Tensor, gate: Tensor) -> Tensor:
    """``sum_l gate_l n(layers_l)`` of vectors (L, D) -> (D,)."""
    total = torch.zeros_like(layers[0])
    for weight, vector in zip(gate, layers, strict=True):
        total = total + weight * direction(vector)
    return total


def three(similarities: Tensor, middle: Tensor) -> Tensor:
    """[min, middle, max] of one prototype."""
    return torch.stack([similarities.min(), middle, similarities.max()])


def cgp(
    patches: Tensor,
    cls: Tensor | None,
    layer_logits: Tensor,
    prototypes: Tensor,
    weight: Tensor,
    bias: Tensor,
    level: str,
) -> Tensor:
    """Logits (B, C) or (B, T, C)."""
    _, B, T, freqs, _ = patches.shape
    gate = layer_logits.exp() / layer_logits.exp().sum()
    answers = []
    for b in range(B):
        tokens = [[mixed(patches[:, b, t, f], gate) for f in range(freqs)] for t in range(T)]
        groups = tokens if level == "frame" else [[z for row in tokens for z in row]]
        for group in groups:
            row = []
            for prototype in prototypes:
                p = direction(prototype)
                s = torch.stack([(z * p).sum() for z in group])
                middle = s.mean()
                if level == "clip" and cls is not None:
                    middle = (mixed(cls[:, b], gate) * p).sum()
                row.append(three(s, middle))
            answers.append(weight @ torch.cat(row) + bias)
    logits = torch.stack(answers)
    return logits.view(B, T, -1) if level == "frame" else logits


def protobin(
    patches: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, level: str
) -> Tensor:
    """Logits; no straight-through gradient here: forward only."""
    _, B, T, freqs, _ = patches.shape
    binary = [direction(torch.tensor([1.0 if v >= 0 else -1.0 for v in p])) for p in prototypes]
    answers = []
    for b in range(B):
        tokens = [[direction(patches[-1, b, t, f]) for f in range(freqs)] for t in range(T)]
        groups = tokens if level == "frame" else [[z for row in tokens for z in row]]
        for group in groups:
            row = torch.stack([torch.stack([(z * p).sum() for z in group]).max() for p in binary])
            answers.append(weight @ row + bias)
    logits = torch.stack(answers)
    return logits.view(B, T, -1) if level == "frame" else logits


def pooled(
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None = None,
    *,
    low: bool = True,
    signs: bool = False,
) -> Tensor:
    """[min, middle, max] with all similarities stored: (G, M, D), (K, D), (G, D) -> (G, K, P)."""
    if signs:  # straight through: forward the sign, backward the identity
        sign = torch.where(prototypes >= 0, 1.0, -1.0)
        prototypes = prototypes + (sign - prototypes).detach()
    directions = prototypes / (prototypes * prototypes).sum(-1, keepdim=True) ** 0.5
    s = torch.einsum("gmd,kd->gmk", tokens, directions)
    columns = [s.min(1).values] if low else []
    if middle is not None:
        columns.append(torch.einsum("gd,kd->gk", middle, directions))
    return torch.stack([*columns, s.max(1).values], -1)
