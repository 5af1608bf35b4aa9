"""What is trained on, what is chosen on and what is held out: rounds.

A data set with folds is cross-validated, each fold held out in turn; one with ``train`` and
``test`` splits has a single round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bat.data.index import Index
from bat.shapes import UserError
from bat.tasks.base import Task


@dataclass(frozen=True)
class Round:
    """One training and what it is judged on: clip ids of an index."""

    name: str
    """The held-out fold's number, or ``test``."""
    train: np.ndarray
    test: np.ndarray
    valid: np.ndarray | None = None
    """Clips that values are chosen on: none of ``train``, none of ``test``. None: nothing is."""


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
