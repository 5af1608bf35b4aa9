"""Base of the LightningModules: a step that can be skipped, the scheduled rate, FSDP2 units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bat import __version__
from bat.config.compose import to_dict
from bat.config.schema import Finetune, Pretrain
from bat.nn.optim import set_lr
from bat.redact import redact_tree
from bat.train.guard import Guard, spread_nan
from bat.types import WaveBatch

T = TypeVar("T")
SPLIT = "tensor_parallel"
"""Lightning's name for the second axis of the mesh, along which FSDP2 splits; it copies along the
first."""


class TrainingModule(pl.LightningModule):
    """A module whose ``training_step`` returns ``finished``; ``hardware=fsdp`` and ``hsdp`` split
    it."""

    def __init__(self, config: Pretrain | Finetune) -> None:
        super().__init__()
        self.config: Any = config
        self.scalars: dict[str, Tensor] = {}
        """Scalars of the latest micro-batch, on the device, for ``Metrics``."""
        self.clips = 0
        """Clips of the latest micro-batch."""
        self.guard = Guard(config.optim.clip_norm)
        self.replayed_rank: int | None = None
        """Rank whose step is computed again; None: the process's own."""

    @property
    def global_rank(self) -> int:
        """Rank that seeds the step."""
        return super().global_rank if self.replayed_rank is None else self.replayed_rank

    def finished(self, batch: WaveBatch, index: int, scalars: dict[str, Tensor]) -> Tensor:
        """Records the scalars of micro-batch ``index``; returns its loss for the backward pass."""
        loss = scalars["loss"]
        self.clips = batch.waves.shape[0]
        self.scalars = {name: scalar.detach() for name, scalar in scalars.items()}
        self.scalars["grad_norm"] = torch.full_like(loss, torch.nan)  # known before the step
        self.guard.note(batch, index, loss)
        return spread_nan(loss)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps the optimiser at the scheduled rate."""
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
        self.after_step(done, skip=self.guard.skip)

    def after_step(self, step: int, *, skip: Tensor) -> None:
        """Called after each optimiser step, see ``Objective.after_step``."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Computes the gradients' norm, clips them and decides whether to skip the step."""
        self.scalars["grad_norm"] = self.guard.inspect(optimizer, self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds provenance to every checkpoint."""
        checkpoint["bat"] = {"version": __version__, "config": redact_tree(to_dict(self.config))}

    def units(self) -> list[nn.Module]:
        """Returns the modules gathered one at a time, in order of use; called by their forward."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Shards the module; Lightning calls it in each process once all are connected."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self, FSDPModule):
            return
        if mesh.size(0) == 1:  # no copies: split alone
            mesh = mesh[SPLIT]
        # always freed after the forward: a forward without backward (teacher, probes)
        # would leave the weights gathered, and the EMA would not update the shards
        how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
        for unit in self.units():
            fully_shard(unit, **how)
        fully_shard(self, **how)
        for method in ("training_step", "within"):
            register_fsdp_forward_method(self, method)
        whole = [name for name, p in self.named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"not sharded: {whole}"

    def within(self, what: Callable[[], T]) -> T:
        """Calls ``what`` with gathered weights, as in a step. **Every rank must call it.**"""
        return what()
