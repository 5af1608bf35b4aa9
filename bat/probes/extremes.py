"""Lowest and highest similarity of each prototype within a group of tokens, at what it must cost.

``s[g, k, m] = tokens[g, m] . prototypes[k]``; wanted are min and max over m (SPEC section 4, "what
CGP really costs"). A plain implementation stores s, (G, K, M), and pays three products of its size.
Here s is made for a few prototypes at a time and only the two index tables (G, K) are kept; the
gradient passes through those tokens alone, so backward is O(G K D), not O(G M K D). Both gradients
are weighted sums of picked rows, which is what ``embedding_bag`` computes without materialising
the picked rows, in a fixed order (no atomic additions: bit-for-bit repeatable).

Departure: of exactly equal similarities the first token gets the whole gradient, as with
``torch.min(dim=...)``; ``torch.amin`` would share it out evenly.
Under autocast the product runs in autocast's type (float32 accumulation inside it); values are
returned, and gradients summed, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**22
"""Similarities made at a time: 16 MB in float32, within reach of a CPU's cache; a GPU takes 16x."""


def lowest_and_highest(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Min and max over a group's tokens of their product with each prototype.

    ``tokens`` (G, M, D), ``prototypes`` (K, D) -> two tensors (G, K), float32.
    """
    low, high = _Extremes.apply(tokens, prototypes, True)
    return low, high


def highest(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Max alone: (G, M, D), (K, D) -> (G, K), float32."""
    return _Extremes.apply(tokens, prototypes, False)[1]


class _Extremes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, prototypes: Tensor, both: bool) -> Any:
        G, M, D = tokens.shape
        kind = tokens.device.type
        auto = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
        rows = tokens.reshape(G * M, D).to(auto)  # (G M, D)
        matrix = prototypes.to(auto)  # (K, D)
        size = BLOCK_ELEMENTS * (16 if tokens.is_cuda else 1)
        parts = []
        for chunk in matrix.split(max(1, size // max(1, G * M))):
            s = (chunk @ rows.T).view(len(chunk), G, M)  # (k, G, M)
            parts.append((*(s.min(-1) if both else ()), *s.max(-1)))  # values, indices (k, G)
        columns = [torch.cat(c) for c in zip(*parts, strict=True)]  # (K, G) each
        values, picks = columns[0::2], columns[1::2]
        ctx.save_for_backward(tokens, prototypes, torch.stack(picks, 1))  # (K, P, G), P in 1, 2
        ctx.both = both
        out = [v.T.float() for v in values]
        return (out[0] if both else None), out[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tokens, prototypes, picks = ctx.saved_tensors
        G, M, D = tokens.shape
        K = len(prototypes)
        zero = tokens.new_zeros((), dtype=torch.float32).expand(G, K)
        given = [zero if g is None else g.float() for g in (grads if ctx.both else grads[1:])]
        weight = torch.stack([g.T for g in given], 1).reshape(K, -1)  # (K, P G)
        row = (picks + M * torch.arange(G, device=picks.device)).view(K, -1)  # (K, P G) in G M
        to_tokens = to_prototypes = None
        if ctx.needs_input_grad[1]:
            source = tokens.reshape(G * M, D).float()
            to_prototypes = _sum_rows(source, row.reshape(-1), weight.reshape(-1), row.shape[1], K)
            to_prototypes = to_prototypes.to(prototypes.dtype)
        if ctx.needs_input_grad[0]:
            flat, order = row.reshape(-1).sort(stable=True)
            starts = torch.searchsorted(flat, torch.arange(G * M, device=flat.device))
            to_tokens = F.embedding_bag(
                order // row.shape[1],  # the prototype of each pick
                prototypes.float(),
                offsets=starts,
                mode="sum",
                per_sample_weights=weight.reshape(-1)[order],
            )  # (G M, D)
            to_tokens = to_tokens.view(G, M, D).to(tokens.dtype)
        return to_tokens, to_prototypes, None


def _sum_rows(source: Tensor, index: Tensor, weight: Tensor, bag: int, bags: int) -> Tensor:
    """``sum_j weight[i, j] source[index[i, j]]`` for bags of equal size: -> (bags, D)."""
    return F.embedding_bag(
        index.view(bags, bag), source, mode="sum", per_sample_weights=weight.view(bags, bag)
    )
