"""Masked latent regression with an EMA teacher (docs/method.md 3).

The student sees V masked views of a clip, the decoder predicts every patch, and the teacher, an EMA
copy of the encoder run on the clean spectrogram, gives the targets:

    h_l    = teacher's patch tokens after block l, standardised per channel over the N patches
    y      = standardise per token over channels( mean_l h_l )
    local  = mean over masked patches of mean_D (prediction - y)^2
    global = mean (student class token - mean over patches of y)^2
    loss   = global + local                                    float32, no weights

``target="mlp"`` takes the MLP's output before its residual instead of the block's end.
``target_centering="batch"`` removes the mean over the batch at each position before the last
standardisation. This is not in the paper, but on small data the position code is most of the target
and its easiest part to predict. Under several processes that mean is each process's own.
``decoder="cross"`` and ``predict`` below 1 are not in the paper either: a cheaper step
(``bat.nn.decoder.CrossDecoder``; the loss is the mean over the patches that are predicted).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.encoders.base import Encoder, MaskableEncoder
from bat.nn.block import blocks_of
from bat.nn.decoder import CNNDecoder
from bat.nn.ema import ema_decay, ema_update
from bat.nn.masking import block_that_fits, choose_predicted, inverse_block_mask, row_seeds
from bat.objectives.base import Objective, Student, maskable, transformer_decoder
from bat.ranges import DecayFactor, Fraction, NonNegativeFloat, OpenFraction, PositiveInt
from bat.seeding import derive_seed
from bat.types import Views, WaveBatch

EPS = 1e-6

DECODERS: dict[str, dict[str, Any]] = {
    "vit12h": {"heads": 12, "mlp_ratio": 4.0},
    "vit6h": {"heads": 6, "mlp_ratio": 2.0},
    "cross": {"heads": 12, "mlp_ratio": 4.0},
}
"""Heads and MLP ratio of the transformer decoders (docs/method.md 3, ablations)."""
WIDEST = 768
"""Maximum default width of the decoder: the paper's Large, 1024 wide, has one of 768."""


@dataclass
class Mask:
    """Inverse block mask (docs/method.md 3)."""

    views: PositiveInt = 16
    """Masked views of each clip."""
    ratio: OpenFraction = 0.8
    """Fraction of patches removed."""
    block: PositiveInt = 5
    """Side of a kept block, in patches; smaller on a grid on which none of this side is drawn."""
    adjust: NonNegativeFloat = 0.07
    """Extra fraction of blocks drawn, to make up for their overlap."""


@dataclass
class Ema:
    """Teacher decay: linear from ``start`` to ``end`` over ``steps`` optimiser steps."""

    start: Fraction = 0.9998
    """Decay at step 0."""
    end: Fraction = 0.99999
    """Decay from step ``steps`` on."""
    steps: PositiveInt = 100_000
    """Optimiser steps from ``start`` to ``end``."""


class Losses(NamedTuple):
    """Scalars of one step, on the device. Only ``total`` has a gradient."""

    total: Tensor
    local: Tensor
    global_: Tensor
    position_only: Tensor
    """Local loss of a predictor that knows each position's mean target and nothing about the clip;
    ``local`` shows use of the audio only if it is below this. NaN for a batch of one clip."""
    target_std: Tensor
    """Mean over channels of the target's deviation over tokens and clips: 0 is collapse."""


