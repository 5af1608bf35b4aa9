"""The LightningModule of pre-training: one training step of any objective, and its optimiser.

    waves -> objective: loss, scalars -> AdamW at the scheduled rate -> objective.after_step

All randomness depends on (seed, micro-batch, rank) alone, and that of the objective (masks) on
(seed, place in the stream), never on earlier draws: an interrupted and resumed run ends with the
same weights as an uninterrupted one, and masks do not change with the number of devices or of
micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bat.config.schema import Pretrain
from bat.encoders.base import Encoder, find_encoder
from bat.nn.optim import adamw, param_groups
from bat.objectives.base import Objective, check_encoders, check_scalars, find_objective
from bat.seeding import derive_seed
from bat.train.module import TrainingModule
from bat.types import Grid, WaveBatch


def build_encoder(config: Pretrain) -> Encoder:
    """Builds a fresh encoder from the configuration. Works on ``meta`` too."""
    model, front = config.model, config.frontend
    return find_encoder(model.backbone)(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        grid=Grid(front.frames // model.patch, front.n_mels // model.patch),
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


def build_objective(config: Pretrain) -> Objective:
    """Builds the objective around a fresh encoder. Works on ``meta`` too."""
    objective = find_objective(config.objective.name)
    return objective.build(config.objective, build_encoder(config), seed=config.seed)


class Pretraining(TrainingModule):
    """LightningModule with the training step of the objective and its optimiser."""

    def __init__(self, config: Pretrain) -> None:
        super().__init__(config)
        self.objective = build_objective(config)
        self.started_from: dict[str, Any] = {}
        """Facts about the weights that the run started from; empty if from scratch."""
        check_encoders(self.objective)
        hardware = config.hardware
        self.objective.speed_up(
            compile=hardware.compile, recompute=hardware.activation_checkpointing
        )

    def units(self) -> list[torch.nn.Module]:
        return self.objective.units()

    def training_step(self, batch: WaveBatch, batch_idx: int) -> Tensor:
        seed = derive_seed(self.config.seed, "step", batch_idx, self.global_rank)
        torch.manual_seed(seed)  # drop path
        if self.config.hardware.compile == "cudagraphs":
            torch.compiler.cudagraph_mark_step_begin()
        scalars = check_scalars(self.objective, self.objective(batch))
        return self.finished(batch, batch_idx, scalars)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = param_groups(self.objective, weight_decay=optim.weight_decay, decay=optim.decay)
        return adamw(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bat"]["init"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.started_from = checkpoint.get("bat", {}).get("init", {})

    def after_step(self, step: int, *, skip: Tensor) -> None:
        self.objective.after_step(step, skip=skip)
