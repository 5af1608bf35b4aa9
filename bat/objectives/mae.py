"""Masked autoencoder: predicts the hidden patches of the log-mel, without a teacher.

Patches of each clip are hidden at random, the encoder sees the rest, and a small transformer with
mask tokens predicts the hidden ones (He et al. 2022, arXiv 2111.06377; on log-mels Huang et al.
2022, arXiv 2207.06405):

    y    = patch of the log-mel (P = 256 values), standardised: (x - mean) / sqrt(var + 1e-6)
    loss = mean over hidden patches of mean_P (prediction - y)^2                        float32

``decoder="cross"`` and ``predict`` below 1 (a share of the hidden patches) are CrossMAE's.

A constant prediction has a loss of 1. Departures from audio MAE: the decoder consists of BAT's
post-norm blocks (gated if the encoder is) with global attention instead of shifted windows, its
output has no bias, and the variance is the biased one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from bat.encoders.base import Encoder, MaskableEncoder
from bat.nn.block import blocks_of
from bat.nn.masking import choose_predicted, inverse_block_mask, row_seeds
from bat.objectives.base import Objective, Student, maskable, transformer_decoder
from bat.ranges import DecayFactor, OpenFraction, PositiveInt
from bat.seeding import derive_seed
from bat.types import Views, WaveBatch

EPS = 1e-6


class MAE(Objective):
    """Encoder, decoder and the reconstruction error of hidden patches."""

    @dataclass
    class Config(Objective.Config):
        name: str = "mae"
        mask_ratio: OpenFraction = 0.8
        """Fraction of patches hidden."""
        decoder: Literal["vit", "cross"] = "vit"
        """``vit``: self-attention over all patches; ``cross``: hidden patches attend to the visible
        ones alone."""
        decoder_width: PositiveInt | None = None
        """None: as wide as the encoder."""
        decoder_depth: PositiveInt = 4
        """Blocks of the decoder."""
        decoder_heads: PositiveInt = 8
        """Attention heads of the decoder."""
        predict: DecayFactor = 1.0
        """Share of the hidden patches that is predicted, drawn anew for each clip."""

        def problems_with(self, *, width: int, tokens: int) -> Iterator[str]:
            kept = int(tokens * (1 - self.mask_ratio))
            if 0 < self.mask_ratio < 1 and not 0 < kept < tokens:
                yield (
                    f"objective.mask_ratio={self.mask_ratio} keeps {kept} of {tokens} patches: "
                    "give longer clips or another ratio"
                )
            own = self.decoder_width or width
            if own % 4 or own % max(1, self.decoder_heads):
                yield (
                    f"objective.decoder_width={self.decoder_width} makes a decoder {own} wide: it "
                    f"must be a multiple of 4 and of objective.decoder_heads={self.decoder_heads}"
                )

    graphs = ("reconstruction_loss",)

    def __init__(
        self,
        encoder: MaskableEncoder,
        decoder: nn.Module,
        *,
        mask_ratio: float,
        seed: int,
        predict: float = 1.0,
    ) -> None:
        """``decoder`` predicts P numbers for each hidden patch (``bat.nn.decoder``)."""
        super().__init__()
        self.student = Student(encoder, decoder)
        self.grid, self.patch = encoder.grid, encoder.patch
        self.mask_ratio, self.seed, self.share = mask_ratio, seed, predict

    @classmethod
    def build(cls, config: Config, encoder: Encoder, *, seed: int) -> Self:
        encoder = maskable(encoder, config.name)
        sizes = {
            "width": config.decoder_width,
            "depth": config.decoder_depth,
            "heads": config.decoder_heads,
            "out_width": encoder.patch**2,
        }
        decoder = transformer_decoder(encoder, cross=config.decoder == "cross", **sizes)
        how = {"mask_ratio": config.mask_ratio, "predict": config.predict}
        return cls(encoder, decoder, seed=seed, **how)

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student.encoder}

    def units(self) -> list[nn.Module]:
        """Returns the decoder as one unit: it projects with its first block before calling it."""
        return [*blocks_of(self.student.encoder), self.student.decoder]

    def describe(self) -> str:
        return f"masked autoencoder, {self.mask_ratio:.0%} of the patches hidden"

    def forward(self, batch: WaveBatch) -> dict[str, Tensor]:
        views = self.draw_views(batch.positions)
        return {"loss": self.reconstruction_loss(self.spectrogram(batch), views)}

    def reconstruction_loss(self, spectrogram: Tensor, views: Views) -> Tensor:
        """Computes the loss, 0-dim float32, of (B, 1, frames, mels) and one mask per clip."""
        predicted = self.student.predict(spectrogram, views)[1].float()  # (B, m, P)
        hidden = views.predict_ids[..., None].expand_as(predicted)
        return F.mse_loss(predicted, patch_targets(spectrogram, self.patch).gather(1, hidden))

    def local_targets(self, batch: WaveBatch) -> tuple[str, Tensor]:
        return "loss", patch_targets(self.spectrogram(batch), self.patch)

    def draw_views(self, positions: Tensor) -> Views:
        """Draws one mask for each clip at ``positions`` (B,) of the stream, on the device; uniform
        over all sets of this size. It depends on (seed, position) alone."""
        device = next(self.parameters()).device
        seeds, other = (
            row_seeds(derive_seed(self.seed, name), positions, 1).to(device, non_blocking=True)
            for name in ("masks", "predict")
        )
        views = inverse_block_mask(
            len(seeds),
            self.grid,
            keep_ratio=1 - self.mask_ratio,
            block=1,  # kept blocks of one patch: neighbours are not more likely
            adjust=0.0,
            seeds=seeds,
        )
        return choose_predicted(views, self.share, other)

    def example_masks(self, batch: WaveBatch) -> Tensor:
        return self.draw_views(batch.positions).mask


def patch_targets(spectrogram: Tensor, patch: int) -> Tensor:
    """Maps (B, 1, frames, mels) to (B, N, P) float32: each patch standardised alone, time-major."""
    B, _, frames, mels = spectrogram.shape
    x = spectrogram.float().reshape(B, frames // patch, patch, mels // patch, patch)
    x = x.transpose(2, 3).reshape(B, -1, patch * patch)
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


OBJECTIVE = MAE
