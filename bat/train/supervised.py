"""Fine-tunes encoder and head together on labels (docs/method.md 5).

    wave -> colour noise -> front end -> time roll -> mixup -> SpecAugment
         -> encoder with drop path -> head
         -> the task's loss -> AdamW with layer-wise decay at the scheduled rate

The head is a probe, ``linear`` by default: LayerNorm, dropout, linear on the last class token, or
on the mean patch if the encoder has none. Waves are rolled by the stream (``data.roll``).
All randomness depends on (seed, fold, micro-batch, rank) alone, so a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bat.audio.augment import colour_noise, mixup, spec_augment, time_roll
from bat.config.schema import Finetune
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.encoding import TargetsOf
from bat.nn.block import blocks_of
from bat.nn.losses import Loss, against
from bat.nn.optim import adamw, param_groups
from bat.probes.base import Probe
from bat.seeding import derive_seed
from bat.train.module import TrainingModule
from bat.types import Features, WaveBatch


class Supervised(TrainingModule):
    """LightningModule of encoder and head with the training step and the optimiser."""

    def __init__(
        self,
        config: Finetune,
        *,
        backbone: Encoder,
        head: Probe,
        loss: Loss,
        frames: int | None,
        fold: str,
        start: str = "",
        targets_of: TargetsOf | None = None,
    ) -> None:
        """``frames`` of each clip; None: its own number. ``start``: digest of the encoder's initial
        weights; checkpoints with another digest are refused. ``targets_of``: returns labels of time
        patches or tokens of a batch; None: the batch's own labels are used."""
        super().__init__(config)
        self.targets_of = targets_of
        self.loss, self.frames, self.fold = loss, frames, fold
        self.start = start
        self.backbone, self.head = backbone, head
        set_drop_path = getattr(backbone, "set_drop_path", None)
        if set_drop_path is not None:
            set_drop_path(config.drop_path)
        elif config.drop_path:
            raise UserError(f"{type(backbone).__name__} has no drop path: drop_path=0")
        spectral = [
            n for n in ("time_roll", "spec_freq", "spec_time") if getattr(config.augment, n)
        ]
        if spectral and not isinstance(backbone, SpectrogramEncoder):
            raise UserError(
                f"{type(backbone).__name__} has no spectrogram to augment: "
                + " ".join(f"augment.{n}=0" for n in spectral)
            )
        self.train()  # a loaded encoder is in eval mode, and Lightning does not change modes

    def units(self) -> list[torch.nn.Module]:
        """Returns the blocks; the head is small and stays in the root unit."""
        return list(blocks_of(self.backbone))

    def training_step(self, batch: WaveBatch, batch_idx: int) -> Tensor:
        seed = derive_seed(self.config.seed, self.fold, "step", batch_idx, self.global_rank)
        torch.manual_seed(seed)  # dropout, drop path
        _, targets, features = self.encoded(batch, seed=seed)
        loss_of = partial(against, self.loss, inside=self.head.inside(features))
        loss = self.head.training_loss(loss_of, self.head(features), targets)
        return self.finished(batch, batch_idx, {"loss": loss})

    def encoded(self, batch: WaveBatch, *, seed: int) -> tuple[Tensor, Tensor, Features]:
        """Returns the augmented spectrograms, their targets and the features the head reads."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x, targets, patches = self.augmented(batch, generator)
        if patches is None:
            return x, targets, self.backbone.features(x)
        total = self.backbone.time_patches(batch.waves.shape[1])
        return x, targets, self.backbone.features_alone(x, patches, total=total)

    @torch.no_grad()
    def augmented(
        self, batch: WaveBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns spectrograms (B, 1, frames, mels), targets and time patches (B,) of a training
        batch, with the augmentations that are enabled. Targets are labels (B, C), labels of time
        patches (B, T, C), NaN beyond a clip's end, or tokens (B, U).

        A mixed clip has the time patches of the longer one; None with a fixed number of frames.
        """
        own = self.config.augment
        waves, lengths, targets = batch.waves, batch.lengths, batch.targets
        if own.noise_p:
            lengths = self.signal_samples(waves, lengths)
            waves = colour_noise(waves, generator=generator, p=own.noise_p, lengths=lengths)
        x = self.backbone.inputs(waves, lengths, frames=self.frames)
        if own.time_roll:
            front: Any = self.backbone.frontend
            samples = front.padded_samples(batch.lengths)
            valid = None if front.pad == "waveform" else front.valid_frames(samples)
            x = time_roll(x, generator=generator, frames=valid)
        patches = self.backbone.time_patches(batch.lengths) if self.frames is None else None
        T = self.backbone.time_patches(waves.shape[1])
        if isinstance(self.backbone, SpectrogramEncoder) and self.frames is not None:
            T = self.backbone.patches_of(self.frames)
        if self.targets_of is not None:
            targets = self.targets_of(batch, T).to(x.device)
        if own.mixup_p:
            # the masks of valid and of labelled patches are mixed as the labels are
            y, shape = targets.flatten(1), targets.shape
            inside = x.new_ones(len(x), T)
            if patches is not None:
                inside = (torch.arange(T, device=x.device) < patches[:, None]).to(y.dtype)
            known = ~targets.isnan().flatten(2).any(-1) if targets.ndim == 3 else inside
            y = torch.cat([y.nan_to_num(), inside, known.to(y.dtype)], dim=1)
            x, y = mixup(x, y, generator=generator, p=own.mixup_p, alpha=own.mixup_alpha)
            y, inside, known = y.split([y.shape[1] - 2 * T, T, T], dim=1)
            targets = y.reshape(shape)
            if targets.ndim == 3:
                targets = targets.masked_fill((known == 0)[..., None], torch.nan)
            patches = None if patches is None else (inside > 0).sum(1)
        if own.spec_freq or own.spec_time:
            x = spec_augment(
                x,
                generator=generator,
                freq_width=own.spec_freq,
                time_width=own.spec_time,
                repeats=own.spec_repeats,
            )
        return x, targets, patches

    def signal_samples(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Returns the samples of each wave (B,) that noise is added to: the clip and the zeros that
        pad the waveform (``pad=clip``, ``waveform``), as in the reference."""
        front: Any = getattr(self.backbone, "frontend", None)
        pad, most = getattr(front, "pad", None), waves.shape[1]
        if pad == "clip":
            return torch.as_tensor(front.padded_samples(lengths)).clamp(max=most)
        if pad == "waveform" and self.frames is not None:
            return lengths.clamp(min=min(most, (self.frames - 1) * front.hop_length))
        return lengths

    def layer_of(self, name: str) -> int:
        """Returns the layer of parameter ``name`` for layer-wise decay; L + 1 for head and rest."""
        inner = name.removeprefix("backbone.")
        return self.backbone.depth + 1 if inner == name else self.backbone.layer_of(inner)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        no_decay = {f"backbone.{n}" for n in self.backbone.no_weight_decay()}
        groups = param_groups(
            self,
            weight_decay=optim.weight_decay,
            decay=optim.decay,
            no_decay=no_decay | {f"head.{n}" for n in self.head.no_weight_decay()},
            layer_decay=optim.layer_decay,
            layer_of=self.layer_of,
            depth=self.backbone.depth,
        )
        groups.sort(key=lambda g: -g["scale"])  # the rate of the first group is logged
        return adamw(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds provenance to every checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bat"]["start"] = self.start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of a run that began with other encoder weights."""
        if checkpoint.get("bat", {}).get("start", "") != self.start:
            raise UserError(
                f"the unfinished fold {self.fold} began with another encoder than checkpoint="
                f"{self.config.checkpoint} now holds: start anew with another out="
            )
