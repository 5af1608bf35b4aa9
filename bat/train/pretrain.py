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

from bat import __version__
from bat.config.compose import to_dict
from bat.config.schema import Pretrain
from bat.encoders.base import Encoder, find_encoder
from bat.nn.optim import adamw, param_groups, set_lr
from bat.objectives.base import Objective, find_objective
from bat.redact import redact_tree
from bat.seeding import derive_seed
from bat.train.guard import Guard, poison
from bat.train.sharding import Shardable
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


class Pretraining(Shardable):
    """LightningModule with the training step of the objective and its optimiser."""

    def __init__(self, config: Pretrain) -> None:
        super().__init__()
        self.config = config
        self.objective = build_objective(config)
        self.figures: dict[str, Tensor] = {}
        self.clips = 0
        self.guard = Guard(config.optim.clip_norm)
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
        scalars = self.objective(batch)
        loss = scalars["loss"]
        self.clips = batch.waves.shape[0]
        self.figures = {name: scalar.detach() for name, scalar in scalars.items()}
        self.figures["grad_norm"] = torch.full_like(loss, torch.nan)  # known before the step
        self.guard.note(batch, loss)
        return poison(loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = param_groups(self.objective, weight_decay=optim.weight_decay, decay=optim.decay)
        return adamw(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps the optimiser at the scheduled rate, then calls ``objective.after_step``."""
        done, optim = self.global_step, self.config.optim
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
        self.objective.after_step(done, skip=self.guard.skip)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Computes the gradients' norm, clips them and decides whether to skip the step."""
        self.figures["grad_norm"] = self.guard.inspect(optimizer, self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds provenance to every checkpoint."""
        checkpoint["bat"] = {"version": __version__, "config": redact_tree(to_dict(self.config))}
