"""``asr``: the paper's head for transcription by CTC, 8 outputs per time patch (docs/method.md 4).

    x = mean_f sum_l alpha_l z_l,   alpha = softmax(a), a starts at 1          (T, D)
    y = transposed convolution along time, kernel = stride = 8                 (8 T, D)
    logits = W dropout(LN(BiLSTM(y))) + b, two layers of 512 in each direction (8 T, C)

Patches of 160 ms give steps of 20 ms. Kernel and stride are equal, so no patch meets another in the
convolution, and the LSTM runs over each clip's own steps (packed): a batch's padding changes
nothing. The LSTM is float32 whatever autocast says; between its layers is dropout.

Departure: the reference runs the LSTM over the padding of a batch.

Parameters at D = 768, C = 527, L = 12: 16,812,315.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bat.probes.base import Dropout, Level, Probe, mix_blocks
from bat.probes.linear import one_vector
from bat.types import Features

STEPS = 8
"""Outputs per time patch."""


class ASR(Probe):
    """Transposed convolution, bidirectional LSTM and linear layer on the mixed blocks.

    ``hidden``: width of each direction of the LSTM, None: 512; ``norm``: LayerNorm (eps 1e-6)
    before the output layer; ``dropout``: rate there and between the LSTM's layers.
    """

    levels: ClassVar[tuple[Level, ...]] = ("frame",)
    steps: ClassVar[int] = STEPS

    def __init__(
        self,
        *,
        classes: int,
        width: int,
        depth: int,
        has_cls: bool,
        level: Level = "frame",
        hidden: int | None = None,
        norm: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(classes=classes, width=width, depth=depth, has_cls=has_cls, level=level)
        hidden = 512 if hidden is None else hidden
        self.layer_logits = nn.Parameter(torch.ones(depth))  # (L,)
        self.upsample = nn.ConvTranspose1d(width, width, STEPS, stride=STEPS)
        self.lstm = nn.LSTM(
            width, hidden, num_layers=2, bidirectional=True, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(2 * hidden, eps=1e-6) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, features: Features) -> Tensor:
        """Computes logits (B, 8 T, C)."""
        vectors = one_vector(features, has_cls=self.has_cls, level="frame", all_blocks=True)
        x = mix_blocks(vectors, self.layer_logits.softmax(0))  # (B, T, D)
        x = self.upsample(x.transpose(1, 2)).transpose(1, 2)  # (B, 8 T, D)
        total = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if features.valid is None:
                x, _ = self.lstm(x)  # (B, 8 T, 2 hidden)
            else:
                steps = features.valid.cpu() * STEPS
                packed = pack_padded_sequence(x, steps, batch_first=True, enforce_sorted=False)
                x, _ = pad_packed_sequence(
                    self.lstm(packed)[0], batch_first=True, total_length=total
                )
        return self.fc(self.dropout(self.norm(x)))

    def layer_gate(self) -> Tensor:
        return self.layer_logits.detach().softmax(0)


PROBES: dict[str, type[Probe]] = {"asr": ASR}
