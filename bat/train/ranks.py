"""Collective operations among the ranks on the host, separate from those of the devices.

Uses its own gloo process group, so agreeing on a number neither waits for a GPU nor interleaves
with gradient reduction. With one process every operation is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

_made: tuple[Any, dist.ProcessGroup] | None = None  # its world group, and the gloo group


class Ranks:
    """Reductions over all ranks; every rank must make the same calls in the same order."""

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
        """Returns the maximum of each value over the ranks."""
        return self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over the ranks."""
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def gather(self, thing: Any) -> list[Any]:
        """Returns ``thing`` of every rank, in rank order."""
        found: list[Any] = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(found, thing, group=self._group())
        return found

    def _reduce(self, values: torch.Tensor, how: Any) -> list[Any]:
        if self.world > 1:
            dist.all_reduce(values, op=how, group=self._group())
        return list(values.tolist())


LAUNCHER = "BAT_LAUNCHER"
"""Environment variable: id of the process whose Lightning launcher started the others."""


def leave_quietly() -> None:
    """Exits with 0 in a child of Lightning's launcher. The first process reports how the run ended;
    its observer would kill it at once if a child exited with another code (2.6.6)."""
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        raise SystemExit(0)


def part() -> None:
    """Destroys the process groups at the end of a command: threads of theirs that are still alive
    abort some processes at exit (torch 2.11, gloo)."""
    global _made
    _made = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """Returns the ranks of ``trainer``; valid once processes are connected (from ``setup`` on)."""
    return Ranks(trainer.global_rank, trainer.world_size)
