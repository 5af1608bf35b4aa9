"""Builds Lightning's Trainer for all commands and the loggers of its run folder.

A run leaves ``out/``: config.yaml, metrics.jsonl, train.log, checkpoints/, export/, plots/,
summary.json. Lightning runs the loop; added here are checkpoints (``checkpointing.py``), resumable
shutdown (``stopping.py``), the NaN guard (``guard.py``) and metrics as JSON lines.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from bat.config.schema import Hardware, Log, Train
from bat.errors import UserError
from bat.io import filter_jsonl, write_json
from bat.train.processes import LAUNCHER, devices, nodes
from bat.train.sharding import strategy

log = logging.getLogger("bat")


class JsonLines(Logger):
    """Logs one JSON object per line: ``{"step": ..., name: value, ...}``. A resumed run appends.

    Lines of steps after the checkpoint that a run resumes from are dropped first, so that every
    step appears once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._lock = threading.Lock()  # events come from other threads
        self._unwritten = b""

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = value if finite else None  # JSON knows no NaN
        row.pop("epoch", None)
        self.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line, from any thread and any rank; on a full disk it waits in memory."""
        with self._lock:
            self._unwritten += (json.dumps(row) + "\n").encode()
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(self._unwritten) < len(self._unwritten):
                        raise OSError("no space left")
                    self._unwritten = b""
                except OSError as error:
                    file.truncate(size)
                    log.warning("cannot write %s (%s): lines wait in memory", self.path, error)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops the lines of steps after ``step``, all of them at step 0 (a new run).

        A half-written last line is dropped too.
        """
        filter_jsonl(self.path, lambda row: bool(step) and (row.get("step") or 0) <= step)


def build_trainer(
    *,
    hardware: Hardware,
    train: Train,
    log: Log,
    out: Path,
    callbacks: list[pl.Callback],
    checkpoint_io: CheckpointIO,
    name: str,
    resumed: int | None = None,
) -> pl.Trainer:
    """Builds a Trainer for ``train.steps`` optimiser steps.

    Metrics go to ``out/metrics.jsonl`` and, if ``log`` says so, to Weights & Biases and
    ``out/tensorboard``: to the same run there if it is ``resumed`` from that step, whose later
    steps are dropped.
    Raises ``UserError`` if the requested hardware is not available.
    """
    assert hardware.precision != "auto", "settled by with_precision, before a run begins"
    loggers: list[Logger] = [JsonLines(out / "metrics.jsonl")]
    plugins: list[Any] = [checkpoint_io]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # ours: ``stopping.py``
    if log.wandb != "off":
        try:
            loggers.append(OneWandbRun(log, out, name, resumed=resumed is not None))
        except ModuleNotFoundError as error:
            raise UserError(
                "log.wandb needs the package: pip install 'bat-audio[wandb]'"
            ) from error
    if log.tensorboard:
        repeated = None if resumed is None else resumed + 1
        try:
            loggers.append(TensorBoardLogger(out, "", "tensorboard", purge_step=repeated))
        except ModuleNotFoundError as error:
            raise UserError(
                "log.tensorboard needs the package: pip install 'bat-audio[tensorboard]'"
            ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        try:
            trainer = pl.Trainer(
                accelerator=hardware.accelerator,
                devices=devices(hardware),
                num_nodes=nodes(hardware),
                strategy=strategy(hardware),
                precision=hardware.precision,
                max_steps=train.steps,
                max_epochs=-1,
                accumulate_grad_batches=train.accumulate,
                logger=loggers,
                callbacks=callbacks,
                plugins=plugins,
                use_distributed_sampler=False,
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
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None and not environment.creates_processes_externally:
        os.environ[LAUNCHER] = str(os.getpid())  # Lightning will start the others
    return trainer


class OneWandbRun(WandbLogger):
    """Logs all starts of a training to one Weights & Biases run, whose steps only increase.

    ``out/wandb/bat.json`` keeps the run's id and the latest step. A resumed start logs what comes
    after that step: steps that are repeated after a kill are not logged again.
    """

    def __init__(self, log: Log, out: Path, name: str, *, resumed: bool) -> None:
        """``resumed``: this start resumes from a checkpoint; otherwise a new run begins."""
        import wandb

        self._file = out / "wandb" / "bat.json"
        before: dict[str, Any] = {}
        if resumed and self._file.is_file():
            before = json.loads(self._file.read_text(encoding="utf-8"))
        self._logged = int(before.get("step", -1))
        super().__init__(
            name=name,
            project=log.project,
            save_dir=out,
            offline=log.wandb == "offline",
            id=before.get("id") or secrets.token_hex(4),
            resume="allow" if log.wandb == "online" else None,  # offline it only warns
            # it would store the command line, which may hold a signed URL
            settings=wandb.Settings(x_disable_meta=True, console="off"),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning 2.6.6 sets it, and wandb warns about it

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs ``metrics`` unless an earlier start has logged this step."""
        if step is not None and step <= self._logged:
            return
        super().log_metrics(metrics, step)
        write_json(self._file, {"id": self.version, "step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run, since the next fold has its own."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
