"""The layer curve: one ``linear`` probe on each block, all blocks trained at once.

For block l the probe of ``linear.py``: LN, dropout, linear on o_l, or on the mean patch of an
encoder without class token; at frame level on the mean over frequency of z_l. The blocks share no
parameter and the loss is the sum of theirs, so under AdamW each is trained as it would be alone;
all are computed by one batched product. They also share the dropout mask, which makes blocks
comparable.

It is not in ``PROBES``, since it is evaluated as L separate probes (``answers``).
Departure: ``optim.clip_norm`` would bound the norm of all blocks' gradients together.

Parameters at D = 768, C = 527, L = 12: 4,881,588.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size
from bat.probes.linear import one_vector, one_vector_needs
from bat.types import Features, Needs

EPS = 1e-6
"""Epsilon of the LayerNorm, as in ``linear.py``."""


class LinearCurve(Probe):
    """L linear probes. ``norm``: LayerNorm first; ``dropout``: rate before the layer."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.2, **size: Unpack[Size]) -> None:
        super().__init__(**size)
        # only for their initialisation
        layers = [nn.Linear(self.width, self.classes) for _ in range(self.depth)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))  # (L, C)
        self.scale = nn.Parameter(torch.ones(self.depth, self.width)) if norm else None  # (L, D)
        self.shift = nn.Parameter(torch.zeros(self.depth, self.width)) if norm else None  # (L, D)
        self.dropout = Dropout(dropout)

    def forward(self, features: Features) -> Tensor:
        """Computes logits of every block: (L, B, C) at clip level, (L, B, T, C) at frame level."""
        x = one_vector(features, has_cls=self.has_cls, level=self.level, all_blocks=True)
        shape = x.shape[1:-1]  # of (L, B, D) or (L, B, T, D)
        x = x.flatten(1, -2)  # (L, R, D)
        if self.scale is not None and self.shift is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=EPS)
            x = x * self.scale[:, None] + self.shift[:, None]
        x = x * self.dropout(torch.ones_like(x[0]))
        x = torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))  # (L, R, C)
        return x.unflatten(1, shape)

    def training_loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor
    ) -> Tensor:
        """Returns the sum of the blocks' losses."""
        return torch.stack([loss(block, targets) for block in logits]).sum()

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        """Returns ``{"@1": ..., "@L": ...}``, the logits after each block."""
        return {f"@{number}": block for number, block in enumerate(logits, start=1)}

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return one_vector_needs(has_cls=has_cls, level=level, all_blocks=True)

    def no_weight_decay(self) -> set[str]:
        return {"bias", "scale", "shift"}
