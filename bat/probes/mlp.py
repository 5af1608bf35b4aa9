"""``mlp``: one hidden layer on the class token (arXiv 2509.24901).

    logits = W_2 dropout(GELU(W_1 LN(o_L) + b_1)) + b_2

on the last block's class token, or the mean patch of an encoder without one. The paper says no more
than "one hidden layer on the class token"; GELU, the LayerNorm and the position of dropout are our
choice, and so is frame level: the mean over frequency of the last block's patches, as in
``linear``.

Parameters at D = 768, C = 527, L = 12 (hidden 768): 997,391.
"""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size
from bat.probes.linear import one_vector, one_vector_needs
from bat.types import Features, Needs


class MLP(Probe):
    """MLP of one hidden layer on the last block. ``hidden``: width of the hidden layer, None:
    the encoder's; ``norm``: LayerNorm (eps 1e-6) first; ``dropout``: rate before the output
    layer."""

    def __init__(
        self,
        *,
        hidden: int | None = None,
        norm: bool = True,
        dropout: float = 0.2,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        hidden = self.width if hidden is None else hidden
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if norm else nn.Identity()
        self.hidden = nn.Linear(self.width, hidden)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(hidden, self.classes)

    def forward(self, features: Features) -> Tensor:
        x = one_vector(features, has_cls=self.has_cls, level=self.level, all_blocks=False)[0]
        x = F.gelu(self.hidden(self.norm(x)))
        return self.fc(self.dropout(x))  # (B, C) or (B, T, C)

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return one_vector_needs(has_cls=has_cls, level=level, all_blocks=False)


PROBES: dict[str, type[Probe]] = {"mlp": MLP}
