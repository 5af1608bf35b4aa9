"""Writes checkpoints atomically, whole files in a background thread while training continues.

A checkpoint is copied to host memory (training waits for this alone), then a separate thread writes
it under a temporary name beside its final one, reads it back (the CRC-32 of every record), flushes,
renames it, points ``last.ckpt`` at it and only then removes older ones. Whenever the process is
killed, the newest file under a final name is complete. A failed write (a full disk) ends the run
with an error that names the newest valid checkpoint. ``hardware.checkpoint=sharded``: a folder to
which every process writes its part (``checkpoint_parts.py``), renamed once all have.

Lightning 2.6.6 stages in ``$TMPDIR`` and moves, which across file systems is neither atomic nor
flushed; its ``AsyncCheckpointIO`` reports an error only at the next save.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase

from bat.config.running import Train
from bat.errors import UserError
from bat.io import replace_durably
from bat.train.callbacks import StepCallback
from bat.train.checkpoint_parts import REST, damaged_part, read_parts, together, write_parts
from bat.train.processes import Ranks, ranks_of
from bat.train.stopping import Stopping

log = logging.getLogger("bat")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes, verifies and renames checkpoints, in a thread unless ``background`` is False."""

    def __init__(
        self,
        *,
        background: bool = False,
        written: Callable[[Path, float], None] | None = None,
        failed: Callable[[UserError], None] | None = None,
    ) -> None:
        """``written(path, seconds)`` and ``failed(error)`` are called from the writing thread."""
        super().__init__()
        self.background, self.written, self.failed = background, written, failed
        self._thread: threading.Thread | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes ``checkpoint`` to ``path``; in the background, done once ``wait`` returns."""
        del storage_options
        self.wait()
        if not self.background:
            self._write(checkpoint, Path(path))
            return
        held = snapshot(checkpoint)
        self._thread = threading.Thread(
            target=self._write_or_tell, args=(held, Path(path)), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the pending write has finished or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def teardown(self) -> None:
        """Waits for the pending write at the end of a run (called by Lightning)."""
        self.wait()

    def _write_or_tell(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            self._write(checkpoint, path)
        except Exception as error:  # no other thread sees this one's exceptions
            told = error if isinstance(error, UserError) else UserError(f"{path}: {error!r}")
            if self.failed is not None:
                self.failed(told)

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        began = time.perf_counter()
        with self._writing(target) as temporary:
            torch.save(checkpoint, temporary)
            damage = damaged(temporary)
            if damage:
                raise OSError(f"what was written does not read back ({damage})")
            replace_durably(temporary, target)
            if self.written is not None:
                self.written(target, time.perf_counter() - began)

    def save_parts(self, checkpoint: dict[str, Any], target: Path, ranks: Ranks) -> None:
        """Writes ``checkpoint``, whose tensors are split, as a folder, while training waits.
        **Every rank must call it.**"""
        began = time.perf_counter()

        def finish() -> None:
            if ranks.rank == 0:
                replace_durably(temporary, target)
                if self.written is not None:
                    self.written(target, time.perf_counter() - began)

        with self._writing(target, clean=ranks.rank == 0) as temporary:
            write_parts(checkpoint, temporary, ranks)
            together(ranks, finish)

    @contextmanager
    def _writing(self, target: Path, *, clean: bool = True) -> Iterator[Path]:
        """Yields a temporary name for ``target`` that is removed at the end (``clean``); turns
        errors into a ``UserError`` that names the newest valid checkpoint."""
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError on a full disk
            before = [p for p in checkpoints(target.parent.parent) if p != target]
            good = f"{before[0]} is untouched" if before else "there is none before it"
            raise UserError(
                f"cannot write checkpoint {target}: {error}. {good}; free some space, then run "
                "the same command again to continue"
            ) from error
        finally:
            if clean:
                remove(temporary)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
        like: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> Any:
        """Loads tensors and plain containers only, whatever the caller asks for. ``like``: see
        ``read_parts``, for a checkpoint that is a folder."""
        del weights_only
        if not Path(path).is_dir():
            return torch.load(path, map_location=map_location, weights_only=True)
        try:
            return read_parts(Path(path), like)
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} cannot be read ({error}): put it back from a copy, or move it "
                "away, and the same command continues from the one before it"
            ) from error


def snapshot(tree: Any) -> Any:
    """Returns a copy of nested containers with all tensors copied to host memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {k: snapshot(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(snapshot(v) for v in tree)
    return copy.deepcopy(tree)


def damaged(path: Path) -> str:
    """Reads a whole checkpoint file and returns what is wrong with it; empty if it is valid. Of
    a folder only the sizes are compared: each process compares all checksums when it reads."""
    if path.is_dir():
        return damaged_part(path, sizes_only=True)
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
        return f"its record {bad} is damaged" if bad else ""
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from error
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        return str(error) or type(error).__name__


def checkpoints(out: Path) -> list[Path]:
    """Returns the numbered checkpoints of a run, newest first."""
    found = (out / "checkpoints").glob("step-*.ckpt")
    return sorted((p for p in found if re.fullmatch(r"step-\d+\.ckpt", p.name)), reverse=True)


def last_checkpoint(out: Path, *, force: bool = False) -> Path | None:
    """Returns the newest checkpoint that is valid and loads; skips others with a warning.

    None if there is no checkpoint. Raises ``UserError`` if there are some and none loads, unless
    ``force`` is set, which starts the run from scratch.
    """
    found = checkpoints(out)
    for path in found:
        reason = damaged(path)
        try:
            if not reason:
                file = path / REST if path.is_dir() else path
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                return path
        except Exception as error:  # on any error, try an older one
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning("checkpoint %s does not load (%s); trying an older one", path, reason)
    if found and not force:
        raise UserError(
            f"none of the checkpoints in {found[0].parent} loads (the newest: {reason}). Put them "
            "back from a copy, give another out=, or begin anew in this one with --force"
        )
    return None


def step_of(path: Path) -> int:
    """Returns N of ``step-N.ckpt``."""
    return int(path.stem.partition("-")[2])


def remove(path: Path) -> None:
    """Removes a checkpoint, a file or a folder, if it exists; a folder loses its name first."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.tmp"))
    shutil.rmtree(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, atomically, as a hard link if the file system
    allows; a symbolic link to a folder beside it."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        if source.is_dir():
            temporary.symlink_to(source.name)
        else:
            os.link(source, temporary)
    except OSError:
        if source.is_dir():
            raise
        temporary.write_bytes(source.read_bytes())
    os.replace(temporary, target)


class Checkpoints(StepCallback, CheckpointBase):
    """Saves ``step-N.ckpt`` by steps, by minutes, at the end and when the run is asked to stop.

    ``last.ckpt`` is the newest. Checkpoints are saved on accumulation boundaries only. The latest
    ``keep`` and those of every ``keep_every``-th step are kept. As a ``CheckpointBase`` it runs
    after every other callback of the step.
    """

    def __init__(
        self, config: Train, out: Path, *, stopping: Stopping, newest: Path | None = None
    ) -> None:
        """``newest``: checkpoint that the run resumes from; None for a new run."""
        super().__init__()
        self.config, self.out, self.stopping, self.newest = config, out, stopping, newest
        self.io = AtomicCheckpointIO(
            background=True,
            written=self._written,
            failed=lambda error: stopping.ask("a checkpoint", error),
        )
        """Checkpoint plugin for the Trainer."""
        self.cost: dict[str, Any] = {"written": 0, "mb": 0.0, "stall_seconds": 0.0}
        self.cost |= {"longest_stall_seconds": 0.0, "longest_write_seconds": 0.0}
        """Number and size of the checkpoints and the time they took, over all starts."""
        self._since = self._began = time.monotonic()
        self._trained_before = 0.0
        stopping.clock = self._overdue

    def _overdue(self) -> bool:
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self._since > 60 * minutes

    def training_seconds(self) -> float:
        """Returns the training time of this and all earlier starts known from the checkpoint."""
        return self._trained_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Returns the cost for the next start; includes the checkpoint being written."""
        seconds = self.training_seconds()
        return {**self.cost, "written": self.cost["written"] + 1, "training_seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained_before = state_dict["training_seconds"]
        self.cost = {name: state_dict[name] for name in self.cost}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        names = [path.name if path else "none" for path in ranks_of(trainer).gather(self.newest)]
        if len(set(names)) > 1:
            raise UserError(
                f"the processes found different newest checkpoints in {self.out}: "
                f"{', '.join(names)} (by rank): out= must be one folder that all of them see"
            )
        if trainer.is_global_zero:  # left by an interrupted write
            for stale in (self.out / "checkpoints").glob(".*.tmp"):
                remove(stale)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves aside checkpoints later than the one resumed from: they are damaged, and would
        otherwise count towards ``keep`` in place of valid ones."""
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic()
        if not trainer.is_global_zero:
            return
        for path in checkpoints(self.out):
            if step_of(path) > trainer.global_step:
                path.replace(path.with_name(f"damaged-{path.name}"))
        newest = self._path(trainer.global_step)
        if newest.exists():
            link_or_copy(newest, newest.with_name("last.ckpt"))

    def _path(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step-{step:08d}.ckpt"

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        last = step == trainer.max_steps or self.stopping.ending
        if step % self.config.save_every and not last and not self.stopping.due:
            return
        began = time.perf_counter()
        self._check(trainer, module, step)
        trainer.save_checkpoint(self._path(step))
        stall = time.perf_counter() - began
        self.cost["written"] += 1
        self.cost["stall_seconds"] += stall
        self.cost["longest_stall_seconds"] = max(self.cost["longest_stall_seconds"], stall)
        self._since = time.monotonic()
        if last:
            self.io.wait()
            self.stopping.check_errors()

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Raises ``UserError`` on every rank if the weights of any rank are not finite."""
        parts = {n: getattr(p, "_local_tensor", p) for n, p in module.named_parameters()}
        fine = torch.stack([torch.isfinite(p).all() for p in parts.values()]).tolist()
        broken = [name for name, good in zip(parts, fine, strict=True) if not good]
        names = [n for theirs in ranks_of(trainer).gather(broken) for n in theirs]
        if names:
            raise UserError(
                f"the weights are not finite after step {step} ({names[0]} and "
                f"{len(set(names)) - 1} more): nothing was saved, earlier checkpoints are "
                "untouched. Lower optim.lr, set optim.clip_norm, or try "
                "hardware.precision=32-true"
            )

    def _written(self, path: Path, seconds: float) -> None:
        """Called from the writing thread once ``path`` is written and verified."""
        files = path.iterdir() if path.is_dir() else [path]
        self.cost["mb"] = sum(file.stat().st_size for file in files) / 1e6
        self.cost["longest_write_seconds"] = max(self.cost["longest_write_seconds"], seconds)
        link_or_copy(path, path.with_name("last.ckpt"))
        keep, always = self.config.keep, self.config.keep_every
        for old in checkpoints(self.out)[keep:]:
            if not always or step_of(old) % always:
                remove(old)
        log.info("%s: %.1f MB, safe after %.2f s", path.name, self.cost["mb"], seconds)

    def facts(self) -> dict[str, Any]:
        """Returns the rounded cost for a summary."""
        return {name: round(value, 1 if name == "mb" else 3) for name, value in self.cost.items()}
