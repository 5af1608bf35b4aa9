"""Opens the run folder and the data of a command, the first steps of every command."""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bat.config.compose import to_yaml
from bat.config.schema import Pretrain, Probe, Supervised
from bat.config.sections import Data
from bat.data.files import index_files
from bat.data.index import Index, open_index
from bat.data.toy import make_toy
from bat.errors import UserError
from bat.eval.encoder_list import RANDOM, check_there, checkpoint_name, encoders_of
from bat.io import missing, write_atomic
from bat.lock import LOCK, check_free, hold
from bat.redact import redact_tree
from bat.registry import split_checkpoint
from bat.tasks import csv, folder
from bat.tasks.base import LeftOut, Reading, Row, Task, load_task

log = logging.getLogger("bat")

LONG = 80
"""Longest part of a folder's name that encoder names take, in characters."""
SAFE = (
    "out:",
    "recipe:",
    "hardware.accelerator:",
    "hardware.devices:",
    "hardware.num_nodes:",
    "hardware.strategy:",
    "hardware.checkpoint:",
    "hardware.compile:",
    "hardware.activation_checkpointing:",
    "log.",
    "online.",
    "data.workers:",
    "data.cache:",
    "data.cache_gb:",
    "data.retries:",
    "data.timeout_seconds:",
    "data.redirects:",
    "data.cache_waves_gb:",
    "data.root:",
    "data.csv:",
    "data.shards:",
    "data.max_bad:",
    "data.batch:",
    "data.global_batch:",
    "train.accumulate:",
    "train.log_every:",
    "train.save_every:",
    "train.save_minutes:",
    "train.keep:",
    "train.keep_every:",
    "health.",
)
"""Settings that may change when a run is resumed, since they do not change what is computed. (Data
and global batch are checked against the checkpoint: by hash, not by path.)"""
PROBING = (
    *(name for name in SAFE if name not in ("data.batch:", "data.global_batch:")),
    "checkpoint:",
    "methods:",
    "seeds:",
    "folds:",
    "finetuned:",
    "confidence:",
    "heads_of:",
    "features.",
    "diagnostics.",
    "train.memory_gb:",
)
"""Settings that may change when a probe run is resumed: existing results stay, new ones are added.
(The batch of a probe run is no micro-batch: it affects the results.)"""


def _unlabelled(path: Path) -> list[Row]:
    rows = csv.read(path, labelled=False).rows
    return [replace(row, split=row.split and folder.split_of(row.split)) for row in rows]


UNLABELLED = replace(csv.TASK, rows=_unlabelled)
"""Task ``csv`` for pre-training: the clips of a CSV need no labels."""


def default_out(config: Pretrain | Supervised) -> Path:
    """Returns ``config.out``, or a folder named after the parts of the run."""
    if config.out:
        return Path(config.out)
    if isinstance(config, Pretrain):
        source = config.data.root or config.data.csv
        of = _named_after(source) if config.recipe == "own" and source else config.recipe
        return Path(f"runs/pretrain-{of}")
    of = config.recipe
    if config.data.csv:
        of = _named_after(config.data.csv)
    if not isinstance(config, Probe):
        return Path(f"runs/finetune-{of}-{checkpoint_name(config)}")
    encoders = "+".join(encoders_of(config))
    if len(encoders) > LONG:
        encoders = f"{encoders[:LONG]}-{hashlib.sha256(encoders.encode()).hexdigest()[:8]}"
    return Path(f"runs/probe-{of}-{encoders}-{'+'.join(config.methods)}")


def _named_after(source: str) -> str:
    """Returns ``labels-3f2a1c`` for ``labels.csv``: many tables and folders have the same name."""
    source = os.path.normpath(source)
    return f"{Path(source).stem}-{hashlib.sha256(source.encode()).hexdigest()[:6]}"


