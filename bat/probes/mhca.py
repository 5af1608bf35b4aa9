"""``mhca``: multi-head cross-attention of one learned query over the last block's patches
(arXiv 2509.24901).

    x = concat_h softmax(q_h K_h^T / sqrt(d)) V_h,   K = Z W_k^T,   V = Z W_v^T,   logits = W x

q (D) is learned, 0.02 N(0, 1) at start; W_k and W_v are D x D without bias, W has none either;
H = 12 heads (16 at D = 1024), hence d = 64, the rule here at any other width: D / 64 heads, at
least one. Keys and values are not computed (``attention.py``).

Parameters at D = 768, C = 527, L = 12 (12 heads): 1,585,152.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from bat.errors import UserError
from bat.probes.attention import Attentive, attended, project_heads
from bat.probes.base import Probe, Size

HEAD_WIDTH = 64


class MHCA(Attentive):
    """A learned query attends to the last block's patches. ``attention_heads``: H, which must
    divide D; None: D / 64. ``dropout``: rate before the output layer."""

    biased = False

    def __init__(
        self, *, attention_heads: int | None = None, dropout: float = 0.2, **size: Unpack[Size]
    ) -> None:
        super().__init__(**size, dropout=dropout)
        self.heads = (
            max(1, self.width // HEAD_WIDTH) if attention_heads is None else attention_heads
        )
        if self.width % self.heads:
            raise UserError(
                f"mhca: {self.heads} attention heads do not divide the encoder's width "
                f"{self.width}: give head.attention_heads=H that does"
            )
        self.query = nn.Parameter(0.02 * torch.randn(self.width))  # (D,)
        self.keys = nn.Linear(self.width, self.width, bias=False)
        self.values = nn.Linear(self.width, self.width, bias=False)

    def pool(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        query = self.query.unflatten(0, (self.heads, -1))  # (H, d)
        keys = self.keys.weight.unflatten(0, (self.heads, -1))  # (H, d, D)
        directions = torch.einsum("hd,hdc->hc", query, keys) * query.shape[1] ** -0.5
        return project_heads(self.values.weight, attended(tokens, directions, inside))  # (B, D)


PROBES: dict[str, type[Probe]] = {"mhca": MHCA}
