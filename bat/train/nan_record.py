"""Keeps the first steps whose loss or gradient was not finite (read by ``nan_replay.py``).

``OUT/nan/STEP/`` holds

    weights.safetensors      the module's state dict at that step: a skipped step moves no weight
    batch-rankR.safetensors  tensors of each micro-batch of rank R
    batch-rankR.json         its place in the run, its keys and its loss
    settings.yaml            settings of the run
    record.json              step, versions, device; written last: a folder that has it is complete

All that is random in a step depends on (seed, fold, micro-batch, rank), see ``pretrain.py`` and
``supervised.py``: these numbers are the random state. On a GPU the first such step is noticed one
step late, when another step may have moved the weights; ``later_steps`` says so.
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bat import __version__
from bat.config.compose import to_yaml
from bat.io import replace_durably, temporary, write_atomic, write_json
from bat.redact import redact_tree
from bat.train.checkpointing import snapshot
from bat.train.sharding import full_state
from bat.types import WaveBatch

log = logging.getLogger("bat")

FOLDER = "nan"
"""Folder of the records in a run folder."""
RECORD, SETTINGS = "record.json", "settings.yaml"
TENSORS = ("waves", "lengths", "targets", "positions")
"""Tensors of a ``WaveBatch``."""


class MicroBatch(NamedTuple):
    """A micro-batch of the current step."""

    batch: WaveBatch
    number: int
    """Lightning's ``batch_idx``: it seeds the step."""
    loss: Tensor


def records(out: Path) -> list[Path]:
    """Returns the folders of complete records of a run, by step."""
    found = (path.parent for path in (out / FOLDER).glob(f"*/{RECORD}"))
    return sorted((p for p in found if p.name.isdigit()), key=lambda p: int(p.name))


def keep(
    folder: Path,
    module: Any,
    batches: list[MicroBatch],
    *,
    step: int,
    later_steps: int,
    rank: int,
    world: int,
) -> bool:
    """Writes the record of a step; returns False if it cannot be written, with a warning.
    **Every rank must call it.**

    ``module``: the ``TrainingModule``. ``later_steps``: number of steps since then.
    """
    state = snapshot(full_state(module))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"batch-rank{rank}"
        tensors = {
            f"{number}.{part}": getattr(micro.batch, part)
            for number, micro in enumerate(batches)
            for part in TENSORS
        }
        _save(folder / f"{name}.safetensors", snapshot(tensors))
        rows = [
            {"micro_batch": m.number, "keys": m.batch.keys, "loss": finite(float(m.loss))}
            for m in batches
        ]
        write_json(folder / f"{name}.json", {"rank": rank, "micro_batches": rows})
        if rank:
            return True
        _save(folder / "weights.safetensors", state)
        device = next(module.parameters()).device
        facts = {
            "step": step,
            "later_steps": later_steps,
            "kind": type(module.config).__name__.lower(),
            "fold": getattr(module, "fold", None),
            "processes": world,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "versions": {"bat": __version__, "torch": torch.__version__},
        }
        write_atomic(folder / SETTINGS, to_yaml(redact_tree(module.config)).encode())
        write_json(folder / RECORD, facts)
    except (OSError, SafetensorError) as error:
        log.warning("cannot keep step %d in %s: %s", step, folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def finite(value: float) -> float | None:
    """Returns ``value``, None if it is not finite: JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temp = temporary(path)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temp)
        replace_durably(temp, path)
    finally:
        temp.unlink(missing_ok=True)
