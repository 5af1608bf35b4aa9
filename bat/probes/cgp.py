"""``cgp``: Convex Gated Probing, which reads every block and every patch (docs/method.md 4).

``alpha = softmax(a)``, a learned and 1 at start; ``n`` is division by the L2 norm:

    zbar = sum_l alpha_l n(z_l)         obar = sum_l alpha_l n(o_l)        (not normalised again)
    features of prototype k = [min over patches of zbar . n(p_k),
                               obar . n(p_k),
                               max over patches of zbar . n(p_k)]

interleaved as (K, 3), dropout, a linear layer 3K -> C with bias. For an encoder without class token
``cls`` selects the middle feature: the mean over patches of ``zbar . n(p_k)`` (``patches``), or as
above with o_l the mean of block l's patches (``mean``, as in the paper's numbers for BEATs; for a
clip in chunks the paper takes the plain mean of the chunks' means, here it is that of all patches).
At frame level min, mean and max run over frequency at each time patch.
K = 10,000 prototypes start at 0.02 N(0, 1) and do not decay.
The (B, K, N) similarities are never stored (``extremes.py``), nor the normalised stack of all
blocks (``mixing.py``).

Parameters at D = 768, C = 527, L = 12 (K = 10,000): 23,490,539.
"""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from bat.errors import UserError
from bat.probes.base import Dropout, Level, Probe, Size, fill_padding, mean_patch
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import few_rows, mix_normalised
from bat.types import Features, Needs

Cls = Literal["patches", "mean"]


class CGP(Probe):
    """Convex Gated Probing: prototypes read every patch of all blocks. ``prototypes``: K;
    ``dropout``: rate before the linear layer; ``cls``: substitute for a missing class token,
    see above; None: ``patches``."""

    has_prototypes = True

    def __init__(
        self,
        *,
        prototypes: int = 10_000,
        dropout: float = 0.2,
        cls: Cls | None = None,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        check_cls(cls, has_cls=self.has_cls, level=self.level)
        self.cls = cls or "patches"
        self.layer_logits = nn.Parameter(torch.ones(self.depth))  # (L,)
        self.prototypes = nn.Parameter(0.02 * torch.randn(prototypes, self.width))  # (K, D)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(3 * prototypes, self.classes)

    def forward(self, features: Features) -> Tensor:
        x = self.dropout(self.pooled(features))
        if self.level == "clip":
            return few_rows(self.fc, x)  # (B, C)
        return self.fc(x).unflatten(0, features.patches.shape[1:3])  # (B, T, C)

    def pooled(self, features: Features) -> Tensor:
        """Returns what the linear layer reads, (B, 3 K), or at frame level (B T, 3 K)."""
        gate = self.layer_logits.softmax(0)  # (L,)
        mixed = mix_normalised(features.patches, gate)  # (B, T, F, D)
        frame = self.level == "frame"
        if frame:
            tokens = mixed.flatten(0, 1)  # (G, M, D)
            middle = tokens.mean(1)  # (G, D): the mean of products is the product of the mean
        elif self.has_cls or self.cls == "mean":
            one = features.cls if self.has_cls else mean_patch(features.patches, features)
            assert one is not None
            middle = mix_normalised(one, gate)  # (B, D)
        else:
            middle = mean_patch(mixed, features)
        if not frame:
            tokens = fill_padding(mixed, features).flatten(1, 2)
        x = pool_prototypes(tokens, self.prototypes, middle)  # (G, K, 3)
        return x.flatten(1)  # (G, 3 K), prototype-major

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return Needs("all")

    def no_weight_decay(self) -> set[str]:
        return {"prototypes"}

    def layer_gate(self) -> Tensor:
        return self.layer_logits.detach().softmax(0)


def check_cls(cls: str | None, *, has_cls: bool, level: Level) -> None:
    """Raise ``UserError`` for a ``head.cls`` that is unknown or would be ignored."""
    if cls not in (None, *get_args(Cls)):
        raise UserError(f"head.cls={cls} is not known: {' or '.join(get_args(Cls))}")
    if cls is not None and (has_cls or level == "frame"):
        why = "this encoder has one" if has_cls else "level=frame reads none"
        raise UserError(
            f"head.cls={cls} stands in for the class token of cgp, and {why}: leave it away"
        )


PROBES: dict[str, type[Probe]] = {"cgp": CGP}
