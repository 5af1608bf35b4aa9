"""Counts the processes of a run, divides the global batch among them, and lets them agree.

Clips of an optimiser step = devices x accumulated micro-batches x clips of a micro-batch.
``data.global_batch`` fixes the product whatever the number of devices: ``data.batch`` is then the
most that a device takes at once, and the number of micro-batches follows. A batch that does not
divide evenly raises an error that shows the arithmetic; it is never rounded.

``Ranks`` uses its own gloo process group on the host, so agreeing on a number neither waits for a
GPU nor interleaves with gradient reduction. With one process every operation is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from bat.config.schema import Finetune, Hardware, Pretrain
from bat.errors import UserError

C = TypeVar("C", Pretrain, Finetune)


def _launched(slurm: str, torchrun: str) -> int | None:
    """Returns a number set by the launcher of this process; None without a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first: torchrun may run within a Slurm job
        return int(os.environ[torchrun])
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",  # Lightning's rule for an interactive shell within a job
        "interactive",
    ):
        return int(os.environ.get(slurm, "1"))
    return None


def launched() -> bool:
    """Returns True if torchrun or Slurm started this process as one of a run."""
    return _launched("SLURM_NTASKS", "WORLD_SIZE") is not None


def devices(hardware: Hardware) -> int | str:
    """Returns ``devices`` for the Trainer; ``auto``: as many as torchrun or Slurm started here."""
    if hardware.devices == "auto":
        return _launched("SLURM_NTASKS_PER_NODE", "LOCAL_WORLD_SIZE") or "auto"
    return int(hardware.devices) if hardware.devices.isdigit() else hardware.devices


def nodes(hardware: Hardware) -> int:
    """Returns the number of nodes; ``num_nodes=0``: as set by torchrun or Slurm, else 1."""
    if hardware.num_nodes:
        return hardware.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return _launched("SLURM_NNODES", "WORLD_SIZE") or 1


def world_size(hardware: Hardware) -> int:
    """Returns the number of processes of the run, as the Trainer will count them."""
    wanted, gpus = devices(hardware), 0
    if hardware.accelerator in ("auto", "gpu", "cuda"):
        gpus = torch.cuda.device_count()
    if isinstance(wanted, str):
        if wanted in ("auto", "-1"):
            wanted = max(1, gpus)
        else:  # "0,1"
            wanted = len([word for word in wanted.strip("[]").split(",") if word.strip()])
    return wanted * nodes(hardware)


def with_batch(config: C) -> C:
    """Returns ``config`` with the ``data.batch`` and ``train.accumulate`` that this run uses."""
    if config.data.global_batch is None:
        return config
    batch, accumulate = resolve(
        global_batch=config.data.global_batch,
        batch=config.data.batch,
        accumulate=config.train.accumulate,
        world=world_size(config.hardware),
    )
    changed: dict[str, Any] = {
        "data": replace(config.data, batch=batch),
        "train": replace(config.train, accumulate=accumulate),
    }
    return replace(config, **changed)


def resolve(
    *, global_batch: int | None, batch: int, accumulate: int, world: int
) -> tuple[int, int]:
    """Returns ``(clips per device and micro-batch, micro-batches per step)`` on ``world`` devices.

    Without ``global_batch``, returns the values given. With it, chooses the fewest micro-batches of
    at most ``batch`` clips; an ``accumulate`` other than 1 is used as given. Raises ``UserError``
    if ``global_batch`` does not divide evenly.
    """
    if global_batch is None:
        return batch, accumulate
    each, rest = divmod(global_batch, world)
    if rest or not each:
        near = sorted({max(1, each) * world, (each + 1) * world})
        fewer = [n for n in range(1, min(world, global_batch) + 1) if global_batch % n == 0]
        raise UserError(
            f"data.global_batch={global_batch} on {world} devices is {global_batch / world:.4g} "
            f"clips a device and step: say data.global_batch={' or '.join(map(str, near))}, or "
            f"take {', '.join(map(str, fewer[-4:]))} device{'s' if fewer[-1] > 1 else ''}"
        )
    if accumulate == 1:
        accumulate = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= batch)
        return each // accumulate, accumulate
    if each % accumulate or each // accumulate > batch:
        raise UserError(
            f"data.global_batch={global_batch} is {world} device(s) x train.accumulate="
            f"{accumulate} x {each / accumulate:.4g} clips, which must be whole and at most "
            f"data.batch={batch}: leave train.accumulate away (it follows), or change data.batch"
        )
    return each // accumulate, accumulate


_made: tuple[Any, dist.ProcessGroup] | None = None  # its world group, and the gloo group


class Ranks:
    """Reductions over all ranks; every rank must make the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def group(self) -> dist.ProcessGroup:
        """Returns the gloo group of all ranks; the first call is collective."""
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
            dist.all_gather_object(found, thing, group=self.group())
        return found

    def _reduce(self, values: torch.Tensor, how: Any) -> list[Any]:
        if self.world > 1:
            dist.all_reduce(values, op=how, group=self.group())
        return list(values.tolist())


LAUNCHER = "BAT_LAUNCHER"
"""Environment variable: id of the process whose Lightning launcher started the others."""


def leave_quietly() -> None:
    """Exits with 0 in a child of Lightning's launcher. The first process reports how the run ended;
    its observer would kill it at once if a child exited with another code (2.6.6)."""
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        raise SystemExit(0)


def destroy_groups() -> None:
    """Destroys the process groups at the end of a command: threads of theirs that are still alive
    abort some processes at exit (torch 2.11, gloo)."""
    global _made
    _made = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """Returns the ranks of ``trainer``; valid once processes are connected (from ``setup`` on)."""
    return Ranks(trainer.global_rank, trainer.world_size)
