"""``proto``: prototypes that belong to classes, with an orthogonality loss (arXiv 2509.24901).

J prototypes p_cj per class (20), ``s_cj = max over patches of n(z) . n(p_cj)`` on the last block,
at frame level the maximum over frequency. A class depends on its own similarities only, with
weights that are not negative, so that a logit is evidence for its class only:

    logit_c = sum_j softplus(v_cj) s_cj + b_c
    loss    = loss(logits) + w mean over c of ||P_c P_c^T - I||_F^2,   P_c the (J, D) of n(p_cj)

The paper names the parts and leaves open how weights are kept non-negative, how the loss is summed,
and the initial values. Our choices: softplus, since a weight clamped at 0 would never learn again;
the mean over classes, so that w = 1 means the same for 2 classes as for 527; weights start at 1,
prototypes at 0.02 N(0, 1), biases at -2 (most classes are absent from a clip). Neither prototypes
nor weights decay: decay would pull the weights to softplus(0) = 0.69.
Dropout, a head setting, acts on the similarities.

Parameters at D = 768, C = 527, L = 12 (J = 20): 8,105,787.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size
from bat.probes.protobin import best_match
from bat.types import Features, Needs

PER_CLASS = 20
"""Default of J."""
BIAS = -2.0


class Proto(Probe):
    """Prototypes of each class, for the last block's patches. ``per_class``: J, None: 20;
    ``orthogonality``: w; ``dropout``: rate before the weights."""

    has_prototypes = True

    def __init__(
        self,
        *,
        per_class: int | None = None,
        orthogonality: float = 1.0,
        dropout: float = 0.2,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        J = PER_CLASS if per_class is None else per_class
        self.orthogonality = orthogonality
        # class-major
        self.prototypes = nn.Parameter(0.02 * torch.randn(self.classes * J, self.width))
        self.raw_weights = nn.Parameter(torch.full((self.classes, J), math.log(math.e - 1)))
        self.bias = nn.Parameter(torch.full((self.classes,), BIAS))
        self.dropout = Dropout(dropout)

    @property
    def class_weights(self) -> Tensor:
        """Returns the weights (C, J), positive."""
        return F.softplus(self.raw_weights)

    def forward(self, features: Features) -> Tensor:
        x = best_match(features, self.prototypes, level=self.level, signs=False)
        own = self.dropout(x).unflatten(-1, self.raw_weights.shape)  # (..., C, J) float32
        return (own * self.class_weights).sum(-1) + self.bias  # (B, C) or (B, T, C)

    def penalty(self) -> Tensor:
        """Returns the mean over classes of ``||P_c P_c^T - I||_F^2``, a scalar.

        Computed in float32, also under autocast.
        """
        with torch.autocast(self.prototypes.device.type, enabled=False):
            P = F.normalize(self.prototypes, dim=-1).view(*self.raw_weights.shape, -1)  # (C, J, D)
            excess = P @ P.transpose(1, 2) - torch.eye(P.shape[1], device=P.device)
            return excess.square().sum((1, 2)).mean()

    def training_loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor
    ) -> Tensor:
        value = loss(logits, targets)
        return value + self.orthogonality * self.penalty() if self.orthogonality else value

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return Needs("last")

    def no_weight_decay(self) -> set[str]:
        return {"prototypes", "raw_weights"}


PROBES: dict[str, type[Probe]] = {"proto": Proto}
