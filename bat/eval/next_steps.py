"""Suggests the commands to run next after a run: complete and quoted for a shell.

Each carries over the run's settings of data and encoder; a command that would fail is not
suggested.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bat.config import locate
from bat.config.compose import compose, word, words_of
from bat.config.schema import Finetune, Pretrain, Probe, Supervised
from bat.config.sections import Data
from bat.data.index import Index
from bat.errors import UserError
from bat.eval.encoder_list import RANDOM, several
from bat.eval.prepare import PreparedData, check_data
from bat.redact import redact
from bat.tasks.base import Task

SCHEMAS: dict[str, Any] = {"probe": Probe, "finetune": Finetune}
CARRIED = (
    "recipe", "task", "data.root", "data.csv", "data.shards", "data.cache", "data.clip_seconds",
    "weights", "heads", "level", "folds", "frames", "pad", "pad_offset", "statistics", "hardware",
)  # fmt: skip
"""Settings (and sections) of a probe run or fine-tuning that its follow-up needs too."""


def after_pretraining(config: Pretrain, out: Path, task: Task, index: Index | None) -> list[str]:
    """Suggests probing and fine-tuning on the labelled data of the run (``task``, ``index``), if
    they have labels and something to hold out; the data are found by the run's ``config.yaml``."""
    found = []
    for command, more in (("probe", ["methods=[cgp,linear]"]), ("finetune", [])):
        known = config.recipe in locate.known_recipes(command)
        words = [f"recipe={config.recipe if known else 'own'}"]
        usual = compose(SCHEMAS[command], command, words)
        words += [f"task={task.name}"] if usual.task != task.name else []
        if config.data.cache != Data().cache:
            words.append(word("data.cache", config.data.cache))
        try:
            if index is None:
                raise UserError("without an index nothing is held out")
            usual = compose(SCHEMAS[command], command, words)
            check_data(usual, task, index)
        except UserError:
            continue
        found.append(_command(usual, [*words, word("checkpoint", out), *more]))
    return found or [
        f"# this data has no labels, or nothing to hold out: list labelled audio in a CSV (columns "
        f"path, label) and give it to bat-probe as data.csv, with checkpoint={out}"
    ]


def after_probing(config: Probe, out: Path, data: PreparedData[Probe]) -> list[str]:
    """Suggests the random-init baseline, the report and fine-tuning (``config`` as given)."""
    names = several(config)
    found = []
    alone = len(names) == 1 and RANDOM not in names[0]
    given = words_of(config, "probe")
    if alone and given:
        words = [w for w in given if not w.startswith("checkpoint=")]
        baseline = _command(config, [*words, word("checkpoint", f"{names[0]},{RANDOM}")])
        found.append(f"{baseline}   # and the same encoder untrained")
    found.append(f"bat-probe report {shlex.quote(str(out))}   # one page with all of it")
    trained = next((name for name in names if not name.startswith(RANDOM)), names[0])
    if carried := _carried(config, given, to="finetune"):
        if len(names) > 1 and not (config.data.root or config.data.csv or config.data.shards):
            # independent of which encoder's run it came from
            given = words_of(replace(config, data=data.config.data), "probe")
            carried = _carried(config, given, to="finetune") or carried
        words, tuned = carried
        if data.events is not None or data.texts is not None:
            words = [*words, *_in_place(tuned, texts=data.texts is not None)]
        found.append(_command(tuned, [*words, word("checkpoint", trained)]))
    return found


def _in_place(config: Finetune, *, texts: bool) -> list[str]:
    """Returns the settings that the fine-tuning must omit to keep clips aligned with their times;
    with ``texts`` also those that mix clips."""
    found = ["data.roll=false"] if config.data.roll else []
    found += ["augment.time_roll=false"] if config.augment.time_roll else []
    return found + (["augment.mixup_p=0"] if texts and config.augment.mixup_p else [])


def after_finetuning(config: Finetune, out: Path) -> list[str]:
    """Suggests probing of the encoder it began with. ``config``: as the user gave it."""
    carried = _carried(config, words_of(config, "finetune"), to="probe")
    if carried is None:
        return []
    words, probe = carried
    words += [word("checkpoint", config.checkpoint), word("finetuned", out)]
    words.append("methods=[cgp,linear]")
    return [f"{_command(probe, words)}   # the same encoder frozen, and the gap"]


def _carried(
    config: Supervised, words: list[str] | None, *, to: str
) -> tuple[list[str], Any] | None:
    """Returns those of ``words``, which make ``config``, that give ``bat-TO`` its data and encoder
    settings, and what they compose to; None if it has no such recipe."""
    if words is None or config.recipe not in locate.known_recipes(to):
        return None
    shared = [w for w in words if w.partition("=")[0] in CARRIED]
    for kept in (shared, [w for w in shared if not w.startswith("hardware=")]):
        try:
            return kept, compose(SCHEMAS[to], to, kept)
        except UserError:
            continue
    return None


def _command(config: Supervised, words: list[str]) -> str:
    """Returns the command of ``config`` with ``words``, on the CPU if its GPU is missing."""
    command = next(name for name, schema in SCHEMAS.items() if isinstance(config, schema))
    if config.hardware.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        words = [*words, "hardware=cpu"]
    methods = [w for w in words if w.startswith("methods=")]
    words = [w for w in words if w not in methods]
    flags = [f"--method={m[9:-1].replace(' ', '')}" for m in methods]
    return redact(shlex.join([f"bat-{command}", *words, *flags]))
