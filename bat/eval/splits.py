"""Splits an index into training, validation and held-out clips.

A data set with folds is cross-validated, each fold held out in turn; one with ``train`` and
``test`` splits has a single evaluation. A protocol that selects (a learning rate, a step) does so
on separate validation clips: those of a split ``valid``; the fold after the held-out one, if there
are three or more; else a part of the training clips, drawn evenly over the classes.

Folds and parts are drawn by a seed. A clip of several classes counts for the rarest of them (the
first criterion of Sechidis et al. 2011), so that rare classes are spread evenly. The bits come from
a counter-based generator, the same in every numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bat.config.probing import Protocol
from bat.data.balance import first_labels
from bat.data.draws import philox
from bat.data.index import Index
from bat.errors import UserError
from bat.seeding import derive_seed
from bat.tasks.base import Task
from bat.tasks.folder import split_of

DRAWN_FOLDS = 5
"""Number of folds drawn for custom data that has neither folds nor splits."""
SHOWN, MANY = 5, 10
"""Most classes and most folds that a message names."""


@dataclass(frozen=True)
class Split:
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

    @property
    def in_words(self) -> str:
        return "the split" if self.name == "test" else f"fold {self.name}"


def make_splits(
    index: Index,
    folds: Sequence[int] | None = None,
    *,
    protocol: Protocol | None = None,
    seed: int = 0,
    multi_label: bool = False,
    draw: int = 0,
    split: str = "auto",
    shots: int | None = None,
    clip_seconds: float = 0.0,
) -> list[Split]:
    """Returns the folds or splits of ``index``, in order.

    Args:
        folds: some of its folds (None: all).
        protocol: decides whether validation clips are kept out; None: they are not.
        seed: of what is drawn: folds, and parts of the training clips.
        multi_label: clips may carry several labels, or none.
        draw: folds to draw if the data has neither folds nor splits: at most so many, no more
            than the rarest class has clips (single label); 0: such data is an error.
        split: split to train on if there are splits (several: ``a,b``); ``auto``: ``train``.
        shots: training clips of each class at most, see ``few_shots``; None: all.
        clip_seconds: length up to which ``shots`` prefers clips.

    Raises:
        UserError: nothing to hold out, a fold or split that does not exist, a class with a single
            clip, nothing to keep for validation.
    """
    if split != "auto" and not index.splits:
        raise UserError(
            f"data.split={split}: the data has no splits{' but folds' * bool(index.folds)}: say "
            "data.split=auto"
        )
    selects = protocol is not None and protocol.selection == "validation"
    if index.folds and split == "auto":
        if len(index.folds) < 2:
            raise UserError(
                f"all clips are in fold {index.folds[0]}: two folds are needed; give some clips "
                "another fold, or remove the column"
            )
        splits = _by_fold(index.fold, folds, selects=selects)
    elif draw and not index.splits:
        fold = _draw_folds(index, draw, seed=seed, multi_label=multi_label)
        splits = [replace(held, drawn=True) for held in _by_fold(fold, folds, selects=selects)]
    elif folds is not None:
        raise UserError(f"folds={list(folds)}: the data has no folds; omit folds")
    else:
        splits = [_by_split(index, split, selects=selects)]
    if shots is not None:
        few = functools.partial(few_shots, index, shots=shots, clip_seconds=clip_seconds, seed=seed)
        splits = [replace(held, train=few(held.train)) for held in splits]
    if protocol is None or not selects:
        return splits
    if protocol.fraction != Protocol().fraction and all(r.valid is not None for r in splits):
        raise UserError(
            f"protocol.fraction={protocol.fraction}: nothing is kept out of the training clips, "
            f"for values are selected on a {splits[0].valid_is} of the data; omit it"
        )
    return [
        held if held.valid is not None else _with_part(index, held, protocol.fraction, seed)
        for held in splits
    ]


def _by_fold(fold: np.ndarray, wanted: Sequence[int] | None, *, selects: bool) -> list[Split]:
    """Returns a fold for each of ``wanted`` (None: all); ``fold``: (n,), -1 for clips in none."""
    known = np.unique(fold[fold >= 0]).tolist()
    wanted = known if wanted is None else list(dict.fromkeys(wanted))
    if not wanted:
        raise UserError(f"folds=[] holds nothing out: folds are {known}")
    splits = []
    for name in wanted:
        if name not in known:
            raise UserError(f"no clip has fold {name}: folds are {known}")
        held = Split(
            str(name),
            train=np.flatnonzero((fold != name) & (fold >= 0)),
            test=np.flatnonzero(fold == name),
        )
        if selects and len(known) >= 3:
            valid = np.flatnonzero(fold == known[(known.index(name) + 1) % len(known)])
            train = np.setdiff1d(held.train, valid)
            held = replace(held, train=train, valid=valid, valid_is="fold")
        splits.append(held)
    return splits


def _by_split(index: Index, split: str, *, selects: bool) -> Split:
    named: dict[str, str] = {}  # the split that means train, test, valid
    for name in index.splits:
        meaning = split_of(name)
        if meaning == name or meaning not in named:  # that very name takes precedence
            named[meaning] = name
    train = named.get("train") if split == "auto" else split
    if "test" not in named or train is None:
        given = f" ({index.counted_splits()})" if index.splits else ""
        more = ", or say which split to train on: data.split=NAME" if "test" in named else ""
        raise UserError(
            f"the data has neither folds nor a train and a test split{given}, so nothing can be "
            f"held out: give a column fold (from 1) or split (train, test) to bat-shard{more}"
        )
    for part in train.split(","):
        if split_of(part.strip()) in ("test", "valid", "all"):
            raise UserError(
                f"data.split={split} would train on {part.strip()!r}, which is held out: name the "
                f"training split ({index.counted_splits()})"
            )
    of = index.clips_in_split
    held = Split("test", train=of(train), test=of(named["test"]))
    if selects and "valid" in named:
        return replace(held, valid=of(named["valid"]), valid_is="split")
    return held


def _with_part(index: Index, held: Split, fraction: float, seed: int) -> Split:
    """Returns ``held`` with ``fraction`` of its training clips kept out for validation, balanced
    over classes, at least one clip; one clip of each class always stays in training."""
    order = _even_order(index, held.train, seed=derive_seed(seed, held.name, "valid"))
    strata = _strata(index)[order]
    free = order[1:][strata[1:] == strata[:-1]]  # all but the first of each class
    wanted = min(max(1, round(fraction * len(order))), len(free))
    if not wanted:
        raise UserError(
            f"{held.in_words} has {len(held.train)} training clip(s), one a class: none can be "
            "kept out for validation; say protocol=bat, which selects nothing"
        )
    places = (np.arange(wanted) * len(free) + len(free) // 2) // wanted
    valid = np.sort(free[places])
    train = np.setdiff1d(held.train, valid)
    return replace(held, train=train, valid=valid, valid_is="part")


def few_shots(
    index: Index, ids: np.ndarray, shots: int, *, clip_seconds: float, seed: int
) -> np.ndarray:
    """Returns at most ``shots`` of ``ids`` for each class, ascending.

    A clip counts for its first label. They are drawn by ``seed``, but clips of at most
    ``clip_seconds`` come before longer ones; clips without a label are left out.
    """
    first = first_labels(index, ids)
    long = index.frames[ids] > np.ceil(clip_seconds * index.rate[ids])
    bits = philox(derive_seed(seed, "shots"), 0, 0).random_raw(len(ids))
    order = np.lexsort((bits, long, first))
    ordered = first[order]
    rank = np.arange(len(ids)) - np.searchsorted(ordered, ordered)  # within its class
    return np.sort(ids[order[(rank < shots) & (ordered >= 0)]])


def _draw_folds(index: Index, folds: int, *, seed: int, multi_label: bool) -> np.ndarray:
    """Returns folds from 1 on, (n,), balanced in clips and in each class; at most ``folds``.

    With one label per clip there are no more folds than the rarest class has clips, so that every
    fold has a held-out clip of it; with several, at least two clips per fold. Raises ``UserError``
    if that makes fewer than two folds.
    """
    counts = np.bincount(index.label_ids, minlength=max(1, index.classes))
    counts[counts == 0] = len(index)  # classes that do not occur
    rarest = int(counts.argmin())
    least = len(index) // 2 if multi_label else int(counts[rarest])
    if least < 2:
        few = f"class {index.vocabulary[rarest]!r} has a single clip"
        raise UserError(
            f"{f'the data have {len(index)} clips' if multi_label else few}, so no folds can be "
            "drawn: add clips, remove the class, or give a column fold or split"
        )
    order = _even_order(index, np.arange(len(index)), seed=derive_seed(seed, "folds"))
    drawn = np.empty(len(index), np.int64)
    drawn[order] = np.arange(len(index)) % min(folds, least) + 1
    return drawn


def _even_order(index: Index, ids: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns ``ids`` class by class, the rarest first, each class shuffled."""
    bits = philox(seed, 0, 0).random_raw(len(ids))
    return ids[np.lexsort((bits, _strata(index)[ids]))]


