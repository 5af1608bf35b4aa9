"""What is trained on and what is held out: rounds, and the table their results make.

A data set with folds is cross-validated, each fold held out in turn; one with ``train`` and
``test`` splits has a single round. There is no validation split and nothing is selected: the
weights after the last step are judged on the held-out clips, and every result says so (``HOW``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bat.data.index import Index
from bat.shapes import UserError
from bat.tasks.base import Task
from bat.train.metrics import summarise

HOW = "weights after the last step, judged on the held-out clips; nothing was selected on them"
METRICS = ("accuracy", "map", "f1")
TITLES = {"accuracy": "accuracy", "map": "mAP", "f1": "F1"}


@dataclass(frozen=True)
class Round:
    """One training and what it is judged on: clip ids of an index."""

    name: str
    """The held-out fold's number, or ``test``."""
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """One method in one round."""

    method: str
    fold: str
    metrics: dict[str, Any]
    """As ``metrics.evaluate`` returns them, fractions."""
    gate: list[float] | None = None


def make_rounds(index: Index, folds: Sequence[int] | None = None) -> list[Round]:
    """The rounds of ``index``; ``folds`` picks some of its folds (None: all).

    Raises ``UserError`` where there is nothing to hold out, or a fold that does not exist.
    """
    if index.folds:
        if len(index.folds) < 2:
            raise UserError(f"all clips are in fold {index.folds[0]}: two folds are needed")
        chosen = index.folds if folds is None else list(dict.fromkeys(folds))
        if not chosen:
            raise UserError(f"folds=[] holds nothing out: folds are {index.folds}")
        return [Round(str(f), index.clips_not_in_fold(f), index.clips_in_fold(f)) for f in chosen]
    if folds is not None:
        raise UserError(f"folds={list(folds)}: the data has no folds; leave folds away")
    held_out = next((name for name in ("test", "eval") if name in index.splits), None)
    if held_out is None or "train" not in index.splits:
        raise UserError(
            "the data has neither folds nor a train and a test split, so nothing can be held out: "
            "give a column fold (from 1) or split (train, test) to bat-shard"
        )
    return [Round("test", index.clips_in_split("train"), index.clips_in_split(held_out))]


def check_labels(task: Task, index: Index) -> None:
    """Raise ``UserError`` where the labels of ``index`` are not those of ``task``."""
    if task.classes is not None and index.classes != task.classes:
        some = ", ".join(index.vocabulary[:4]) or "none"
        raise UserError(
            f"task '{task.name}' has {task.classes} classes, the data has {index.classes} "
            f"({some}, ...): the label sets do not match. Point data.root or data.shards at the "
            "data of this task, or choose the task that fits"
        )
    found = set(index.vocabulary)
    if task.label_sets and found not in task.label_sets:
        wanted = min(task.label_sets, key=lambda names: len(names ^ found))
        raise UserError(
            f"the labels of the data are not those of task '{task.name}': the data lacks "
            f"{', '.join(sorted(wanted - found)) or 'none'}; the task does not know "
            f"{', '.join(sorted(found - wanted)) or 'none'}. Point data.root or data.shards at the "
            "data of this task, or say task=folder for labels of your own"
        )
    if index.classes < 2:
        raise UserError(f"the data has {index.classes} class(es): a classifier needs two or more")
    unlabelled = int((index.labels_per_clip == 0).sum())
    if not task.multi_label and unlabelled:
        raise UserError(
            f"{unlabelled} of {len(index)} clips have no label, task '{task.name}' wants one each"
        )


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """``{method: {"folds": {fold: metrics}, "mean": {}, "std": {}, "gate": {fold: [L]}}}``."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        entry = found.setdefault(outcome.method, {"folds": {}, "gate": {}})
        entry["folds"][outcome.fold] = outcome.metrics
        if outcome.gate is not None:
            entry["gate"][outcome.fold] = outcome.gate
    for entry in found.values():
        rows = list(entry["folds"].values())
        pairs = {m: summarise([r[m] for r in rows]) for m in METRICS if m in rows[0]}
        entry["mean"] = {m: mean for m, (mean, _) in pairs.items()}
        entry["std"] = {m: std for m, (_, std) in pairs.items()}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Per-fold results and their mean and standard deviation, in percent, as text."""
    lines = []
    for method, entry in results.items():
        names = list(entry["mean"])
        lines.append("".join([f"{method:<12}", *(f"{TITLES[m]:>16}" for m in names)]))
        for fold, row in entry["folds"].items():
            label = f"fold {fold}" if fold.isdigit() else fold
            lines.append("".join([f"  {label:<10}", *(f"{100 * row[m]:>16.2f}" for m in names)]))
        if len(entry["folds"]) > 1:
            pairs = (f"{100 * entry['mean'][m]:.2f} ± {100 * entry['std'][m]:.2f}" for m in names)
            lines.append("".join([f"  {'mean ± std':<10}", *(f"{p:>16}" for p in pairs)]))
        absent = sorted({c for row in entry["folds"].values() for c in row["absent"]})
        if absent:
            lines.append(
                f"  {len(absent)} class(es) without a held-out clip are left out of the means"
            )
    return "\n".join(lines)


def gate_bars(gate: Sequence[float], *, width: int = 40) -> str:
    """A layer gate (L,) as text bars, one block a line."""
    longest = max(gate)
    return "\n".join(
        f"  block {i:>2}  {value:.3f}  {'█' * max(1, round(width * value / longest))}"
        for i, value in enumerate(gate, 1)
    )
