"""What the processes of a run tell one another on the host, beside the devices' own traffic.

Over a gloo group of its own: a number that all must agree on does not wait for a GPU, and never
meets a gradient half-way. With one process everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

_groups: dict[int, dist.ProcessGroup] = {}  # by the default group: a new one means a new world


class Ranks:
    """Agreement among all processes; every rank must make the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def _group(self) -> dist.ProcessGroup:
        assert dist.is_initialized(), "several processes, but no process group"
        key = id(dist.group.WORLD)
        if key not in _groups:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            _groups[key] = group
        return _groups[key]

    def maximum(self, values: Sequence[int]) -> list[int]:
        """The greatest of each value over the ranks."""
        return self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def gather(self, thing: Any) -> list[Any]:
        """``thing`` of every rank, in their order."""
        found: list[Any] = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(found, thing, group=self._group())
        return found

    def _reduce(self, values: torch.Tensor, how: Any) -> list[Any]:
        if self.world > 1:
            dist.all_reduce(values, op=how, group=self._group())
        return list(values.tolist())


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes of ``trainer``; ask once they have met (from ``setup`` on)."""
    return Ranks(trainer.global_rank, trainer.world_size)
