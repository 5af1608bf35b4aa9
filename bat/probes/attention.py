"""Base of the attentive probes of *Unmute the Patch Tokens* (arXiv 2509.24901).

``mhca``, ``ep``, ``simpool`` and ``abmilp`` pool the last block's patches into one vector per clip,
each by its own ``pool``, followed by dropout and a linear layer. Dropout is the head setting that
all probes share (the paper names none). They are defined at clip level only.

With a learned query neither the keys nor the values of single tokens have to be computed:
``q . (W_k z) = (W_k^T q) . z`` and ``sum_i w_i W_v z_i = W_v sum_i w_i z_i``. With A queries in all
heads that is 2 N A D multiplications per clip, while projecting the tokens takes 2 N D^2.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size
from bat.types import Features, Needs


class Attentive(Probe):
    """Base of probes that pool patches to one vector of ``pooled_width`` values (None: D)."""

    levels: ClassVar[tuple[Level, ...]] = ("clip",)
    biased: ClassVar[bool] = True
    """True if the output layer has a bias."""

    def __init__(
        self, *, dropout: float = 0.2, pooled_width: int | None = None, **size: Unpack[Size]
    ) -> None:
        super().__init__(**size)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(pooled_width or self.width, self.classes, bias=self.biased)

    def forward(self, features: Features) -> Tensor:
        tokens = features.patches[-1].flatten(1, 2)  # (B, N, D)
        if not torch.is_autocast_enabled(tokens.device.type):  # autocast casts by itself
            tokens = tokens.to(self.fc.weight.dtype)
        inside = features.inside()  # (B, T)
        if inside is not None:
            inside = inside.repeat_interleave(features.patches.shape[3], dim=1)  # (B, N)
        return self.fc(self.dropout(self.pool(tokens, inside)))  # (B, C)

    def pool(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        """Pools tokens (B, N, D) to one vector per clip, (B, pooled width). ``inside`` (B, N) bool:
        mask of the tokens that count; None: all."""
        raise NotImplementedError

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return Needs("last")


def attended(tokens: Tensor, directions: Tensor, inside: Tensor | None) -> Tensor:
    """Returns ``softmax over tokens of (directions . tokens)``-weighted means of the tokens.

    (B, N, D), (A, D) or (B, A, D) -> (B, A, D). ``inside`` (B, N): mask of tokens that count.
    """
    return shares(directions @ tokens.transpose(1, 2), inside) @ tokens


def shares(scores: Tensor, inside: Tensor | None) -> Tensor:
    """Returns the softmax over tokens of (B, A, N), 0 outside the mask ``inside`` (B, N)."""
    if inside is not None:
        scores = scores.masked_fill(~inside[:, None], -torch.inf)
    return scores.softmax(-1)


def project_heads(weight: Tensor, read: Tensor) -> Tensor:
    """Splits the rows of ``weight`` (H d, D) into H heads and applies each to its own vector:
    (B, H, D) -> (B, H d)."""
    heads = weight.unflatten(0, (read.shape[1], -1))  # (H, d, D)
    return torch.einsum("bhc,hdc->bhd", read, heads).flatten(1)
