"""``protobin`` (PB) and ``protofloat``: prototypes for the last block's patches (docs/method.md 4).

Features of ``protobin`` are ``max over patches of n(z) . n(sign(p_k))`` with ``sign(0) = +1`` and
``n`` the division by the L2 norm, at frame level the maximum over frequency; then dropout and a
linear layer K -> C. The gradient is computed for the +-1 matrix, through its normalisation, and
passed to the real-valued prototypes unchanged (straight through; golden README section 6).
``protofloat`` is the same without the sign: ``n(z) . n(p_k)``. Prototypes do not decay and start at
0.02 N(0, 1). K is given in total (BAT: 10,000), or as J per class (*Unmute*: 20): then K = J C; the
linear layer is dense either way.

Parameters at D = 768, C = 527, L = 12 (K = 10,000): ``protobin`` 12,950,527; ``protofloat``
12,950,527.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from bat.probes.base import Dropout, Level, Probe, Size, fill_padding
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import few_rows, mix_normalised
from bat.types import Features, Needs


class ProtoBin(Probe):
    """Binary prototypes for the last block's patches. ``per_class``: J, K = J C; None: K =
    ``prototypes``. ``dropout``: rate before the linear layer."""

    has_prototypes = True
    signs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        prototypes: int = 10_000,
        per_class: int | None = None,
        dropout: float = 0.2,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        K = prototypes if per_class is None else per_class * self.classes
        self.prototypes = nn.Parameter(0.02 * torch.randn(K, self.width))  # (K, D)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(K, self.classes)

    def forward(self, features: Features) -> Tensor:
        x = best_match(features, self.prototypes, level=self.level, signs=self.signs)
        x = self.dropout(x)  # (B, K) or (B, T, K)
        return few_rows(self.fc, x) if self.level == "clip" else self.fc(x)

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return Needs("last")

    def no_weight_decay(self) -> set[str]:
        return {"prototypes"}


class ProtoFloat(ProtoBin):
    """Real-valued prototypes for the last block's patches."""

    signs = False


def best_match(features: Features, prototypes: Tensor, *, level: Level, signs: bool) -> Tensor:
    """Returns the highest cosine of the last block's patches to each prototype or to its signs.

    Prototypes (K, D) -> (B, K) at clip level, over frequency (B, T, K) at frame level; float32.
    """
    last = features.patches[-1:]  # (1, B, T, F, D)
    tokens = mix_normalised(last, last.new_ones(1))  # (B, T, F, D)
    if level == "clip":
        groups = fill_padding(tokens, features).flatten(1, 2)  # (G, M, D)
    else:
        groups = tokens.flatten(0, 1)
    x = pool_prototypes(groups, prototypes, low=False, signs=signs).flatten(1)
    return x if level == "clip" else x.unflatten(0, tokens.shape[:2])


PROBES: dict[str, type[Probe]] = {"protobin": ProtoBin, "protofloat": ProtoFloat}
