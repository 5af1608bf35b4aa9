"""``asr``: the paper's head for transcription by CTC, 8 outputs per time patch (docs/method.md 4).

    x = mean_f sum_l alpha_l z_l,   alpha = softmax(a), a starts at 1          (T, D)
    y = transposed convolution along time, kernel = stride = 8                 (8 T, D)
    logits = W dropout(LN(BiLSTM(y))) + b, two layers of 512 in each direction (8 T, C)

Patches of 160 ms give steps of 20 ms. Kernel and stride are equal, so no patch meets another in the
convolution. Each direction of the LSTM begins at its end of each clip, and padding comes last: a
batch's padding changes nothing. (Packed sequences give the same and take four times as long on a
CPU.) The LSTM is float32 whatever autocast says; between its layers is dropout.

Departure: the reference runs the LSTM over the padding of a batch.

Parameters at D = 768, C = 527, L = 12: 16,812,315.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size, mix_blocks
from bat.probes.linear import one_vector
from bat.types import Features

STEPS = 8
"""Outputs per time patch."""


class BiLSTM(nn.Module):
    """One bidirectional LSTM layer, (B, T, D) -> (B, T, 2 hidden), for clips of several lengths."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(width, hidden, batch_first=True)
        self.back = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        """``turned`` (B, T): the steps of each clip from its last to its first, then padding."""

        def turn(y: Tensor) -> Tensor:
            return y.gather(1, turned[..., None].expand_as(y))

        return torch.cat([self.onward(x)[0], turn(self.back(turn(x))[0])], dim=-1)


class ASR(Probe):
    """Transposed convolution, bidirectional LSTM and linear layer on the mixed blocks.

    ``hidden``: width of each direction of the LSTM, None: 512; ``norm``: LayerNorm (eps 1e-6)
    before the output layer; ``dropout``: rate there and between the LSTM's layers.
    """

    levels: ClassVar[tuple[Level, ...]] = ("frame",)
    outputs_per_patch: ClassVar[int] = STEPS

    def __init__(
        self,
        *,
        hidden: int | None = None,
        norm: bool = True,
        dropout: float = 0.2,
        **size: Unpack[Size],
    ) -> None:
        size.setdefault("level", "frame")
        super().__init__(**size)
        hidden = 512 if hidden is None else hidden
        self.layer_logits = nn.Parameter(torch.ones(self.depth))  # (L,)
        self.upsample = nn.ConvTranspose1d(self.width, self.width, STEPS, stride=STEPS)
        self.lstm = nn.ModuleList([BiLSTM(self.width, hidden), BiLSTM(2 * hidden, hidden)])
        self.between = Dropout(dropout)
        self.norm = nn.LayerNorm(2 * hidden, eps=1e-6) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(2 * hidden, self.classes)

    def forward(self, features: Features) -> Tensor:
        """Computes logits (B, 8 T, C)."""
        vectors = one_vector(features, has_cls=self.has_cls, level="frame", all_blocks=True)
        x = mix_blocks(vectors, self.layer_logits.softmax(0))  # (B, T, D)
        x = self.upsample(x.transpose(1, 2)).transpose(1, 2)  # (B, 8 T, D)
        B, T = x.shape[:2]
        steps = torch.arange(T, device=x.device)
        own = steps.new_full((B,), T) if features.valid is None else features.valid * STEPS
        turned = torch.where(steps < own[:, None], own[:, None] - 1 - steps, steps)  # (B, 8 T)
        with torch.autocast(x.device.type, enabled=False):
            first, second = self.lstm
            x = second(self.between(first(x.float(), turned)), turned)  # (B, 8 T, 2 hidden)
        return self.fc(self.dropout(self.norm(x)))

    def layer_gate(self) -> Tensor:
        return self.layer_logits.detach().softmax(0)


PROBES: dict[str, type[Probe]] = {"asr": ASR}
