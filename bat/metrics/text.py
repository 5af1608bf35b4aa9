"""Computes error rates of token sequences: token, word and character error rate.

    rate = edits / length of the references, both summed over all clips

Edits are the fewest substitutions, insertions and deletions that turn the prediction into the
reference (Levenshtein distance). Words and characters are those of the joined tokens; spaces count
as characters. A rate can be above 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bat.metrics.base import Counted, Value


def edits(predicted: Sequence[Hashable], true: Sequence[Hashable]) -> int:
    """Returns the Levenshtein distance of two sequences."""
    number: dict[Hashable, int] = {}
    a, b = ([number.setdefault(x, len(number)) for x in part] for part in (predicted, true))
    target, steps = np.array(b, np.int64), np.arange(len(b) + 1)
    row = steps.copy()  # distances of the read part of ``a`` to each prefix of ``b``
    for symbol in a:
        new = row + 1
        np.minimum(new[1:], row[:-1] + (target != symbol), out=new[1:])
        row = np.minimum.accumulate(new - steps) + steps  # insertions, from left to right
    return int(row[-1])


def align(predicted: Sequence[str], true: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Returns pairs (true, predicted) of an alignment with the fewest edits, from left to right.

    A pair of two different ones is a substitution; None as the first an insertion, as the second a
    deletion. Of equally good alignments the one with most substitutions is taken, from the end.
    """
    n, m = len(true), len(predicted)
    cost = np.zeros((n + 1, m + 1), np.int64)
    cost[:, 0], cost[0] = np.arange(n + 1), np.arange(m + 1)
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            differs = int(true[i - 1] != predicted[j - 1])
            cost[i, j] = min(cost[i - 1, j - 1] + differs, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    pairs: list[tuple[str | None, str | None]] = []
    i, j = n, m
    while i or j:
        both = i > 0 and j > 0
        if both and cost[i, j] == cost[i - 1, j - 1] + (true[i - 1] != predicted[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((true[i], predicted[j]))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append((true[i], None))
        else:
            j -= 1
            pairs.append((None, predicted[j]))
    return pairs[::-1]


def _rate(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the error rate of counts (R, 2), edits and lengths -> (R,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts[:, 1] > 0, counts[:, 0] / counts[:, 1], math.nan)


class Text(Counted):
    """Text metrics; ``update(predicted, true)``: tokens of one clip, joined by ``joiner``."""

    takes: ClassVar = "tokens"
    values: ClassVar = {
        "token_error_rate": Value("token error rate", better="lower", most=math.inf),
        "wer": Value("word error rate", better="lower", most=math.inf),
        "cer": Value("character error rate", better="lower", most=math.inf),
    }
    ratios: ClassVar = {"token_error_rate": _rate, "wer": _rate, "cer": _rate}

    def __init__(self, *, joiner: str = "") -> None:
        super().__init__()
        self.joiner = joiner

    def update(self, predicted: Sequence[str], true: Sequence[str]) -> None:
        texts = self.joiner.join(predicted), self.joiner.join(true)
        pairs: dict[str, tuple[Sequence[str], Sequence[str]]] = {
            "token_error_rate": (predicted, true),
            "wer": (texts[0].split(), texts[1].split()),
            "cer": texts,
        }
        for name, (ours, theirs) in pairs.items():
            self.counts[name].append(np.array([edits(ours, theirs), len(theirs)], float))


METRICS = (Text,)
