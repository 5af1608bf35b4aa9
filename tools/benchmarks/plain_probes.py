"""CGP and ProtoBin as such code is usually written: what the part ``cgp`` measures bat against.

The whole stack of blocks is normalised and then weighted and summed; prototypes are normalised into
a second matrix; the similarities of all tokens and prototypes lie in memory, (G, M, K), and so does
their gradient. Parameters have bat's names, so weights load both ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.types import Features


def mix(layers: Tensor, gate: Tensor) -> Tensor:
    """``sum_l gate_l n(layers_l)``: (L, ..., D), (L,) -> (..., D)."""
    return torch.einsum("l,l...->...", gate, F.normalize(layers, dim=-1))


def pool(tokens: Tensor, prototypes: Tensor, middle: Tensor) -> Tensor:
    """[min, middle, max] of each prototype: (G, M, D), (K, D), (G, D) -> (G, K, 3)."""
    prototypes = F.normalize(prototypes, dim=-1)
    similarity = tokens @ prototypes.T  # (G, M, K)
    low, high = similarity.min(1).values, similarity.max(1).values  # (G, K)
    return torch.stack([low, middle @ prototypes.T, high], -1)


class PlainCGP(nn.Module):
    """Convex Gated Probing of an encoder with a class token."""

    def __init__(
        self, *, classes: int, width: int, depth: int, level: str, prototypes: int, dropout: float
    ) -> None:
        super().__init__()
        self.level = level
        self.layer_logits = nn.Parameter(torch.ones(depth))
        self.prototypes = nn.Parameter(0.02 * torch.randn(prototypes, width))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(3 * prototypes, classes)

    def forward(self, features: Features) -> Tensor:
        gate = self.layer_logits.softmax(0)
        tokens = mix(features.patches, gate)  # (B, T, F, D)
        if self.level == "frame":
            B, T = tokens.shape[:2]
            tokens = tokens.flatten(0, 1)  # (B T, F, D)
            x = pool(tokens, self.prototypes, tokens.mean(1))
            return self.fc(self.dropout(x.flatten(1))).view(B, T, -1)
        x = pool(tokens.flatten(1, 2), self.prototypes, mix(features.cls, gate))  # (B, K, 3)
        return self.fc(self.dropout(x.flatten(1)))


class _Sign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class PlainProtoBin(nn.Module):
    """Binary prototypes against the last block's patches."""

    def __init__(
        self, *, classes: int, width: int, depth: int, level: str, prototypes: int, dropout: float
    ) -> None:
        super().__init__()
        self.level = level
        self.prototypes = nn.Parameter(0.02 * torch.randn(prototypes, width))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(prototypes, classes)

    def forward(self, features: Features) -> Tensor:
        tokens = F.normalize(features.patches[-1], dim=-1)  # (B, T, F, D)
        B, T = tokens.shape[:2]
        tokens = tokens.flatten(0, 1) if self.level == "frame" else tokens.flatten(1, 2)
        binary = F.normalize(_Sign.apply(self.prototypes), dim=-1)
        x = (tokens @ binary.T).max(1).values  # (G, K)
        logits = self.fc(self.dropout(x))
        return logits.view(B, T, -1) if self.level == "frame" else logits


PLAIN = {"cgp": PlainCGP, "protobin": PlainProtoBin}