def check_first(config: Pretrain | Supervised) -> None:
    """Checks what can be checked before torch is imported and audio is read.

    Raises ``UserError`` for a checkpoint or data that do not exist, a faulty CSV, and a run folder
    in use.
    """
    data = config.data
    if isinstance(config, Supervised):
        check_there(config)
    elif config.init and not (default_out(config) / "checkpoints").is_dir():
        path = split_checkpoint(config.init)[1]
        if not Path(path).expanduser().exists():
            raise UserError(f"init={missing(path)}: give a run, an export or a weight file")
    if data.csv:
        csv.read(Path(data.csv), labelled=isinstance(config, Supervised))
    elif data.root or isinstance(config, Pretrain):
        _check_given(load_task(config.task), data)
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    several = isinstance(config, Probe) and RANDOM in str(config.checkpoint)  # reads the encoders
    if all(rank == "0" for rank in ranks) and (config.out or not several):
        check_free(default_out(config))


@contextmanager
def run_folder(
    config: Pretrain | Supervised, out: Path, *, force: bool = False
) -> Iterator[Callable[[], None]]:
    """Creates or re-opens the run folder ``out`` and holds its lock.

    Yields ``begin``, to be called once all is checked: it writes ``config.yaml`` and opens
    ``train.log``. Before that nothing of an existing run changes, and a folder in which nothing was
    begun is removed. Raises ``UserError`` if ``out`` is something else, is in use, or holds a run
    with other settings: the message shows the difference. ``force`` accepts other settings. Only
    the first of several processes checks and writes.
    """
    from bat.logs import is_main, log_failure, start_logging

    if not is_main():
        yield lambda: None
        return
    file = out / "config.yaml"
    _check_folder(out, file)
    text = to_yaml(redact_tree(config))
    with hold(out):
        changes = _changes(file.read_text("utf-8"), text) if file.is_file() else []
        safe = PROBING if isinstance(config, Probe) else SAFE
        risky = [line for line in changes if not line[2:].startswith(safe)]
        if risky and not force:
            raise UserError(
                f"out={out} holds a run with other settings (- then, + now):\n  "
                + "\n  ".join(risky)
                + "\nGive it the same settings to continue it, or another out=; --force continues "
                "it with these all the same"
            )
        if changes:
            by_force, lines = ", by --force" if risky else "", "\n  ".join(changes)
            log.warning("continuing with changed settings%s:\n  %s", by_force, lines)

        @functools.cache  # once
        def begin() -> None:
            try:
                write_atomic(file, text.encode())
            except OSError as error:
                raise UserError(
                    f"cannot write to out={out}: {error}; free some space, or choose another out="
                ) from error
            start_logging(out)

        try:
            yield begin
        except Exception as error:
            log_failure(error)
            raise


