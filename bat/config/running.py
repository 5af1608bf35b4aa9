"""The sections of the schema that say how a run runs: steps and checkpoints, hardware, health, log.

Rules and precedence are told in ``schema.py``, which puts the sections together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Train:
    steps: int = 400_000
    """Optimiser steps."""
    accumulate: int = 1
    """Micro-batches an optimiser step; follows from ``data.global_batch`` where that is given."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    save_every: int = 5_000
    """Steps between two checkpoints."""
    save_minutes: float = 30.0
    """Minutes after which a checkpoint is written in any case; 0: by steps alone."""
    keep: int = 3
    """Latest checkpoints kept; ``last.ckpt`` is always there."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0: none."""

    def problems(self) -> list[str]:
        found = []
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                found.append(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("save_minutes", "keep_every"):
            if getattr(self, name) < 0:
                found.append(f"train.{name}={getattr(self, name)} must not be negative (0 is off)")
        if self.keep_every > 0 and self.save_every > 0 and self.keep_every % self.save_every:
            found.append(
                f"train.keep_every={self.keep_every} is not a multiple of train.save_every="
                f"{self.save_every}: no checkpoint would be kept at most of these steps"
            )
        return found


@dataclass
class Hardware:
    """Handed to Lightning's Trainer."""

    accelerator: str = "auto"
    devices: str = "auto"
    """A number, a list such as ``0,1`` or ``auto``."""
    num_nodes: int = 1
    """Machines; 0: as many as Slurm gave (``SLURM_NNODES``)."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """``fsdp``: FSDP2, weights, gradients, optimiser and teacher split among the devices."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """``auto``: ``bf16-mixed`` on a GPU or CPU with bfloat16 arithmetic, else ``32-true``; in a run
    that is continued, what it began with."""
    compile: Literal["off", "blocks", "whole", "cudagraphs"] = "off"
    """torch.compile: every block; or (``whole``) the front end and what the objective names, the
    teacher and the student with its losses, as one graph each; or these replayed as CUDA graphs.
    Probing and fine-tuning compile blocks in any case."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what is inside it."""

    def problems(self) -> list[str]:
        found = []
        if self.num_nodes < 0:
            found.append(f"hardware.num_nodes={self.num_nodes} must not be negative (0: Slurm's)")
        if self.strategy == "fsdp" and self.compile in ("whole", "cudagraphs"):
            found.append(
                f"hardware.compile={self.compile} with strategy=fsdp: weights are gathered block "
                "by block; say hardware.compile=blocks"
            )
        return found


@dataclass
class Health:
    """What is watched while a run runs; see docs/reliability.md."""

    max_skipped: int = 5
    """Steps of non-finite loss or gradient that are skipped; one more among 100 stops the run."""
    collapse: Literal["off", "warn", "stop"] = "warn"
    """Pre-training: what to do when teacher or student gives all clips the same representation."""
    collapse_every: int = 200
    """Steps between two looks at that."""
    min_rank: float = 2.0
    """Effective rank below which a representation counts as collapsed."""
    min_std: float = 0.05
    """Its deviation between clips, in units of that between tokens, below which it does."""
    stall_seconds: float = 120.0
    """A loader silent for so long is named, with the shards it sits on; 0: never."""
    stall_stop_seconds: float = 1800.0
    """After so long the run ends, to be resumed; 0: it waits for ever."""
    slowdown: float = 0.5
    """A warning below this fraction of the run's own median of clips a second; 0: never."""

    def problems(self) -> list[str]:
        found = []
        for name in (
            "max_skipped",
            "min_rank",
            "min_std",
            "stall_seconds",
            "stall_stop_seconds",
        ):
            if getattr(self, name) < 0:
                found.append(f"health.{name}={getattr(self, name)} must not be negative")
        if self.collapse_every < 1:
            found.append(f"health.collapse_every={self.collapse_every} must be at least 1")
        if not 0 <= self.slowdown < 1:
            found.append(f"health.slowdown={self.slowdown} is a fraction: it must lie in [0, 1)")
        if 0 < self.stall_stop_seconds < self.stall_seconds:
            found.append(
                f"health.stall_stop_seconds={self.stall_stop_seconds} is less than "
                f"health.stall_seconds={self.stall_seconds}: raise it, or 0 to wait for ever"
            )
        return found


@dataclass
class Log:
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "bat"
    progress: bool = True