def _strata(index: Index) -> np.ndarray:
    """Returns the rarest class of each clip, (n,), numbered from the rarest; C without label."""
    counts = np.bincount(index.label_ids, minlength=index.classes)
    rank = np.empty(index.classes, np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(index.classes)
    strata = np.full(len(index), index.classes, np.int64)
    owner = np.repeat(np.arange(len(index)), index.labels_per_clip)
    np.minimum.at(strata, owner, rank[index.label_ids])
    return strata


def how(splits: Sequence[Split], protocol: Protocol | None = None) -> str:
    """Describes how the results were obtained, in one sentence without a full stop."""
    first = splits[0]
    if first.name == "test":
        evaluated = "evaluated on the clips of the test split"
    else:
        names = ", ".join(held.name for held in splits)
        names = names if len(splits) <= MANY else f"{len(splits)} folds"
        whose = "drawn here, evenly over the classes" if first.drawn else "the data's own"
        evaluated = f"evaluated on each held-out fold in turn ({names}; folds {whose})"
    if protocol is None or protocol.selection == "none":
        return f"weights after the last step, {evaluated}; nothing was selected on them"
    where = {
        "split": "the clips of the split valid",
        "fold": "the fold after the held-out one",
        "part": f"{100 * protocol.fraction:g} % of the training clips",
    }[first.valid_is]
    most = max(len(protocol.lrs), len(protocol.prototype_lrs))
    selected = ["learning rate"] if most > 1 or protocol.sobol > 1 else []
    selected += ["weight decay"] if len(protocol.weight_decays) > 1 else []
    selected += ["step"] if protocol.look_every else []
    if not selected:
        return (
            f"weights after the last step, {evaluated}; {where} took no part in training, and "
            "nothing was selected"
        )
    by = " by the first seed" if protocol.search == "first" else ""
    return (
        f"{' and '.join(selected)} selected{by} on {where}, which took no part in training; "
        f"{evaluated}, once"
    )


def check_splits(
    splits: Sequence[Split], index: Index, *, multi_label: bool, labelled: bool = True
) -> list[str]:
    """Returns lines about classes that some fold cannot evaluate or learn.

    Raises ``UserError`` if a result would be meaningless: a fold without training, validation or
    held-out clips, or with a single held-out one, with one class to train on, or (one label per
    clip) with held-out clips of a class that has no training clip. Without labels (``labelled``)
    only the numbers of clips are checked.
    """
    unlearned: dict[str, str] = {}
    absent: dict[str, str] = {}
    in_validation = False
    for held in splits:
        kinds = {"training": held.train, "held-out": held.test, "validation": held.valid}
        for kind, ids in kinds.items():
            if ids is not None and not len(ids):
                raise UserError(f"{held.in_words} has no {kind} clips: add some, or make it part "
                                "of another fold or split")  # fmt: skip
        if len(held.test) < 2:
            raise UserError(
                f"{held.in_words} has a single held-out clip, of which a score says nothing: give "
                "it more clips, or make fewer folds"
            )
        if not labelled:
            continue
        train, test = _classes(index, held.train), _classes(index, held.test)
        if train.sum() < 2:
            raise UserError(
                f"{held.in_words} has training clips of {int(train.sum())} class(es), two or more "
                "are needed: deal the clips to folds or splits anew"
            )
        for c in np.flatnonzero(test & ~train):
            if not unlearned and held.valid is not None:
                in_validation = bool(_classes(index, held.valid)[c])
            unlearned.setdefault(index.vocabulary[c], held.in_words)
        for c in np.flatnonzero(~test):
            absent.setdefault(index.vocabulary[c], held.in_words)
    if unlearned and not multi_label:
        name, where = next(iter(unlearned.items()))
        more = f" (and {len(unlearned) - 1} more classes)" if len(unlearned) > 1 else ""
        remedy = "deal its clips to two folds or more (or to the split train too), or remove it"
        if in_validation:
            remedy = (
                "its other clips are those for validation. Deal them to three folds or more (or to "
                "the split train too), or say protocol=bat, which selects nothing"
            )
        raise UserError(
            f"class {name!r} has held-out clips, but no training clip, in {where}{more}: {remedy}"
        )
    lines = {
        "no training clip where they are held out, so chance at best": unlearned,
        "no held-out clip, so left out of that mean": absent,
    }
    return [f"{said}: {_some(found)}" for said, found in lines.items() if found]


def _some(where: dict[str, str]) -> str:
    """Formats names and folds: ``'dog' (fold 1), ... and 3 more``."""
    shown = [f"{name!r} ({held})" for name, held in list(where.items())[:SHOWN]]
    more = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
    return ", ".join(shown) + more


def _classes(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns a mask (C,) of the classes that clips ``ids`` have."""
    owner = np.repeat(np.arange(len(index)), index.labels_per_clip)
    labels = index.label_ids[np.isin(owner, ids)]
    return np.bincount(labels, minlength=index.classes) > 0


def check_labels(task: Task, index: Index) -> None:
    """Raise ``UserError`` if the labels of ``index`` are not those of ``task``."""
    remedy = "Point data.root or data.shards at the data of this task, or choose the task that fits"
    if task.classes is not None and index.classes != task.classes:
        some = ", ".join(index.vocabulary[:4]) or "none"
        raise UserError(
            f"task '{task.name}' has {task.classes} classes, the data has {index.classes} "
            f"({some}, ...): the label sets do not match. {remedy}"
        )
    found = set(index.vocabulary)
    if task.label_sets and found not in task.label_sets:
        wanted = min(task.label_sets, key=lambda names: len(names ^ found))
        raise UserError(
            f"the labels of the data are not those of task '{task.name}': the data lacks "
            f"{', '.join(sorted(wanted - found)) or 'none'}; the task does not know "
            f"{', '.join(sorted(found - wanted)) or 'none'}. {remedy} (task=folder: any labels)"
        )
    if index.classes < 2:
        raise UserError(f"the data has {index.classes} class(es): a classifier needs two or more")
    unlabelled = int((index.labels_per_clip == 0).sum())
    if not task.multi_label and unlabelled:
        first = index.key(int(np.argmin(index.labels_per_clip)))
        raise UserError(
            f"{unlabelled} of {len(index)} clips have no label (the first: {first}), task "
            f"'{task.name}' wants one each: label them, or leave them out"
        )
