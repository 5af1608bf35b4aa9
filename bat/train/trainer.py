"""Lightning's Trainer as every command of ours wants it, and the run folder it writes to.

A run leaves ``out/``: config.yaml, metrics.jsonl, train.log, checkpoints/, export/, plots/,
summary.json. Lightning owns the loop; what is ours is small: checkpoints that are written beside
their final name, flushed and renamed (Lightning stages in ``$TMPDIR`` and moves: not atomic
across file systems), loading without unrestricted pickles, and metrics as JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from bat.checkpoint import replace_durably
from bat.config.schema import Hardware, Log, Train
from bat.shapes import UserError

log = logging.getLogger("bat")

NOISE = (
    ".*does not have many workers.*",  # two cores are two cores
    ".*no `validation_step`.*",  # probes, not losses, judge a pre-training run
    ".*in eval mode at the start of training.*",  # the teacher, on purpose
    ".*treespec, LeafSpec.*",  # Lightning 2.6.6 on torch 2.11
    ".*smaller than the logging interval.*",  # our own metrics log the last step in any case
)
"""Warnings of Lightning's that tell our users nothing."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, for ``torch.Generator.manual_seed``."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def is_main() -> bool:
    """Whether this is the first of the processes, before a Trainer is there to ask."""
    return not getattr(rank_zero_only, "rank", 0)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that exist whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write beside ``path``, flush, rename."""
        del storage_options
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            torch.save(checkpoint, temporary)
            replace_durably(temporary, target)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError on a full disk
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot write checkpoint {target}: {error}. Earlier checkpoints are untouched; "
                "free some space, then run the same command again to continue"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain containers only, whatever the caller says."""
        del weights_only
        return torch.load(path, map_location=map_location, weights_only=True)


class JsonLines(Logger):
    """One JSON object a line: ``{"step": ..., name: value, ...}``. Survives a resume by appending.

    Lines of steps after the checkpoint that a resumed run starts from are dropped first, so that
    every step is there once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = value if finite else None  # JSON knows no NaN
        row.pop("epoch", None)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``; all of them at step 0, which begins anew."""
        rows = [r for r in read_jsonl(self.path) if step and (r.get("step") or 0) <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        replace_durably(temporary, self.path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a half-written last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def checkpoints(out: Path) -> list[Path]:
    """Numbered checkpoints of a run, newest first."""
    found = (out / "checkpoints").glob("step-*.ckpt")
    return sorted((p for p in found if re.fullmatch(r"step-\d+\.ckpt", p.name)), reverse=True)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that loads; damaged ones are passed over with a line in the log."""
    for path in checkpoints(out):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever is wrong with it, an older one may do
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("checkpoint %s does not load (%s); trying an older one", path, reason)
            continue
        return path
    return None


def build_trainer(
    *,
    hardware: Hardware,
    train: Train,
    log: Log,
    out: Path,
    clip_norm: float | None,
    callbacks: list[pl.Callback],
    name: str,
) -> pl.Trainer:
    """A Trainer for ``train.steps`` optimiser steps.

    Metrics go to ``out/metrics.jsonl`` and, when ``log.wandb`` says so, to Weights & Biases.
    Raises ``UserError`` where the hardware asked for is not there.
    """
    loggers: list[Logger] = [JsonLines(out / "metrics.jsonl")]
    if log.wandb != "off":
        loggers.append(_wandb(log, out, name))
    devices: Any = hardware.devices
    if devices.isdigit():
        devices = int(devices)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        try:
            return pl.Trainer(
                accelerator=hardware.accelerator,
                devices=devices,
                num_nodes=hardware.num_nodes,
                strategy=hardware.strategy,
                precision=hardware.precision,
                max_steps=train.steps,
                max_epochs=-1,
                accumulate_grad_batches=train.accumulate,
                gradient_clip_val=clip_norm,
                logger=loggers,
                callbacks=callbacks,
                plugins=[AtomicCheckpointIO()],
                use_distributed_sampler=False,
                enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=train.log_every,
                default_root_dir=out,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                benchmark=True,
            )
        except (ValueError, RuntimeError, pl.utilities.exceptions.MisconfigurationException) as e:
            raise UserError(
                f"this machine cannot give hardware accelerator={hardware.accelerator} "
                f"devices={hardware.devices} strategy={hardware.strategy}: {e}. "
                "Try hardware=cpu or hardware=auto"
            ) from e


def _wandb(log: Log, out: Path, name: str) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    try:
        return WandbLogger(
            name=name, project=log.project, save_dir=out, offline=log.wandb == "offline"
        )
    except ModuleNotFoundError as error:
        raise UserError("log.wandb needs the package: pip install 'bat-audio[wandb]'") from error


def fit(trainer: pl.Trainer, module: Any, data: Any, newest: Path | None) -> None:
    """``trainer.fit`` from checkpoint ``newest`` on; an interrupted one is never a success.

    Lightning 2.6.6 ends a Ctrl-C by ``exit(1)`` and a SIGTERM by ``exit(0)`` within ``fit``.
    """
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(newest) if newest else None)
    except SystemExit as error:
        log.warning(
            "interrupted after step %d; the same command continues from the last checkpoint",
            trainer.global_step,
        )
        raise KeyboardInterrupt from error


def start_logging(out: Path | None = None) -> None:
    """Our own log lines to stderr and, given a run, its ``train.log``; Lightning's banners off."""
    logger = logging.getLogger("bat")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler()
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if out is not None and is_main():
        out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(out / "train.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    if not is_main():
        logger.setLevel(logging.WARNING)
    for banner in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(banner).setLevel(logging.ERROR)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    replace_durably(temporary, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, atomically, without writing it twice if
    the file system allows."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        temporary.write_bytes(source.read_bytes())
    os.replace(temporary, target)
