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
            check_data(compose(SCHEMAS[command], command, words), task, index)
        except UserError:
            continue
        found.append(_command(command, [*words, word("checkpoint", out), *more]))
    return found or [
        f"# this data has no labels, or nothing to hold out: list labelled audio in a CSV (columns "
        f"path, label) and give it to bat-probe as data.csv, with checkpoint={out}"
    ]


def after_probing(config: Probe, out: Path, data: PreparedData[Probe]) -> list[str]:
    """Suggests the random-init baseline, the report and fine-tuning (``config`` as given)."""
    names = several(config)
    found = []
    alone = len(names) == 1 and RANDOM not in names[0]
    if alone and (words := words_of(config, "probe")):
        words = [w for w in words if not w.startswith("checkpoint=")]
        baseline = _command("probe", [*words, word("checkpoint", f"{names[0]},{RANDOM}")])
        found.append(f"{baseline}   # and the same encoder untrained")
    found.append(f"bat-probe report {shlex.quote(str(out))}   # one page with all of it")
    trained = next((name for name in names if not name.startswith(RANDOM)), names[0])
    if words := _carried(config, "probe", to="finetune"):
        source = data.config.data
        if len(names) > 1 and not (config.data.root or config.data.csv or config.data.shards):
            given = replace(config, data=source)  # independent of which encoder's run it came from
            words = _carried(given, "probe", to="finetune") or words
        if data.events is not None or data.texts is not None:
            words = [*words, *_in_place(words, texts=data.texts is not None)]
        found.append(_command("finetune", [*words, word("checkpoint", trained)]))
    return found


def _in_place(words: list[str], *, texts: bool) -> list[str]:
    """Returns the settings a fine-tuning with ``words`` must omit to keep clips aligned with their
    times; with ``texts`` also those that mix clips."""
    config = compose(Finetune, "finetune", words)
    found = ["data.roll=false"] if config.data.roll else []
    found += ["augment.time_roll=false"] if config.augment.time_roll else []
    return found + (["augment.mixup_p=0"] if texts and config.augment.mixup_p else [])


def after_finetuning(config: Finetune, out: Path) -> list[str]:
    """Suggests probing of the encoder it began with. ``config``: as the user gave it."""
    words = _carried(config, "finetune", to="probe")
    if words is None:
        return []
    words += [word("checkpoint", config.checkpoint), word("finetuned", out)]
    words.append("methods=[cgp,linear]")
    return [f"{_command('probe', words)}   # the same encoder frozen, and the gap"]


def _carried(config: Supervised, command: str, *, to: str) -> list[str] | None:
    """Returns the words that give ``bat-TO`` the data and encoder settings of ``config``, which is
    of ``bat-COMMAND``; None if it has no such recipe."""
    words = words_of(config, command)
    if words is None or config.recipe not in locate.known_recipes(to):
        return None
    shared = [w for w in words if w.partition("=")[0] in CARRIED]
    for kept in (shared, [w for w in shared if not w.startswith("hardware=")]):
        try:
            compose(SCHEMAS[to], to, kept)
        except UserError:
            continue
        return kept
    return None


def _command(command: str, words: list[str]) -> str:
    """Returns ``bat-COMMAND`` with ``words``, on the CPU if its recipe's GPU is missing."""
    wanted = compose(SCHEMAS[command], command, words).hardware.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        words = [*words, "hardware=cpu"]
    methods = [w for w in words if w.startswith("methods=")]
    words = [w for w in words if w not in methods]
    flags = [f"--method={m[9:-1].replace(' ', '')}" for m in methods]
    return redact(shlex.join([f"bat-{command}", *words, *flags]))
