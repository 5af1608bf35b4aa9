"""Masked latent regression with an EMA teacher (SPEC section 3).

The student sees V masked views of a clip, the decoder predicts every patch, and the teacher, an EMA
copy of the encoder run on the clean spectrogram, says what they should have been:

    h_l    = teacher's patch tokens after block l, standardised per channel over the N patches
    y      = standardise per token over channels( mean_l h_l )
    local  = mean over masked patches of mean_D (prediction - y)^2
    global = mean (student class token - mean over patches of y)^2
    loss   = global + local                                    float32, no weights

``target="mlp"`` takes the MLP's output before its residual instead of the block's end.
``target_centering="batch"`` removes the mean over the batch at each position before the last
standardisation: not the paper's, but on small data the position code is most of the target and the
easiest part of it to predict. Under several processes that mean is each process's own.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.nn.ema import ema_update
from bat.shapes import Views

EPS = 1e-6


class Losses(NamedTuple):
    """Scalars of one step, on the device. ``total`` carries the gradient."""

    total: Tensor
    local: Tensor
    global_: Tensor
    position_only: Tensor
    """Local loss of a predictor that knows each position's mean target and nothing of the clip:
    only what ``local`` lies below it is evidence of listening. NaN for a batch of one clip."""
    target_std: Tensor
    """Mean over channels of the target's deviation over tokens and clips: 0 is collapse."""


class Student(nn.Module):
    """Encoder and decoder under the names of the paper's weight files."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder


class Teacher(nn.Module):
    """The EMA copy of the encoder: never trained, always in eval mode."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        del mode
        return super().train(False)


class MaskedLatent(nn.Module):
    """Student, teacher, targets and the two losses.

    ``encoder`` offers ``encode_views``, ``embed`` and ``layers`` (see ``backbones/bat.py``);
    ``decoder`` maps visible tokens and ``Views`` to predictions for the masked patches.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        target: Literal["eob", "mlp"] = "eob",
        target_centering: Literal["none", "batch"] = "none",
        global_target: Literal["patch_mean", "cls", "none"] = "patch_mean",
    ) -> None:
        super().__init__()
        self.student = Student(encoder, decoder)
        self.teacher = Teacher(encoder)
        self.target = target
        self.target_centering = target_centering
        self.global_target = global_target

    def forward(self, spectrogram: Tensor, views: Views) -> Losses:
        """(B, 1, frames, mels) and ``B * V`` masks, clip-major -> ``Losses``."""
        return self.compare(spectrogram, views, *self.targets(spectrogram))

    def compare(
        self, spectrogram: Tensor, views: Views, targets: Tensor, teacher_cls: Tensor
    ) -> Losses:
        """The student's half of the step, against the teacher's (B, N, D) and (B, D)."""
        cls, visible = self.student.encoder.encode_views(spectrogram, views)  # type: ignore[operator]
        predictions = self.student.decoder(visible, views)  # (B V, N - n, D)

        local = local_loss(predictions, targets, views.masked_ids)
        if self.global_target == "none":
            global_ = torch.zeros_like(local)
        else:
            wanted = targets.mean(1) if self.global_target == "patch_mean" else teacher_cls
            global_ = global_loss(cls, wanted)
        one = targets.shape[0] == 1
        position_only = targets.new_full((), torch.nan) if one else targets.var(0).mean()
        spread = targets.flatten(0, 1).std(0, unbiased=False).mean()
        return Losses(local + global_, local, global_, position_only, spread)

    @torch.no_grad()
    def targets(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, frames, mels) -> targets (B, N, D) and the teacher's last class token (B, D),
        both float32. Layers are added up one at a time, never stacked."""
        encoder = self.teacher.encoder
        total, cls, depth = None, None, 0
        for out, mlp in encoder.layers(encoder.embed(spectrogram)):  # type: ignore[operator]
            layer = (out if self.target == "eob" else mlp)[:, 1:].float()
            layer = standardise(layer, dim=1)  # per channel over the patches
            total = layer if total is None else total + layer
            cls, depth = out[:, 0].float(), depth + 1
        assert total is not None
        assert cls is not None
        mean = total / depth  # (B, N, D)
        if self.target_centering == "batch":
            mean = mean - mean.mean(0, keepdim=True)
        return standardise(mean, dim=2), cls

    def update_teacher(self, decay: float, skip: Tensor | None = None) -> None:
        """One EMA step of the teacher's encoder towards the student's, buffers too.

        ``skip``: 0-dim, 1.0 where the optimiser's step was skipped and the teacher stays.
        """
        ema_update(self.teacher.encoder, self.student.encoder, decay, skip=skip)


def standardise(x: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """Zero mean and unit (biased) variance along ``dim``, eps inside the root."""
    centred = x - x.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + eps)


def local_loss(predictions: Tensor, targets: Tensor, masked_ids: Tensor) -> Tensor:
    """Squared error averaged over channels, then over the masked patches of all views.

    ``predictions`` (B V, m, D) of the patches ``masked_ids`` (B V, m), ``targets`` (B, N, D).
    """
    B, N, _ = targets.shape
    ids = masked_ids.reshape(B, -1) + N * torch.arange(B, device=targets.device)[:, None]
    wanted = targets.flatten(0, 1).index_select(0, ids.flatten())  # (B V m, D)
    return F.mse_loss(predictions.flatten(0, 1).float(), wanted)


def global_loss(cls: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of every view's class token (B V, D) to its clip's ``wanted`` (B, D)."""
    return (cls.float().unflatten(0, (wanted.shape[0], -1)) - wanted[:, None]).square().mean()
