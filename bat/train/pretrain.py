"""Pre-training (SPEC section 3): the step in one screen, and what a run is made of.

    wave -> front end, once a clip -> masks on the device -> student, teacher, losses
         -> AdamW at the scheduled rate -> EMA of the teacher after each real optimiser step

Everything random hangs on (seed, micro-batch, rank) alone, masks on (seed, place in the stream),
never on what came before: an interrupted and resumed run ends with the same weights as one that was
left alone, and masks do not change with the number of devices or of micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bat import __version__
from bat.backbones.base import load_backbone
from bat.backbones.bat import BAT
from bat.config.compose import to_dict
from bat.config.schema import Pretrain
from bat.nn.decoder import CNNDecoder, ViTDecoder
from bat.nn.ema import ema_decay
from bat.nn.masking import inverse_block_mask, row_seeds
from bat.objectives.masked_latent import MaskedLatent
from bat.redact import redact_tree
from bat.shapes import Grid, Views, WaveBatch
from bat.train.guard import Guard, poison
from bat.train.optim import adamw, param_groups, set_lr
from bat.train.sharding import Shardable
from bat.train.speed import blocks_of, speed_up_pretraining
from bat.train.trainer import derive_seed

DECODERS = {"vit12h": {"heads": 12, "mlp_ratio": 4.0}, "vit6h": {"heads": 6, "mlp_ratio": 2.0}}
"""Heads and MLP ratio of the transformer decoders (SPEC section 3, ablations)."""


def build_objective(config: Pretrain) -> MaskedLatent:
    """Student, teacher and losses as the configuration says. Works on ``meta`` too."""
    model, front, objective = config.model, config.frontend, config.objective
    grid = Grid(front.frames // model.patch, front.n_mels // model.patch)
    encoder = load_backbone(model.backbone)(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        grid=grid,
        patch=model.patch,
        mlp_ratio=model.mlp_ratio,
        gate=model.gate,
        norm_order=model.norm_order,
        pos_layout=model.pos_layout,
        drop_path=model.drop_path,
        attention=model.attention,
        frontend={k: v for k, v in vars(front).items() if k != "frames"}
        | ({"clip_seconds": config.data.clip_seconds} if front.pad == "clip" else {}),
    )
    decoder: torch.nn.Module
    if objective.decoder == "cnn":
        decoder = CNNDecoder(
            model.width, grid, width=objective.decoder_width, depth=objective.decoder_depth
        )
    else:
        decoder = ViTDecoder(
            model.width,
            grid,
            width=objective.decoder_width,
            depth=objective.decoder_depth,
            gate=model.gate,
            pos_layout=model.pos_layout,
            attention=model.attention,
            **DECODERS[objective.decoder],  # type: ignore[arg-type]
        )
    return MaskedLatent(
        encoder,
        decoder,
        target=objective.target,
        target_centering=objective.target_centering,
        global_target=objective.global_target,
    )


class Pretraining(Shardable):
    """One training step of masked latent regression, and its optimiser."""

    def __init__(self, config: Pretrain) -> None:
        super().__init__()
        self.config = config
        self.objective = build_objective(config)
        self.figures: dict[str, Tensor] = {}
        self.clips = 0
        self.guard = Guard(config.optim.clip_norm)
        speed_up_pretraining(self.objective, config.hardware)

    @property
    def encoder(self) -> BAT:
        """The student's encoder."""
        return self.objective.student.encoder  # type: ignore[return-value]

    @property
    def teacher(self) -> BAT:
        """The EMA teacher's encoder."""
        return self.objective.teacher.encoder  # type: ignore[return-value]

    def units(self) -> list[torch.nn.Module]:
        """The teacher's blocks, the student's, the decoder."""
        return [*blocks_of(self.teacher), *blocks_of(self.encoder), self.objective.student.decoder]

    def training_step(self, batch: WaveBatch, batch_idx: int) -> Tensor:
        seed = derive_seed(self.config.seed, "step", batch_idx, self.global_rank)
        torch.manual_seed(seed)  # drop path
        if self.config.hardware.compile == "cudagraphs":
            torch.compiler.cudagraph_mark_step_begin()
        spectrogram = self.spectrogram(batch)  # (B, 1, frames, mels)
        views = self.draw_views(batch.positions)
        losses = self.objective(spectrogram, views)
        self.clips = spectrogram.shape[0]
        self.figures = {
            "loss": losses.total.detach(),
            "loss_local": losses.local.detach(),
            "loss_global": losses.global_.detach(),
            "loss_position_only": losses.position_only,
            "target_std": losses.target_std,
            "grad_norm": torch.full_like(losses.total, torch.nan),  # known before the step
        }
        self.guard.note(batch, losses.total)
        return poison(losses.total)

    def spectrogram(self, batch: WaveBatch) -> Tensor:
        """(B, S) waves -> (B, 1, frames, mels), float32, no gradient."""
        with torch.no_grad():
            return self.encoder.frontend(
                batch.waves, frames=self.config.frontend.frames, lengths=batch.lengths
            )

    def draw_views(self, positions: Tensor) -> Views:
        """``mask.views`` masks of each clip at ``positions`` (B,) of the stream, on the device.

        A clip's masks hang on (seed, position) alone: not on the batch, the rank, or who reads it.
        """
        mask = self.config.mask
        seeds = row_seeds(derive_seed(self.config.seed, "masks"), positions, mask.views)
        return inverse_block_mask(
            len(seeds),
            self.encoder.grid,
            keep_ratio=1 - mask.ratio,
            block=mask.block,
            adjust=mask.adjust,
            seeds=seeds.to(self.device, non_blocking=True),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        student = self.objective.student
        groups = param_groups(student, weight_decay=optim.weight_decay, decay=optim.decay)
        return adamw(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """The real step, at the scheduled rate; then the teacher follows."""
        done, optim, ema = self.global_step, self.config.optim, self.config.ema
        set_lr(
            optimizer,
            done,
            lr=optim.lr,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.train.steps,
            min_lr=optim.min_lr,
        )
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        assert self.guard.skip is not None
        decay = ema_decay(done, start=ema.start, end=ema.end, steps=ema.steps)
        self.objective.update_teacher(decay, skip=self.guard.skip)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete: their norm, clipping, and whether there will be a step."""
        self.figures["grad_norm"] = self.guard.inspect(optimizer, self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in every checkpoint how it came to be."""
        checkpoint["bat"] = {"version": __version__, "config": redact_tree(to_dict(self.config))}
