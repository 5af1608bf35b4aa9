"""What the processes of a run tell one another on the host, beside the devices' own traffic.

Over a gloo group of its own: a number that all must agree on does not wait for a GPU, and never
meets a gradient half-way. With one process everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

_made: tuple[Any, dist.ProcessGroup] | None = None  # for which world, and the group


class Ranks:
    """Agreement among all processes; every rank must make the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def _group(self) -> dist.ProcessGroup:
        assert dist.is_initialized(), "several processes, but no process group"
        global _made
        if _made is None or _made[0] is not dist.group.WORLD:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            _made = dist.group.WORLD, group
        return _made[1]

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


LAUNCHER = "BAT_LAUNCHER"
"""Environment variable: the process whose launcher (Lightning's) started the others."""


def leave_quietly() -> None:
    """In a child of Lightning's launcher: exit with 0. The first process tells how the run ended;
    its observer would kill it at once for a child's other code (2.6.6)."""
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        raise SystemExit(0)


def part() -> None:
    """Undo what connects this process with the others, at the end of a command: threads of theirs
    that live on abort some processes as they end (torch 2.11, gloo)."""
    global _made
    _made = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes of ``trainer``; ask once they have met (from ``setup`` on)."""
    return Ranks(trainer.global_rank, trainer.world_size)