class Teacher(nn.Module):
    """The EMA copy of the encoder: never trained, always in eval mode."""

    def __init__(self, encoder: MaskableEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Keeps the teacher in eval mode."""
        del mode
        return super().train(False)


class MaskedLatent(Objective):
    """Student, teacher, masks, targets and the two losses.

    ``decoder`` maps visible tokens and ``Views`` to predictions for the masked patches.
    """

    @dataclass
    class Config(Objective.Config):
        """Masked latent regression and the paper's ablations of it (docs/method.md 3)."""

        name: str = "masked_latent"
        target: Literal["eob", "mlp"] = "eob"
        """``eob``: end of block; ``mlp``: MLP output before its residual (data2vec 2.0, EAT)."""
        target_centering: Literal["none", "batch"] = "none"
        """``batch``: subtract the mean over the batch at each position from the target (not in the
        paper)."""
        global_target: Literal["patch_mean", "cls", "none"] = "patch_mean"
        """Target of the class token: the patches' mean target, or the teacher's class token."""
        decoder: Literal["vit12h", "vit6h", "cnn", "cross"] = "vit12h"
        """Transformer of 12 or 6 heads, the convolutions of EAT, or cross-attention to the visible
        patches alone (not in the paper)."""
        decoder_depth: PositiveInt = 6
        """Blocks of the decoder."""
        decoder_width: PositiveInt | None = None
        """None: as wide as the encoder, at most 768."""
        predict: DecayFactor = 1.0
        """Share of the masked patches that is predicted, drawn anew for each view (the paper: all).
        """
        mask: Mask = field(default_factory=Mask)
        ema: Ema = field(default_factory=Ema)

        def problems(self) -> Iterator[str]:
            if self.decoder_width is not None and self.decoder_width % self._parts:
                yield (
                    f"objective.decoder_width={self.decoder_width} must be a multiple of "
                    f"{self._parts} for the {self.decoder} decoder"
                )

        def problems_with(self, *, width: int, tokens: int) -> Iterator[str]:
            ratio = self.mask.ratio
            kept = int(tokens * (1 - ratio))
            if 0 < ratio < 1 and not 0 < kept < tokens:
                yield (
                    f"objective.mask.ratio={ratio} keeps {kept} of {tokens} patches: give longer "
                    "clips or another ratio"
                )
            cnn = self.decoder == "cnn"
            given = self.decoder_width is not None and not cnn
            if not given and (width if cnn else self.width_in(width)) % self._parts:
                yield (
                    f"model.width={width} is not a multiple of {self._parts}, as the "
                    f"{self.decoder} decoder needs: choose another width"
                    + ("" if cnn else ", or give objective.decoder_width")
                )

        @property
        def _parts(self) -> int:
            return 16 if self.decoder == "cnn" else 12

        def width_in(self, width: int) -> int:
            """Returns the width of the decoder for an encoder of ``width``."""
            return self.decoder_width or min(width, WIDEST)

    graphs = ("targets", "compare")
    eps: ClassVar[float] = EPS
    """Epsilon of the targets' standardisation."""
    collapse_advice = "objective.ema.start nearer to 1, objective.target_centering=batch"

    def __init__(
        self,
        encoder: MaskableEncoder,
        decoder: nn.Module,
        *,
        target: Literal["eob", "mlp"] = "eob",
        target_centering: Literal["none", "batch"] = "none",
        global_target: Literal["patch_mean", "cls", "none"] = "patch_mean",
        mask: Mask | None = None,
        ema: Ema | None = None,
        predict: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = Student(encoder, decoder)
        self.teacher = Teacher(encoder)
        self.target = target
        self.target_centering = target_centering
        self.global_target = global_target
        self.mask, self.ema, self.share = mask or Mask(), ema or Ema(), predict
        self.seed = seed
        self.block = block_that_fits(
            encoder.grid,
            keep_ratio=1 - self.mask.ratio,
            block=self.mask.block,
            adjust=self.mask.adjust,
        )

    @classmethod
    def build(cls, config: Config, encoder: Encoder, *, seed: int) -> Self:
        encoder = maskable(encoder, config.name)
        names = ("target", "target_centering", "global_target", "mask", "ema", "predict")
        how = {name: getattr(config, name) for name in names}
        return cls(encoder, cls.decoder_of(config, encoder), seed=seed, **how)

    @staticmethod
    def decoder_of(config: Config, encoder: MaskableEncoder) -> nn.Module:
        """Builds the decoder that ``config`` describes."""
        sizes = {"width": config.width_in(encoder.width), "depth": config.decoder_depth}
        if config.decoder == "cnn":
            return CNNDecoder(encoder.width, encoder.grid, **sizes)
        cross = config.decoder == "cross"
        return transformer_decoder(encoder, cross=cross, **sizes, **DECODERS[config.decoder])

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student.encoder, "teacher": self.teacher.encoder}

    def units(self) -> list[nn.Module]:
        """Returns the decoder as one unit: it projects with its first block before calling it."""
        encoders = (self.teacher, self.student.encoder)
        return [*(b for e in encoders for b in blocks_of(e)), self.student.decoder]

    def describe(self) -> str:
        mask = self.mask
        text = f"masked latent regression of {mask.views} views a clip"
        if self.block < mask.block:
            text += f", mask blocks of side {self.block}: {mask.block} is too large for its grid"
        return text

    def forward(self, batch: WaveBatch) -> dict[str, Tensor]:
        spectrogram, views = self.spectrogram(batch), self.draw_views(batch.positions)
        losses = self.compare(spectrogram, views, *self.targets(spectrogram))
        return {
            "loss": losses.total,
            "loss_local": losses.local,
            "loss_global": losses.global_,
            "loss_position_only": losses.position_only,
            "target_std": losses.target_std,
        }

    def draw_views(self, positions: Tensor) -> Views:
        """Draws ``mask.views`` masks per clip at ``positions`` (B,) of the stream, on the device.

        A clip's masks depend on (seed, position) alone, not on the batch, the rank or the reader.
        """
        mask, device = self.mask, next(self.parameters()).device
        seeds, other = (
            row_seeds(derive_seed(self.seed, name), positions, mask.views).to(
                device, non_blocking=True
            )
            for name in ("masks", "predict")
        )
        views = inverse_block_mask(
            len(seeds),
            self.student.encoder.grid,
            keep_ratio=1 - mask.ratio,
            block=self.block,
            adjust=mask.adjust,
            seeds=seeds,
        )
        return choose_predicted(views, self.share, other)

    def example_masks(self, batch: WaveBatch) -> Tensor:
        return self.draw_views(batch.positions).mask[:: self.mask.views]

    def local_targets(self, batch: WaveBatch) -> tuple[str, Tensor]:
        return "loss_local", self.targets(self.spectrogram(batch))[0]

    def losses(self, spectrogram: Tensor, views: Views) -> Losses:
        """Computes ``Losses`` of (B, 1, frames, mels) and ``B * V`` masks, clip-major."""
        return self.compare(spectrogram, views, *self.targets(spectrogram))

    def compare(
        self, spectrogram: Tensor, views: Views, targets: Tensor, teacher_cls: Tensor
    ) -> Losses:
        """Computes the student's losses against the teacher's targets (B, N, D) and (B, D)."""
        cls, predictions = self.student.predict(spectrogram, views)  # (B V, m, D)
        wanted = gather_patches(targets, views.predict_ids)
        local = F.mse_loss(predictions.flatten(0, 1).float(), wanted)
        if self.global_target == "none":
            global_ = torch.zeros_like(local)
        else:
            whole = targets.mean(1) if self.global_target == "patch_mean" else teacher_cls
            global_ = global_loss(cls, whole)
        one = targets.shape[0] == 1
        position_only = targets.new_full((), torch.nan) if one else targets.var(0).mean()
        spread = targets.flatten(0, 1).std(0, unbiased=False).mean()
        total = self.total(local, global_)
        return Losses(total, local, global_, position_only, spread)

    def total(self, local: Tensor, global_: Tensor) -> Tensor:
        """Returns the loss that is minimised."""
        return local + global_

    @torch.no_grad()
    def targets(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """Returns targets (B, N, D) and the teacher's last class token (B, D), both float32, of
        (B, 1, frames, mels)."""
        targets, cls, _ = self.targets_of(self.teacher.encoder.embed_patches(spectrogram))
        return targets, cls

    def targets_of(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``targets`` of embedded patches (B, n, D), all or some of a clip's, and the last
        block's h (B, n, D). Layers are summed one at a time, never stacked."""
        total, cls, depth = None, None, 0
        for out, mlp in self.teacher.encoder.layers(tokens):
            layer = (out if self.target == "eob" else mlp)[:, 1:].float()
            layer = standardise(layer, 1, self.eps)  # per channel over the patches
            total = layer if total is None else total + layer
            cls, depth = out[:, 0].float(), depth + 1
        assert total is not None
        assert cls is not None
        mean = total / depth  # (B, N, D)
        if self.target_centering == "batch":
            mean = mean - mean.mean(0, keepdim=True)
        return standardise(mean, 2, self.eps), cls, layer

    def after_step(self, step: int, *, skip: Tensor) -> None:
        ema = self.ema
        decay = ema_decay(step, start=ema.start, end=ema.end, steps=ema.steps)
        self.update_teacher(decay, skip=skip)

    def update_teacher(self, decay: float, skip: Tensor | None = None) -> None:
        """Updates the teacher's encoder, including buffers, by one EMA step towards the student's.

        ``skip``: 0-dim, 1.0 if the optimiser's step was skipped; the teacher is then unchanged.
        """
        ema_update(self.teacher.encoder, self.student.encoder, decay, skip=skip)


def standardise(x: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """Standardises to zero mean and unit (biased) variance along ``dim``, eps inside the root."""
    centred = x - x.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + eps)


def gather_patches(targets: Tensor, masked_ids: Tensor) -> Tensor:
    """Gathers targets of patches ``masked_ids`` (B V, m) of all views: (B, N, D) -> (B V m, D)."""
    B, N, _ = targets.shape
    ids = masked_ids.reshape(B, -1) + N * torch.arange(B, device=targets.device)[:, None]
    return targets.flatten(0, 1).index_select(0, ids.flatten())


def global_loss(cls: Tensor, wanted: Tensor) -> Tensor:
    """Computes the mean squared error of class tokens (B V, D) to ``wanted`` (B, D) per clip."""
    return (cls.float().unflatten(0, (wanted.shape[0], -1)) - wanted[:, None]).square().mean()


OBJECTIVE = MaskedLatent
