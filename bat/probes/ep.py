"""``ep``, efficient probing: learned queries, each pooling its own channels (arXiv 2509.24901).

    x = concat_q softmax(u_q Z^T / sqrt(D)) V_q,   V = Z W_v^T split into Q chunks of channels

Q = 32 queries u_q (D), one head, no key projection, W_v (D_out x D) without bias; then a linear
layer. The paper leaves open: D_out, which is D here, rounded up to a multiple of Q so that every
width works; the initial queries, 0.02 N(0, 1); and the scale 1 / sqrt(D), that of one head of width
D. The values of single tokens are not computed (``attention.py``).

Parameters at D = 768, C = 527, L = 12 (Q = 32): 1,019,663.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from bat.probes.attention import Attentive, attended, project_heads
from bat.probes.base import Probe, Size


class EP(Attentive):
    """Learned queries pool the last block's channels. ``pool_queries``: Q; ``dropout``: rate
    before the output layer."""

    def __init__(
        self, *, pool_queries: int = 32, dropout: float = 0.2, **size: Unpack[Size]
    ) -> None:
        out = -(-size["width"] // pool_queries) * pool_queries
        super().__init__(**size, dropout=dropout, pooled_width=out)
        self.queries = nn.Parameter(0.02 * torch.randn(pool_queries, self.width))  # (Q, D)
        self.values = nn.Linear(self.width, out, bias=False)

    def pool(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        read = attended(tokens, self.queries * self.width**-0.5, inside)  # (B, Q, D)
        return project_heads(self.values.weight, read)  # (B, D_out)

    def no_weight_decay(self) -> set[str]:
        return {"queries"}


PROBES: dict[str, type[Probe]] = {"ep": EP}
