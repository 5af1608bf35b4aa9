"""Sets up data-parallel training with DDP or FSDP2, over all devices or over those of a node.

DDP keeps a full copy on every device. FSDP2 (``fully_shard``, through Lightning's
``ModelParallelStrategy``) splits weights, gradients, the optimiser's moments and the EMA teacher
along their first axis. A unit is gathered when its forward begins and freed when it ends: every
block of an encoder, the other modules that ``units`` returns, and the rest, the root, with
``training_step``. With ``hsdp`` the units are split within a node and copied on every node: weights
never leave it, gradients are summed within it, then each device's part is averaged over the nodes.
Sums are taken in float32 and nothing is compressed, so all equal DDP up to the order of additions.

Checkpoints are one plain file with DDP's keys, written and read by the ``CheckpointIO`` of the run
(Lightning 2.6.6 would bypass it when reading), or a folder of each process's part
(``checkpoint_parts.py``): from either a run can resume on any number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from bat.config.schema import Hardware
from bat.encoders.base import Encoder
from bat.nn.ema import local
from bat.train.processes import Ranks, nodes, world_size

log = logging.getLogger("bat")


def strategy(hardware: Hardware) -> str | Strategy:
    """Returns the strategy for the Trainer; ``auto`` on a single device."""
    world, copies = world_size(hardware), 1
    if hardware.strategy == "hsdp":
        copies = nodes(hardware)
    if hardware.shards and copies < world:
        return Sharded(copies, whole=hardware.checkpoint == "whole")
    if hardware.checkpoint == "sharded":
        log.warning("hardware.checkpoint=sharded: nothing is split here, checkpoints are whole")
    if hardware.strategy == "ddp" or world > 1:  # hsdp: with one device a node nothing is split
        # all buffers are constants and equal on all ranks: no broadcast before each step
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return "auto"


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, or over each of ``copies`` equal groups of them.

    ``whole``: checkpoints are in DDP's format; otherwise each process writes its part.
    """

    def __init__(self, copies: int, *, whole: bool) -> None:
        super().__init__(copies, "auto", save_distributed_checkpoint=False)
        self.whole = whole

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Makes Lightning pass the optimiser's state to us instead of reading the file itself."""
        return True

    def setup_environment(self) -> None:
        assert isinstance(self._data_parallel_size, int)
        self._tensor_parallel_size = self.num_nodes * self.num_processes // self._data_parallel_size
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self.whole:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        io: Any = self.checkpoint_io
        io.save_parts(checkpoint, Path(filepath), Ranks(self.global_rank, self.world_size))

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Accumulates gradients locally and reduces them at the last micro-batch of a step."""
        root = self.lightning_module
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        module = self.lightning_module
        return full_state(module) if self.whole else dict(module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if not self.whole:
            return state
        whole: dict[str, Any] = _whole(state, keep=dist.get_rank() == 0)
        return whole if dist.get_rank() == 0 else {}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(checkpoint_path).is_dir():
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        io: Any = self.checkpoint_io
        loaded: dict[str, Any] = io.load_checkpoint(checkpoint_path, like=self._like)
        return loaded

    def _like(self, name: str) -> Tensor | None:
        """Returns the tensor split as the one of this name in a checkpoint folder."""
        assert self.lightning_module is not None
        kind, _, name = name.partition("/")
        if kind == "state_dict":
            return dict(self.lightning_module.named_parameters()).get(name)
        optimizer, parameter, _ = name.split("/")
        groups = self.optimizers[int(optimizer)].param_groups
        found: Tensor = [p for group in groups for p in group["params"]][int(parameter)]
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads each process's part of the checkpoint's weights."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        state = {name: _part(t, own.get(name)) for name, t in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {name: _part(t, own[i]) for name, t in moments.items()}
                for i, moments in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})


def _part(whole: Any, like: Tensor | None) -> Any:
    """Splits ``whole`` as ``like`` is, if their shapes are equal; without communication."""
    if isinstance(whole, DTensor) or not isinstance(like, DTensor):
        return whole
    if not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _whole(tree: Any, *, keep: bool) -> Any:
    """Replaces DTensors in ``tree`` by full CPU tensors; without ``keep`` only takes part."""
    if isinstance(tree, dict):
        return {name: _whole(value, keep=keep) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_whole(value, keep=keep) for value in tree)
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
    return tree.detach().cpu() if keep and isinstance(tree, Tensor) else tree if keep else None


def full_state(module: nn.Module, *, everywhere: bool = False) -> dict[str, Any]:
    """Returns the state dict of ``module`` in plain tensors. **Every rank must call it.**

    If ``module`` is sharded, tensors are gathered one by one to the CPU of rank 0 (other ranks get
    an empty dict), or of all ranks with ``everywhere``. Otherwise ``module.state_dict()``.
    """
    if not is_sharded(module):
        return dict(module.state_dict())
    keep = everywhere or dist.get_rank() == 0
    whole: dict[str, Any] = _whole(dict(module.state_dict()), keep=keep)
    return whole if keep else {}


def whole_encoder(encoder: Encoder) -> Encoder | None:
    """Returns ``encoder``, or if it is sharded a full copy on its device for rank 0 and None for
    the others. **Every rank must call it.** The global random state is unchanged."""
    if not is_sharded(encoder):
        return encoder
    state = full_state(encoder)
    if dist.get_rank():
        return None
    with torch.random.fork_rng(devices=[]):
        copy = encoder.from_weights(state, config=encoder.config(), heads=None)
    return copy.to(next(encoder.parameters()).device).train(encoder.training)


def is_sharded(module: nn.Module) -> bool:
    """Returns True if each process holds only a part of ``module``."""
    return any(isinstance(p, DTensor) for p in module.parameters())


@torch.no_grad()
def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all gradients: a plain 0-dim float32 tensor on their device,
    equal on all ranks. Parameters without a gradient are omitted. Does not synchronise the host."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = torch.stack(torch._foreach_norm([local(g) for g in gradients]))
    if not isinstance(gradients[0], DTensor):
        return torch.linalg.vector_norm(total)
    assert all(isinstance(g, DTensor) for g in gradients), "a part of the model is not sharded"
    squares = total.double().square().sum()
    dist.all_reduce(squares, group=gradients[0].device_mesh.get_group(-1))  # copies are equal
    return squares.sqrt().float()
