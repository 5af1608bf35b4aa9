"""``vqt``, visual query tuning: learned tokens that read every block (docs/method.md 4).

q = 10 queries per block join its input as queries only: they attend to the tokens and pass through
the block, no token attends to them, and their outputs, h_l (q D), are collected.

    x = [n(o_L), n(h_1), ..., n(h_L)],   logits = W dropout(LN(x)) + b,   n(x) = x / ||x||_2

Without a class token o_L is the mean patch. A clip of several chunks has the mean of its chunks'
h_l. Queries start uniform in +-sqrt(6 / (3 * 256 + D)) (256 = 16 * 16 values of a patch) and do not
decay. Dropout is applied; the reference ignores it here (docs/method.md 8).

The probe refers to the encoder but does not contain it: none of the encoder's parameters is
trained, saved or moved with the probe.

Parameters at D = 768, C = 527, L = 12 (q = 10): 49,251,599.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.errors import UserError
from bat.probes.base import Dropout, Level, Probe, Size
from bat.probes.linear import one_vector
from bat.probes.mixing import few_rows
from bat.types import Features, Needs


class Queried(Protocol):
    """A frozen encoder whose blocks can be queried (``bat.encoders.base.Encoder``)."""

    has_queries: ClassVar[bool]

    def query_blocks(self, queries: Tensor, features: Features) -> Tensor:
        """Passes queries (L, q, D) through the blocks; needs ``features.entry``. (L, B, q, D)."""


class VQT(Probe):
    """Learned queries read every block of the encoder. ``encoder``: the frozen encoder of the
    features. ``queries``: q; ``vqt_norm``: LayerNorm (eps 1e-6) over all features, None: as
    ``norm``; ``dropout``: rate before the output layer.

    Raises ``UserError`` without an encoder, or with one whose blocks cannot be queried.
    """

    levels: ClassVar[tuple[Level, ...]] = ("clip",)

    def __init__(
        self,
        *,
        encoder: Queried | None,
        queries: int = 10,
        norm: bool = True,
        vqt_norm: bool | None = None,
        dropout: float = 0.2,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        if encoder is None:
            raise UserError(
                "probe vqt is made of the frozen encoder, and there is none here: use it with "
                "bat-probe, or another probe"
            )
        if not encoder.has_queries:
            raise UserError(
                f"probe vqt is not defined for this encoder ({type(encoder).__name__}): its "
                "blocks cannot be queried. Leave vqt out of the methods"
            )
        self._held = _Held(encoder)
        bound = (6 / (3 * 256 + self.width)) ** 0.5
        self.queries = nn.Parameter(
            torch.empty(self.depth, queries, self.width).uniform_(-bound, bound)
        )
        inputs = self.width + self.depth * queries * self.width
        norm = norm if vqt_norm is None else vqt_norm
        self.norm = nn.LayerNorm(inputs, eps=1e-6) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(inputs, self.classes)

    def forward(self, features: Features) -> Tensor:
        parts = [F.normalize(part, dim=-1) for part in self.read(features)]
        return few_rows(self.fc, self.dropout(self.norm(torch.cat(parts, dim=-1))))  # (B, C)

    def read(self, features: Features) -> list[Tensor]:
        """Returns the last class token (B, D) and each block's query outputs (B, q D), float32."""
        cls = one_vector(features, has_cls=self.has_cls, level=self.level, all_blocks=False)[0]
        became = self._held.encoder.query_blocks(self.queries, features)  # (L, B, q, D)
        return [cls, *became.float().flatten(2)]

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        return Needs("all", entry=True)

    def no_weight_decay(self) -> set[str]:
        return {"queries"}


class _Held:
    """Holder that keeps an encoder out of its probe's parameters and copies."""

    def __init__(self, encoder: Queried) -> None:
        self.encoder = encoder

    def __deepcopy__(self, memo: object) -> _Held:
        return self


PROBES: dict[str, type[Probe]] = {"vqt": VQT}
