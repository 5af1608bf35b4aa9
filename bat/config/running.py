"""Settings of how a run is executed: steps and checkpoints, hardware, health, log.

Rules and precedence are described in ``schema.py``, which combines the sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bat.ranges import CountOrZero, NonNegativeFloat, PositiveInt, Rate


@dataclass
class Train:
    steps: PositiveInt = 400_000
    """Optimiser steps."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimiser step; derived from ``data.global_batch`` if that is set."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics."""
    save_every: PositiveInt = 5_000
    """Steps between checkpoints."""
    save_minutes: NonNegativeFloat = 30.0
    """Minutes between checkpoints, in addition to those by steps; 0: by steps only."""
    keep: PositiveInt = 3
    """Number of latest checkpoints kept; ``last.ckpt`` always exists."""
    keep_every: CountOrZero = 0
    """Checkpoints at multiples of this number of steps are kept permanently; 0: none."""

    def problems(self) -> Iterator[str]:
        if self.keep_every > 0 and self.keep_every % max(1, self.save_every):
            yield (
                f"train.keep_every={self.keep_every} is not a multiple of train.save_every="
                f"{self.save_every}: no checkpoint would be kept at most of these steps"
            )


@dataclass
class Hardware:
    """Passed to Lightning's Trainer."""

    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``, as Lightning names them; in place of Apple's GPU the CPU."""
    devices: str = "auto"
    """A number, a list such as ``0,1`` or ``auto``."""
    num_nodes: CountOrZero = 1
    """Number of nodes; 0: as many as Slurm allocated (``SLURM_NNODES``)."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """``fsdp``: FSDP2, which shards weights, gradients, optimiser and teacher over all devices;
    ``hsdp``: over those of a node, and every node holds everything."""
    checkpoint: Literal["whole", "sharded"] = "whole"
    """``sharded``: every process writes its part of a checkpoint, for models whose state does not
    fit the memory of one host; with ``strategy=fsdp`` or ``hsdp``."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """``auto``: ``bf16-mixed`` on a GPU or CPU with bfloat16 arithmetic, else ``32-true``; a
    resumed run keeps the precision it began with."""
    compile: Literal["off", "blocks", "whole", "cudagraphs"] = "off"
    """torch.compile of every block; or (``whole``) of the front end and the objective's graphs (the
    teacher, and the student with its losses), one graph each; or these replayed as CUDA graphs.
    Probing and fine-tuning always compile single blocks."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""

    @property
    def shards(self) -> bool:
        """True if each process holds only a part of the model."""
        return self.strategy in ("fsdp", "hsdp")

    def problems(self) -> Iterator[str]:
        if self.shards and self.accelerator not in ("auto", "cpu", "gpu", "cuda"):
            yield (
                f"hardware.strategy={self.strategy} splits a model among GPUs or CPU processes, "
                f"not on accelerator={self.accelerator}: say hardware.strategy=auto"
            )
        if self.shards and self.compile in ("whole", "cudagraphs"):
            yield (
                f"hardware.compile={self.compile} with strategy={self.strategy}: weights are "
                "gathered block by block; say hardware.compile=blocks"
            )
        if self.checkpoint == "sharded" and not self.shards:
            yield (
                f"hardware.checkpoint=sharded with strategy={self.strategy}: every process holds "
                "everything; say hardware.checkpoint=whole, or hardware.strategy=fsdp"
            )


@dataclass
class Health:
    """Settings of the health checks during a run; see docs/reliability.md."""

    max_skipped: CountOrZero = 5
    """Steps of non-finite loss or gradient skipped among 100; one more stops the run."""
    keep_nan: CountOrZero = 2
    """First skipped steps kept in ``out/nan`` for ``bat debug``, each as large as the weights."""
    collapse: Literal["off", "warn", "stop"] = "warn"
    """Pre-training: action if teacher or student gives all clips the same representation."""
    collapse_every: PositiveInt = 200
    """Steps between collapse checks."""
    min_rank: NonNegativeFloat = 2.0
    """Minimum effective rank; below it a representation counts as collapsed."""
    min_std: NonNegativeFloat = 0.05
    """Minimum deviation between clips, in units of that between tokens; collapsed below it."""
    stall_seconds: NonNegativeFloat = 120.0
    """Time without a batch after which a stall is reported with the shards being read; 0: never."""
    stall_stop_seconds: NonNegativeFloat = 1800.0
    """Time without a batch after which the run ends, to be resumed; 0: it waits forever."""
    slowdown: Rate = 0.5
    """Warn below this fraction of the run's own median of clips per second; 0: never."""

    def problems(self) -> Iterator[str]:
        if 0 < self.stall_stop_seconds < self.stall_seconds:
            yield (
                f"health.stall_stop_seconds={self.stall_stop_seconds} is less than "
                f"health.stall_seconds={self.stall_seconds}: raise it, or 0 to wait for ever"
            )


@dataclass
class Log:
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases; ``offline``: into ``out/wandb``, for a later ``wandb sync``."""
    project: str = "bat"
    """Project there."""
    tensorboard: bool = False
    """Log to TensorBoard: ``tensorboard --logdir runs``."""
    progress: bool = True
    """Show a progress bar."""
