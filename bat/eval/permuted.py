"""The control of permuted labels: every clip has another clip's, so that only chance is left.

Events and texts are dealt anew likewise. What a probe reaches on them is what it reaches by the
sizes of the classes alone. Better than that means that held-out clips were seen in training, or
chosen on.
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
    """``data`` with its labels dealt anew among the clips; rounds and clips stay."""
    if data.events is not None:
        return replace(data, events=_dealt(dict(data.events), seed))
    if data.texts is not None:
        return replace(data, texts=_dealt(data.texts, seed))
    return replace(data, index=permute_labels(data.index, seed=derive_seed(seed, "permuted")))


def _dealt(given: dict[str, T], seed: int) -> dict[str, T]:
    """``given`` with the values dealt anew among the keys."""
    values = list(given.values())
    order = np.random.default_rng(derive_seed(seed, "permuted")).permutation(len(values))
    return dict(zip(given, (values[i] for i in order), strict=True))


def permute_labels(index: Index, *, seed: int) -> Index:
    """``index`` with the labels of each clip given to another, by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(index))
    other = copy.copy(index)
    other.__dict__.pop("hash", None)  # of the labels, too
    counts = index.labels_per_clip[order]
    other.label_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(index.label_ptr.dtype)
    parts = [index.label_ids[index.label_ptr[i] : index.label_ptr[i + 1]] for i in order]
    other.label_ids = np.concatenate(parts).astype(index.label_ids.dtype)
    return other
