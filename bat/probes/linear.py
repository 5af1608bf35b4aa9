"""``linear`` (LP) and ``lcgp``: LayerNorm, dropout, linear layer on one vector (docs/method.md 4).

``linear`` reads the last block: its class token, or the mean patch of an encoder without one; at
frame level the mean over frequency of its patches. ``lcgp`` reads ``sum_l alpha_l o_l`` with
``alpha = softmax(a)``, a learned and 0 at start; at frame level ``sum_l alpha_l mean_f z_l``.
The linear layer keeps PyTorch's initialisation.

Parameters at D = 768, C = 527, L = 12: ``linear`` 406,799; ``lcgp`` 406,811.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size, mean_patch, mix_blocks
from bat.types import Features, Needs


class Linear(Probe):
    """Linear layer on the last block. ``norm``: LayerNorm (eps 1e-6) first; ``dropout``: rate
    before the layer."""

    gated: ClassVar[bool] = False

    def __init__(self, *, norm: bool = True, dropout: float = 0.2, **size: Unpack[Size]) -> None:
        super().__init__(**size)
        self.layer_logits = nn.Parameter(torch.zeros(self.depth)) if self.gated else None  # (L,)
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(self.width, self.classes)

    def forward(self, features: Features) -> Tensor:
        vectors = one_vector(
            features, has_cls=self.has_cls, level=self.level, all_blocks=self.gated
        )
        if self.layer_logits is None:
            x = vectors[-1]
        else:
            x = mix_blocks(vectors, self.layer_logits.softmax(0))
        return self.fc(self.dropout(self.norm(x)))  # (B, C) or (B, T, C)

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return one_vector_needs(has_cls=has_cls, level=level, all_blocks=cls.gated)

    def layer_gate(self) -> Tensor | None:
        return None if self.layer_logits is None else self.layer_logits.detach().softmax(0)


class LCGP(Linear):
    """Linear layer on the gated sum of all blocks' class tokens."""

    gated = True


def one_vector(features: Features, *, has_cls: bool, level: Level, all_blocks: bool) -> Tensor:
    """Returns a vector per clip or time patch, of each block or of the last one (l = 1).

    (l, B, D) at clip level, (l, B, T, D) at frame level; float32. It is the class token, or the
    mean patch of an encoder without one; at frame level the mean over frequency.
    """
    blocks = slice(None) if all_blocks else slice(-1, None)
    if level == "frame":
        return features.patches[blocks].mean(3, dtype=torch.float32)
    if has_cls:
        assert features.cls is not None
        return features.cls[blocks].float()
    return mean_patch(features.patches[blocks], features)


def one_vector_needs(*, has_cls: bool, level: Level, all_blocks: bool) -> Needs:
    """Returns the features that ``one_vector`` reads."""
    if has_cls and level == "clip":
        return Needs("none")
    return Needs("all" if all_blocks else "last")


PROBES: dict[str, type[Probe]] = {"linear": Linear, "lcgp": LCGP}
