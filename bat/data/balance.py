"""Computes the weights of clips for balanced sampling, from their labels."""

from __future__ import annotations

import numpy as np

from bat.data.index import Index
from bat.errors import UserError


def class_balance(label_ids: np.ndarray, label_ptr: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns weights of ``ids`` for class-balanced sampling (docs/method.md 5): (n,) float64.

    The weight of a class is ``1 / clips that carry it`` (among ``ids``), that of a clip is the mean
    over its labels; a clip without labels has weight zero.

    Args:
        label_ids, label_ptr: labels of all clips of an index, CSR.

    Raises:
        UserError: no clip has a label.
    """
    counts = np.diff(label_ptr)[ids]  # labels of each clip
    if not counts.sum():
        raise UserError("balance=class needs labels, and no clip has any: use balance=none")
    rows = np.repeat(np.arange(len(ids)), counts)
    first = np.cumsum(counts) - counts
    flat = label_ids[np.repeat(label_ptr[ids] - first, counts) + np.arange(len(rows))]
    per_class = np.bincount(flat).astype(np.float64)
    total = np.bincount(rows, weights=1.0 / per_class[flat], minlength=len(ids))
    weights: np.ndarray = total / np.maximum(counts, 1)
    return weights


def first_labels(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns the number of the first label of each of ``ids``, (n,); -1 without a label."""
    found = np.full(len(ids), -1)
    has = index.labels_per_clip[ids] > 0
    found[has] = index.label_ids[index.label_ptr[ids[has]]]
    return found


def first_label_balance(index: Index, ids: np.ndarray) -> np.ndarray:
    """Returns ``1 / (clips of ids with the same first label + 1e-8)``, (n,) float64, as BirdSet is
    sampled; 0 for clips without a label.

    Raises:
        UserError: no clip has a label.
    """
    first = first_labels(index, ids)
    if (first < 0).all():
        raise UserError("balance=first_label needs labels, and no clip has any: balance=none")
    counts = np.bincount(first[first >= 0], minlength=index.classes)
    return np.where(first >= 0, 1.0 / (counts[first] + 1e-8), 0.0)
