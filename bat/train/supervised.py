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

from bat import __version__
from bat.audio.augment import colour_noise, mixup, spec_augment, time_roll
from bat.config.compose import to_dict
from bat.config.schema import Finetune
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.encoding import TargetsOf
from bat.nn.block import blocks_of
from bat.nn.losses import Loss, against
from bat.nn.optim import adamw, param_groups, set_lr
from bat.probes.base import Probe
from bat.redact import redact_tree
from bat.seeding import derive_seed
from bat.train.guard import Guard, poison
from bat.train.sharding import Shardable
from bat.types import Features, WaveBatch


class Supervised(Shardable):
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
        super().__init__()
        self.targets_of = targets_of
        self.config, self.loss, self.frames, self.fold = config, loss, frames, fold
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
        self.figures: dict[str, Tensor] = {}
        self.clips = 0
        self.guard = Guard(config.optim.clip_norm)
        self.train()  # a loaded encoder is in eval mode, and Lightning does not change modes

    def units(self) -> list[torch.nn.Module]:
        """Returns the blocks; the head is small and stays in the root unit."""
        return list(blocks_of(self.backbone))

    def training_step(self, batch: WaveBatch, batch_idx: int) -> Tensor:
        seed = derive_seed(self.config.seed, self.fold, "step", batch_idx, self.global_rank)
        torch.manual_seed(seed)  # dropout, drop path
        generator = torch.Generator(self.device).manual_seed(seed)
        spectrogram, targets, patches = self.augmented(batch, generator)
        total = self.backbone.time_patches(batch.waves.shape[1])
        features = self.encoded(spectrogram, patches, total=total)
        loss_of = partial(against, self.loss, inside=features.inside())
        loss = self.head.training_loss(loss_of, self.head(features), targets)
        self.clips = spectrogram.shape[0]
        self.figures = {
            "loss": loss.detach(),
            "grad_norm": torch.full_like(loss, torch.nan),  # known before the step
        }
        self.guard.note(batch, loss)
        return poison(loss)

    def encoded(
        self, spectrogram: Tensor, patches: Tensor | None, *, total: int | None = None
    ) -> Features:
        """Returns the features of ``augmented``'s clips that the head reads."""
        if patches is None:
            return self.backbone.features(spectrogram)
        return self.backbone.features_alone(spectrogram, patches, total=total)

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
        waves, targets = batch.waves, batch.targets
        if own.noise_p:
            waves = colour_noise(waves, generator=generator, p=own.noise_p, lengths=batch.lengths)
        x = self.backbone.inputs(waves, batch.lengths, frames=self.frames)
        if own.time_roll:
            front: Any = self.backbone.frontend
            samples = front.padded_samples(batch.lengths)
            valid = None if front.pad == "waveform" else front.valid_frames(samples)
            x = time_roll(x, generator=generator, frames=valid)
        patches = self.backbone.time_patches(batch.lengths) if self.frames is None else None
        T = self.backbone.time_patches(waves.shape[1])
        if isinstance(self.backbone, SpectrogramEncoder) and self.frames is not None:
            T = self.frames // self.backbone.patch
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

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps the optimiser at the scheduled rate."""
        optim = self.config.optim
        set_lr(
            optimizer,
            self.global_step,
            lr=optim.lr,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.train.steps,
            min_lr=optim.min_lr,
        )
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Computes the gradients' norm, clips them and decides whether to skip the step."""
        self.figures["grad_norm"] = self.guard.inspect(optimizer, self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds provenance to every checkpoint."""
        checkpoint["bat"] = {
            "version": __version__,
            "config": redact_tree(to_dict(self.config)),
            "start": self.start,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of a run that began with other encoder weights."""
        if checkpoint.get("bat", {}).get("start", "") != self.start:
            raise UserError(
                f"the unfinished fold {self.fold} began with another encoder than checkpoint="
                f"{self.config.checkpoint} now holds: start anew with another out="
            )
