"""Splits an index into training, validation and held-out clips.

A data set with folds is cross-validated, each fold held out in turn; one with ``train`` and
``test`` splits has a single evaluation. A protocol that selects (a learning rate, a step) does so
on separate validation clips: those of a split ``valid``; the fold after the held-out one, if there
are three or more; else a part of the training clips, drawn evenly over the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bat.config.probing import Protocol
from bat.data.index import Index
from bat.errors import UserError
from bat.eval.sampling import draw_folds, draw_part
from bat.seeding import derive_seed
from bat.tasks.base import Task
from bat.tasks.folder import split_of

DRAWN_FOLDS = 5
"""Number of folds drawn for custom data that has neither folds nor splits."""
SHOWN, MANY = 5, 10
"""Most classes and most folds that a message names."""


@dataclass(frozen=True)
class Round:
    """A fold or split: the clip ids for one training and its evaluation."""

    name: str
    """Number of the held-out fold, or ``test``."""
    train: np.ndarray
    test: np.ndarray
    valid: np.ndarray | None = None
    """Validation clips, disjoint from ``train`` and ``test``; None: nothing is selected."""
    valid_is: Literal["", "split", "fold", "part"] = ""
    """Source of ``valid``."""
    drawn: bool = False
    """True if the fold was drawn because the data names none."""


def make_rounds(
    index: Index,
    folds: Sequence[int] | None = None,
    *,
    protocol: Protocol | None = None,
    seed: int = 0,
    multi_label: bool = False,
    draw: int = 0,
    split: str = "auto",
) -> list[Round]:
    """Returns the folds or splits of ``index``, in order.

    Args:
        folds: some of its folds (None: all).
        protocol: decides whether validation clips are kept out; None: they are not.
        seed: of what is drawn: folds, and parts of the training clips.
        multi_label: clips may carry several labels, or none.
        draw: folds to draw if the data has neither folds nor splits: at most so many, no more
            than the rarest class has clips (single label); 0: such data is an error.
        split: split to train on if there are splits (several: ``a,b``); ``auto``: ``train``.

    Raises:
        UserError: nothing to hold out, a fold or split that does not exist, a class with a single
            clip, nothing to keep for validation.
    """
    if split != "auto" and not index.splits:
        raise UserError(
            f"data.split={split}: the data has no splits{' but folds' * bool(index.folds)}: say "
            "data.split=auto, or give the shards or the folder that have them"
        )
    keep = protocol is not None and protocol.selection == "validation"
    if index.folds and split == "auto":
        if len(index.folds) < 2:
            raise UserError(f"all clips are in fold {index.folds[0]}: two folds are needed")
        rounds = _by_fold(index.fold, folds, keep=keep)
    elif draw and not index.splits:
        drawn = draw_folds(index, draw, seed=seed, multi_label=multi_label)
        rounds = _by_fold(drawn, folds, keep=keep, drawn=True)
    else:
        if folds is not None:
            raise UserError(f"folds={list(folds)}: the data has no folds; leave folds away")
        rounds = [_by_split(index, split, keep=keep)]
    if protocol is None or not keep:
        return rounds
    if protocol.fraction != Protocol().fraction and all(r.valid is not None for r in rounds):
        raise UserError(
            f"protocol.fraction={protocol.fraction}: nothing is kept out of the training clips, "
            f"for values are chosen on a {rounds[0].valid_is} of the data; leave it away"
        )
    return [
        held
        if held.valid is not None
        else _with_part(index, held, protocol.fraction, seed=derive_seed(seed, held.name, "valid"))
        for held in rounds
    ]


def _by_fold(
    fold: np.ndarray, chosen: Sequence[int] | None, *, keep: bool, drawn: bool = False
) -> list[Round]:
    """Returns a fold for each of ``chosen`` (None: all); ``fold``: (n,), -1 for clips in none."""
    known = np.unique(fold[fold >= 0]).tolist()
    chosen = known if chosen is None else list(dict.fromkeys(chosen))
    if not chosen:
        raise UserError(f"folds=[] holds nothing out: folds are {known}")
    rounds = []
    for name in chosen:
        if name not in known:
            raise UserError(f"no clip has fold {name}: folds are {known}")
        test, train = fold == name, (fold != name) & (fold >= 0)
        valid = None
        if keep and len(known) >= 3:
            after = known[(known.index(name) + 1) % len(known)]
            valid = np.flatnonzero(fold == after)
            train &= fold != after
        rounds.append(
            Round(
                str(name),
                np.flatnonzero(train),
                np.flatnonzero(test),
                valid,
                "" if valid is None else "fold",
                drawn,
            )
        )
    return rounds


def _by_split(index: Index, split: str, *, keep: bool) -> Round:
    def called(wanted: str) -> str | None:
        """Returns the split that means ``wanted``; that very name takes precedence."""
        return next((s for s in [wanted, *index.splits] if s in index.splits
                     and split_of(s) == wanted), None)  # fmt: skip

    train, test, valid = called("train"), called("test"), called("valid")
    train = train if split == "auto" else split
    if test is None or train is None:
        given = f" ({index.counted_splits()})" if index.splits else ""
        raise UserError(
            f"the data has neither folds nor a train and a test split{given}, so nothing can be "
            "held out: give a column fold (from 1) or split (train, test) to bat-shard"
            + (", or say which split to train on: data.split=NAME" if test is not None else "")
        )
    held = [part for part in train.split(",") if split_of(part.strip()) in ("test", "valid", "all")]
    if held:
        raise UserError(
            f"data.split={split} would train on {held[0].strip()!r}, which is held out: name the "
            f"training split ({index.counted_splits()})"
        )
    of = index.clips_in_split
    if keep and valid is not None:
        return Round("test", of(train), of(test), of(valid), "split")
    return Round("test", of(train), of(test))


def _with_part(index: Index, held: Round, fraction: float, *, seed: int) -> Round:
    """Returns ``held`` with a part of its training clips kept out for validation."""
    valid = draw_part(index, held.train, fraction, seed=seed)
    if not len(valid):
        raise UserError(
            f"{_round(held)} has {len(held.train)} training clip(s), one a class: none can be kept "
            "out to choose on; say protocol=bat, which chooses nothing"
        )
    train = np.setdiff1d(held.train, valid)
    return Round(held.name, train, held.test, valid, "part", held.drawn)


def how(rounds: Sequence[Round], protocol: Protocol | None = None) -> str:
    """Describes how the results were obtained, in one sentence without a full stop."""
    first = rounds[0]
    if first.name == "test":
        judged = "judged on the clips of the test split"
    else:
        names = ", ".join(held.name for held in rounds)
        names = names if len(rounds) <= MANY else f"{len(rounds)} folds"
        whose = "drawn here, evenly over the classes" if first.drawn else "the data's own"
        judged = f"judged on each held-out fold in turn ({names}; folds {whose})"
    if protocol is None or protocol.selection == "none":
        return f"weights after the last step, {judged}; nothing was selected on them"
    where = {
        "split": "the clips of the split valid",
        "fold": "the fold after the held-out one",
        "part": f"{100 * protocol.fraction:g} % of the training clips",
    }[first.valid_is]
    chosen = " and ".join(_chosen(protocol))
    if not chosen:
        return (
            f"weights after the last step, {judged}; {where} took no part in training, and nothing "
            "was selected"
        )
    by = " by the first seed" if protocol.search == "first" else ""
    return f"{chosen} chosen{by} on {where}, which took no part in training; {judged}, once"


def _chosen(protocol: Protocol) -> list[str]:
    """Returns what a protocol with validation selects."""
    most = max(len(protocol.lrs), len(protocol.prototype_lrs))
    return [
        what
        for what, several in (
            ("learning rate", most > 1 or protocol.sobol > 1),
            ("weight decay", len(protocol.weight_decays) > 1),
            ("step", protocol.look_every > 0),
        )
        if several
    ]


def check_rounds(
    rounds: Sequence[Round], index: Index, *, multi_label: bool, labelled: bool = True
) -> list[str]:
    """Returns lines about classes that some fold cannot evaluate or learn.

    Raises ``UserError`` if a result would be meaningless: a fold without training, validation or
    held-out clips, or with a single held-out one, with one class to train on, or (one label per
    clip) with held-out clips of a class that has no training clip. Without labels (``labelled``)
    only the numbers of clips are checked.
    """
    unlearned: dict[str, str] = {}
    unjudged: dict[str, str] = {}
    taken: set[str] = set()
    for held in rounds:
        kinds = {"training": held.train, "held-out": held.test, "validation": held.valid}
        for what, ids in kinds.items():
            if ids is not None and not len(ids):
                raise UserError(f"{_round(held)} has no {what} clips: {_REMEDY[what]}")
        if len(held.test) < 2:
            raise UserError(
                f"{_round(held)} has a single held-out clip, of which a score says nothing: give "
                "it more clips, or make fewer folds"
            )
        if not labelled:
            continue
        train, test = _classes(index, held.train), _classes(index, held.test)
        if train.sum() < 2:
            raise UserError(
                f"{_round(held)} has training clips of {int(train.sum())} class(es), two or more "
                "are needed: deal the clips to folds or splits anew"
            )
        for c in np.flatnonzero(test & ~train):
            unlearned.setdefault(index.vocabulary[c], _round(held))
            if held.valid is not None and _classes(index, held.valid)[c]:
                taken.add(index.vocabulary[c])
        for c in np.flatnonzero(~test):
            unjudged.setdefault(index.vocabulary[c], _round(held))
    if unlearned and not multi_label:
        name, where = next(iter(unlearned.items()))
        remedy = "deal its clips to two folds or more (or to the split train too), or remove it"
        if name in taken:
            remedy = (
                "its other clips are those kept out to choose on. Deal them to three folds or "
                "more (or to the split train too), or say protocol=bat, which chooses nothing"
            )
        more = f" (and {len(unlearned) - 1} more classes)" if len(unlearned) > 1 else ""
        raise UserError(
            f"class {name!r} has held-out clips, but no training clip, in {where}{more}: {remedy}"
        )
    said = []
    if unlearned:
        said.append(
            f"no training clip where they are held out, so chance at best: {_some(unlearned)}"
        )
    if unjudged:
        said.append(f"no held-out clip, so left out of that mean: {_some(unjudged)}")
    return said


_REMEDY = {
    "training": "make fewer folds, or add clips",
    "held-out": "add clips to it, or remove it",
    "validation": "add clips to it, or say protocol=bat, which chooses nothing",
}


def _round(held: Round) -> str:
    return "the only round" if held.name == "test" else f"the round of fold {held.name}"


def _some(where: dict[str, str]) -> str:
    """Formats names and folds: ``'dog' (the round of fold 1), ... and 3 more``."""
    shown = [f"{name!r} ({held})" for name, held in list(where.items())[:SHOWN]]
    more = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
    return ", ".join(shown) + more


def _classes(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns a mask (C,) of the classes that clips ``ids`` have."""
    chosen = np.zeros(len(index), bool)
    chosen[ids] = True
    owner = np.repeat(np.arange(len(index)), index.labels_per_clip)
    return np.bincount(index.label_ids[chosen[owner]], minlength=index.classes) > 0


def check_labels(task: Task, index: Index) -> None:
    """Raise ``UserError`` if the labels of ``index`` are not those of ``task``."""
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
            f"{unlabelled} of {len(index)} clips have no label (the first: "
            f"{index.key(int(np.argmin(index.labels_per_clip)))}), task '{task.name}' wants one "
            "each: label them, or leave them out"
        )
