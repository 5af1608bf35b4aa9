"""``simpool``: patches weighted by their similarity to the mean patch (arXiv 2509.24901).

    X = LN(Z),   q = mean token of X,   x = softmax(q X^T / sqrt(D)) X,   logits = W x + b

The LayerNorm (eps 1e-6, learned scale and shift) is the only part of the pooling that learns.

Parameters at D = 768, C = 527, L = 12: 406,799.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from bat.probes.attention import Attentive, attended
from bat.probes.base import Probe, Size


class SimPool(Attentive):
    """Patches of the last block weighted by similarity to their mean. ``dropout``: rate before
    the output layer."""

    def __init__(self, *, dropout: float = 0.2, **size: Unpack[Size]) -> None:
        super().__init__(**size, dropout=dropout)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    def pool(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        x = self.norm(tokens)  # (B, N, D)
        if inside is None:
            query = x.mean(1, keepdim=True)  # (B, 1, D)
        else:
            own = inside[..., None]
            query = (x * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)
        return attended(x, query * self.width**-0.5, inside).squeeze(1)  # (B, D)


PROBES: dict[str, type[Probe]] = {"simpool": SimPool}
