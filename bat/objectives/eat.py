"""EAT: the objective that BAT's departs from (Chen et al., IJCAI 2024, arXiv 2401.03497).

It is masked latent regression (``bat.objectives.masked_latent``) with the targets of data2vec 2.0,
its convolutional decoder, which finds noise at masked places, and weighted losses:

    h_l    = teacher's MLP output of block l before its residual, standardised per channel over the
             N patches;    y = standardise per patch over channels( mean_l h_l ),    eps 1e-5
    local  = mean over masked patches of mean_D (prediction - y)^2
    global = mean (student class token - mean over patches of y)^2
    loss   = sqrt(D) (local + global_weight * global)                       float32

EAT sums its global loss over the B V views of a GPU, which is a weight of 12 * 16 = 192; here it is
a setting, so that the loss does not depend on the number of devices. sqrt(D) acts through gradient
clipping only. The noise comes from torch's global generator, which is seeded for each micro-batch
and rank. Recipe ``eat-as2m`` has the schedule, front end and encoder (``bat.encoders.eat``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from bat.encoders.base import Encoder, MaskableEncoder
from bat.nn.decoder import CNNDecoder
from bat.objectives.masked_latent import MaskedLatent
from bat.ranges import NonNegativeFloat, PositiveInt


class EAT(MaskedLatent):
    """Masked latent regression as EAT does it."""

    @dataclass
    class Config(MaskedLatent.Config):
        """The settings of masked latent regression with EAT's defaults, and three of its own."""

        name: str = "eat"
        target: Literal["eob", "mlp"] = "mlp"
        decoder: Literal["vit12h", "vit6h", "cnn", "cross"] = "cnn"
        decoder_kernel: PositiveInt = 3
        """Side of the convolutions of ``decoder=cnn``; EAT's Large has 5."""
        noise: NonNegativeFloat = 0.01
        """Deviation of the noise at masked places in ``decoder=cnn``; 0: a learned mask token."""
        global_weight: NonNegativeFloat = 192.0
        """Weight of the global loss; EAT: the views of one GPU, 12 clips of 16."""

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            defaults = EAT.Config()
            for name in ("decoder_kernel", "noise"):
                value = getattr(self, name)
                if self.decoder != "cnn" and value != getattr(defaults, name):
                    yield (
                        f"objective.{name}={value} is for objective.decoder=cnn, not "
                        f"{self.decoder}: leave it away"
                    )

        def width_in(self, width: int) -> int:
            """Returns the width of the decoder; by default the encoder's, also for Large."""
            if self.decoder == "cnn":
                return self.decoder_width or width
            return super().width_in(width)

    eps: ClassVar[float] = 1e-5

    def __init__(
        self,
        encoder: MaskableEncoder,
        decoder: nn.Module,
        *,
        global_weight: float = 192.0,
        **how: Any,
    ) -> None:
        """``how``: keywords of ``MaskedLatent``."""
        super().__init__(encoder, decoder, **{"target": "mlp", **how})
        self.global_weight = global_weight

    @classmethod
    def build(cls, config: Any, encoder: Encoder, *, seed: int) -> Self:
        built = super().build(config, encoder, seed=seed)
        built.global_weight = config.global_weight
        return built

    @staticmethod
    def decoder_of(config: Any, encoder: MaskableEncoder) -> nn.Module:
        if config.decoder != "cnn":
            return MaskedLatent.decoder_of(config, encoder)
        sizes = {"width": config.width_in(encoder.width), "depth": config.decoder_depth}
        shape = {"kernel": config.decoder_kernel, "noise": config.noise}
        return CNNDecoder(encoder.width, encoder.grid, **sizes, **shape)

    def total(self, local: Tensor, global_: Tensor) -> Tensor:
        return self.student.encoder.width**0.5 * (local + self.global_weight * global_)

    def describe(self) -> str:
        return f"EAT, {self.mask.views} views a clip"


OBJECTIVE = EAT
