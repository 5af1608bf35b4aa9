"""``protobin`` (PB): binary prototypes against the last block's patches (SPEC section 4).

Features are ``max over patches of n(z) . n(sign(p_k))`` with ``sign(0) = +1`` and ``n`` the
division by the L2 norm, at frame level the maximum over frequency; then dropout and a linear layer
K -> C. The gradient is computed for the +-1 matrix, through its normalisation, and handed to the
real-valued prototypes unchanged (straight through; golden README section 6). Prototypes do not
decay and start at 0.02 N(0, 1).

Parameters at D = 768, C = 527, K = 10,000: 12,950,527.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bat.probes.base import Level, Probe
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import Kernel, few_rows, mix_normalised
from bat.shapes import Features


class ProtoBin(Probe):
    """Binary prototypes. ``prototypes``: K; ``dropout``: rate before the linear layer.

    ``kernel``: of normalising and pooling, ``portable`` or ``triton`` (GPUs).
    """

    def __init__(
        self,
        *,
        classes: int,
        width: int,
        depth: int,
        has_cls: bool,
        level: Level = "clip",
        prototypes: int = 10_000,
        dropout: float = 0.2,
        kernel: Kernel = "portable",
    ) -> None:
        super().__init__(classes=classes, width=width, depth=depth, has_cls=has_cls, level=level)
        self.prototypes = nn.Parameter(0.02 * torch.randn(prototypes, width))  # (K, D)
        self.dropout = nn.Dropout(dropout)
        self.kernel = kernel
        self.fc = nn.Linear(prototypes, classes)

    def forward(self, features: Features) -> Tensor:
        last = features.patches[-1:]  # (1, B, T, F, D)
        tokens = mix_normalised(last, last.new_ones(1), kernel=self.kernel)  # (B, T, F, D)
        frame = self.level == "frame"
        tokens = tokens.flatten(0, 1) if frame else tokens.flatten(1, 2)  # (G, M, D)
        x = pool_prototypes(tokens, self.prototypes, low=False, signs=True, kernel=self.kernel)
        x = self.dropout(x.flatten(1))  # (G, K)
        if not frame:
            return few_rows(self.fc, x)  # (B, C)
        return self.fc(x).unflatten(0, features.patches.shape[1:3])  # (B, T, C)

    def no_weight_decay(self) -> set[str]:
        return {"prototypes"}


PROBES: dict[str, type[Probe]] = {"protobin": ProtoBin}