def _check_folder(out: Path, file: Path) -> None:
    """Raises ``UserError`` if ``out`` is a file, or a folder of other things than a run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file: name a folder")
    left = ("train.log", LOCK, "wandb", ".config.yaml.")  # of an interrupted start
    held = [path.name for path in out.iterdir()] if out.is_dir() and not file.is_file() else []
    if any(not name.startswith(left) for name in held):
        raise UserError(f"out={out} holds other things than a run: choose another folder")


def settings_of(out: Path) -> dict[str, Any]:
    """Reads the settings in ``out/config.yaml``, not checked; empty if there is no run."""
    import yaml

    try:
        return dict(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def _changes(before: str, after: str) -> list[str]:
    """Returns lines ``- key: value`` / ``+ key: value`` for full keys that differ."""
    diff = difflib.ndiff(_flat(before), _flat(after))
    return [line for line in diff if line.startswith(("- ", "+ "))]


def _flat(text: str) -> list[str]:
    import yaml

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}: {value}"

    return list(walk(yaml.safe_load(text) or {}, ""))


def open_data(
    task_name: str, data: Data, *, labelled: bool = True, progress: bool = True, warn: bool = True
) -> tuple[Task, Index]:
    """Returns the task and the index of the clips that ``data`` names, read in place.

    ``data.shards``: shards, local or remote; ``data.root``: the files that the task reads there;
    ``data.csv``: the files that it lists (the task is then ``csv``, whatever ``task_name``), which
    need no labels unless ``labelled``; the toy tasks write their own clips to ``data.cache``.
    ``warn``: log files that are left out.
    Raises ``UserError`` if nothing is given, or it is missing or unreadable (``NotIndexable``:
    shards that can only be read sequentially).
    """
    if data.csv and labelled:
        return open_csv(data, progress=progress)[:2]
    task = UNLABELLED if data.csv else load_task(task_name)
    _check_given(task, data)
    index: Index
    if data.shards:
        index = open_index(
            data.shards,
            cache=Path(data.cache),
            cache_bytes=int(data.cache_gb * 1e9),
            labels="drop" if data.labels == "drop" else "same",
            retries=data.retries,
            timeout_seconds=data.timeout_seconds,
            redirects=data.redirects,
        )
        left_out = [LeftOut(name, name, why) for name, why in index.left_out.items()]
        where = ", ".join(data.shards)
    else:
        root = Path(data.root or data.csv or Path(data.cache) / task.name)
        if not (data.root or data.csv):
            (task.make or make_toy)(root)
        found = task.open(root)
        for note in found.notes if warn else ():
            log.info("%s", note)
        index, left_out = index_files(
            found.rows,
            None if data.labels == "drop" else found.vocabulary,
            cache=_listed(task, root, data),
            absent=found.left_out,
            progress=progress,
            windows=data.windows,
        )
        where = f"{root} (all: {_listed(task, root, data)})"
    if left_out and warn:
        log.warning(
            "%d files of %s are left out, the first: %s, %s",
            len(left_out),
            where,
            left_out[0].file,
            left_out[0].reason,
        )
    return task.settle([index.most_labels]), index


def open_csv(data: Data, *, progress: bool = True) -> tuple[Task, Index, Reading]:
    """Returns task ``csv``, the index of what ``data.csv`` lists, and the list with its events.

    Raises ``UserError`` as ``csv.read``, and if more than ``data.max_bad`` of the files cannot be
    read; fewer are skipped with a warning and recorded in the list's ``notes``.
    """
    assert data.csv is not None
    path = Path(data.csv)
    found, listed = csv.read(path), _listed(csv.TASK, path, data)
    vocabulary = None if data.labels == "drop" else found.vocabulary
    index, left_out = index_files(
        found.rows, vocabulary, cache=listed, progress=progress, windows=data.windows
    )
    if left_out:
        shown = "; ".join(
            f"line {found.lines[entry.key]}: {entry.file}, {entry.reason.rstrip('.')}"
            for entry in left_out[: csv.SHOWN]
        )
        more = "; ..." if len(left_out) > csv.SHOWN else ""
        said = (
            f"{len(left_out)} of the {len(found.rows)} files of {data.csv} cannot be read "
            f"({shown}{more}; all: {listed})"
        )
        if len(left_out) > data.max_bad * len(found.rows):
            raise UserError(
                f"{said}: more than data.max_bad={data.max_bad:g} of them. Mend or remove them, or "
                "raise data.max_bad to leave them out"
            )
        log.warning("%s: left out", said)
        found = replace(found, notes=[*found.notes, f"{said}: left out"])
    return csv.TASK.settle([index.most_labels]), index, found


def _listed(task: Task, source: Path, data: Data) -> Path:
    """Returns the file in ``data.cache`` that keeps the headers of the files of ``source``."""
    place = hashlib.sha256(os.fsencode(f"{task.name} {source.absolute()}")).hexdigest()[:12]
    return Path(data.cache) / f"{task.name}-{place}.json"


def _check_given(task: Task, data: Data) -> None:
    """Raise ``UserError`` if ``data`` names nothing that ``task`` reads."""
    if data.root and task.name == csv.TASK.name:
        raise UserError(f"data.root={data.root} with task=csv: name its CSV, data.csv=FILE")
    if data.root and not Path(data.root).exists():
        raise UserError(f"data.root={missing(data.root)}: name the data of task {task.name}")
    makes_its_own = task.make is not None or task.name == "toy"
    if not (data.root or data.csv or data.shards or makes_its_own):
        raise UserError(
            f"no data given for task '{task.name}': say data.shards=DIR (shards, see bat-shard), "
            "data.root=DIR (a folder of audio) or data.csv=FILE (your own audio and labels)"
        )
