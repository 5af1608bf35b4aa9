"""``abmilp``: multiple-instance attention over the last block's patches (arXiv 2509.24901).

    a = softmax over tokens of w . tanh(W_a z + b_a) + b,   x = sum_i a_i z_i,   logits = W x

W_a is D x D, W has no bias. (b shifts all scores alike and has no effect; it is part of the
definition, Linear(D, 1).)

Parameters at D = 768, C = 527, L = 12: 996,097.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from bat.probes.attention import Attentive, shares
from bat.probes.base import Probe, Size


class ABMILP(Attentive):
    """Attention over the last block's patches (multiple-instance pooling). ``dropout``: rate
    before the output layer."""

    biased = False

    def __init__(self, *, dropout: float = 0.2, **size: Unpack[Size]) -> None:
        super().__init__(**size, dropout=dropout)
        self.hidden = nn.Linear(self.width, self.width)
        self.score = nn.Linear(self.width, 1)

    def pool(self, tokens: Tensor, inside: Tensor | None) -> Tensor:
        scores = self.score(torch.tanh(self.hidden(tokens)))  # (B, N, 1)
        share = shares(scores.transpose(1, 2), inside)  # (B, 1, N)
        return (share @ tokens).squeeze(1)  # (B, D)


PROBES: dict[str, type[Probe]] = {"abmilp": ABMILP}
