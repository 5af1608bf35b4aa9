"""Converts texts to token targets for CTC, and outputs back to tokens.

Output 0 is the blank, the others are the tokens that occur in training texts, sorted. Tokens that
occur only in other texts are numbered after them: no output stands for them, so they always count
as errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bat.data.tar import escape_key
from bat.nn.losses import NOTHING
from bat.types import WaveBatch

BLANK = "<blank>"
Kind = Literal["characters", "words"]


def tokens_of(text: str, kind: Kind) -> list[str]:
    """Splits ``text`` into its characters, or into words at blanks."""
    return list(text) if kind == "characters" else text.split()


def outputs(texts: Iterable[str], kind: Kind) -> list[str]:
    """Returns the names of a head's outputs: the blank, then the tokens of training ``texts``."""
    return [BLANK, *sorted({token for text in texts for token in tokens_of(text, kind)})]


def digest_texts(texts: Mapping[str, str]) -> str:
    """Returns a hash over keys and texts."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def steps_needed(tokens: Sequence[object]) -> int:
    """Returns the time patches that CTC needs: one per token, and one between two equal ones."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def greedy(best: Sequence[int]) -> list[int]:
    """Decodes the best output of each time patch: repeats merged, blanks removed."""
    changed = [n for i, n in enumerate(best) if not i or n != best[i - 1]]
    return [n for n in changed if n]


class TokenTargets:
    """Callable ``targets_of(batch, patches)`` for texts: (B, U) int64, U the longest.

    ``texts`` by key; ``labels``: the names of the outputs.
    """

    def __init__(self, texts: Mapping[str, str], *, labels: Sequence[str], kind: Kind) -> None:
        cut = {escape_key(key): tokens_of(text, kind) for key, text in texts.items()}
        others = {token for tokens in cut.values() for token in tokens} - set(labels)
        self.names = [*labels, *sorted(others)]
        self.joiner = "" if kind == "characters" else " "
        number = {name: i for i, name in enumerate(self.names)}
        self._numbers = {
            key: np.array([number[token] for token in tokens], np.int64)
            for key, tokens in cut.items()
        }
        self._longest = max(map(len, self._numbers.values()), default=0)
        self.digest = digest_texts({"": "\n".join([kind, *labels]), **texts})
        """Digest of all that stored targets depend on; an edited text has another one."""

    def __call__(self, batch: WaveBatch, patches: int) -> Tensor:
        made = np.full((len(batch.keys), self._longest), NOTHING, np.int64)
        for row, key in zip(made, batch.keys, strict=True):
            row[: len(self._numbers[key])] = self._numbers[key]
        return torch.from_numpy(made)

    def too_long(self, key: str, patches: int) -> bool:
        """Return True if the text of clip ``key`` does not fit into ``patches`` time patches."""
        return steps_needed(self._numbers[key].tolist()) > patches
