"""``h2t``: a linear layer on the class tokens of all blocks, with a group lasso (docs/method.md 4).

    x = [o_1, ..., o_L]  (L D),   logits = W dropout(LN(x)) + b
    loss = loss(logits) + w sqrt(C) sum_j ||W_:,j||_2,   w = 1e-4

A group is a column of W, all weights of one input feature: the lasso selects which features of
which block are used at all. (The paper's text has w = 0 on AudioSet.) Without a class token the
mean patch of each block, at frame level the mean over frequency, is used instead.
Dropout before the layer is the head setting that all probes share.

Parameters at D = 768, C = 527, L = 12: 4,875,791.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size
from bat.probes.linear import one_vector, one_vector_needs
from bat.probes.mixing import few_rows
from bat.types import Features, Needs


class Head2Toe(Probe):
    """Linear layer on all blocks' class tokens, with a group lasso. ``lasso``: w; ``norm``:
    LayerNorm (eps 1e-6) over all L D features; ``dropout``: rate before the layer."""

    def __init__(
        self, *, lasso: float = 1e-4, norm: bool = True, dropout: float = 0.2, **size: Unpack[Size]
    ) -> None:
        super().__init__(**size)
        self.lasso = lasso
        self.norm = nn.LayerNorm(self.depth * self.width, eps=1e-6) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(self.depth * self.width, self.classes)

    def forward(self, features: Features) -> Tensor:
        x = one_vector(features, has_cls=self.has_cls, level=self.level, all_blocks=True)
        x = self.dropout(self.norm(x.movedim(0, -2).flatten(-2)))  # (B, L D) or (B, T, L D)
        return few_rows(self.fc, x) if self.level == "clip" else self.fc(x)

    def penalty(self) -> Tensor:
        """Returns ``sqrt(C) sum_j ||W_:,j||_2``, a scalar."""
        return self.classes**0.5 * torch.linalg.vector_norm(self.fc.weight, dim=0).sum()

    def training_loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor
    ) -> Tensor:
        value = loss(logits, targets)
        return value + self.lasso * self.penalty() if self.lasso else value

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return one_vector_needs(has_cls=has_cls, level=level, all_blocks=True)


PROBES: dict[str, type[Probe]] = {"h2t": Head2Toe}
