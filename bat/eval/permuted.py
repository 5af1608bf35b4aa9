"""Permuted labels: every clip gets the label of another clip, so that only chance is left.

Events and texts are permuted likewise. The result of a probe on them is what the class sizes alone
give. A better one means that held-out clips were seen in training or used for selection.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

import numpy as np

from bat.data.index import Index
from bat.eval.prepare import C, PreparedData
from bat.seeding import derive_seed

T = TypeVar("T")


def permuted(data: PreparedData[C], *, seed: int) -> PreparedData[C]:
    """Returns ``data`` with its labels permuted among the clips; folds and clips are unchanged."""
    if data.events is not None:
        return replace(data, events=_dealt(dict(data.events), seed))
    if data.texts is not None:
        return replace(data, texts=_dealt(data.texts, seed))
    return replace(data, index=permute_labels(data.index, seed=derive_seed(seed, "permuted")))


def _dealt(given: dict[str, T], seed: int) -> dict[str, T]:
    """Returns ``given`` with the values permuted among the keys."""
    values = list(given.values())
    order = np.random.default_rng(derive_seed(seed, "permuted")).permutation(len(values))
    return dict(zip(given, (values[i] for i in order), strict=True))


def permute_labels(index: Index, *, seed: int) -> Index:
    """Returns ``index`` with labels permuted among the clips, by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(index))
    other = copy.copy(index)
    other.__dict__.pop("hash", None)  # the hash covers the labels, too
    counts = index.labels_per_clip[order]
    other.label_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(index.label_ptr.dtype)
    parts = [index.label_ids[index.label_ptr[i] : index.label_ptr[i + 1]] for i in order]
    other.label_ids = np.concatenate(parts).astype(index.label_ids.dtype)
    return other
