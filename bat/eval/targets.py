"""Makes targets of time patches: frame labels from events, tokens from texts.

Frame labels (docs/method.md 5, ``dcase16``): patch t stands for its start, ``t x hop``; a class is
active if that time lies in ``[onset, offset]`` of one of its events. Patches that start at or
beyond a clip's end are NaN, which loss and metrics leave out.

Tokens, for CTC: output 0 is the blank, the others are the task's symbols, or the tokens that occur
in training texts, sorted. Tokens that occur only in other texts are numbered after them: no output
stands for them, so they always count as errors.
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
from bat.data.windows import Window
from bat.errors import UserError
from bat.nn.losses import NOTHING
from bat.tasks import events as listed
from bat.tasks.base import Task
from bat.tasks.events import Events
from bat.types import WaveBatch

SLACK_SECONDS = 1e-6
"""Tolerance for floating-point products: 0.48 s is patch 3 of 160 ms."""
BLANK = "<blank>"
Kind = Literal["characters", "words"]


class FrameTargets:
    """Callable ``targets_of(batch, patches)`` for events: (B, T, C) float32.

    ``labels``: class names in the order of their indices; ``patch_hop_ms`` and ``sample_rate`` are
    the encoder's. ``places``: of windows by key; other waves must begin where their recordings do:
    no roll, no random crop or offset.
    """

    def __init__(
        self,
        events: Events,
        *,
        labels: Sequence[str],
        patch_hop_ms: float,
        sample_rate: int,
        places: Mapping[str, Window] | None = None,
    ) -> None:
        self.classes, self.hop_seconds = len(labels), patch_hop_ms / 1000
        self.sample_rate, self.places = sample_rate, places or {}
        self.missed = 0
        """Number of events between the starts of two patches, which no patch's label contains."""
        number = {name: i for i, name in enumerate(labels)}
        self._events: dict[str, list[tuple[float, float, int]]] = {}
        self._spans: dict[str, list[tuple[int, int, int]]] = {}  # first and last patch, class
        for name, found in events.items():
            key = escape_key(name)
            if key in self._spans:
                raise UserError(f"two recordings have the key {key}: give them shorter paths")
            self._events[key], self._spans[key] = [], []
            for onset, offset, names, _ in found:
                first = int(np.ceil((onset - SLACK_SECONDS) / self.hop_seconds))
                last = int(np.floor((offset + SLACK_SECONDS) / self.hop_seconds))
                self.missed += last < first
                self._events[key] += [(onset, offset, number[label]) for label in names]
                self._spans[key] += [(max(first, 0), last, number[label]) for label in names]
        said = f"{listed.digest(events)} {list(labels)} {patch_hop_ms} {sample_rate}"
        self.digest = hashlib.sha256(said.encode()).hexdigest()
        """Digest of all that stored targets depend on; an edited CSV has another one."""

    def reference(self, key: str) -> list[tuple[float, float, int]]:
        """Returns ``(onset_seconds, offset_seconds, class)`` of the events of clip ``key``."""
        return self._events[key]

    def __call__(self, batch: WaveBatch, patches: int) -> Tensor:
        targets = torch.zeros(len(batch.keys), patches, self.classes)
        for row, key in zip(targets, batch.keys, strict=True):
            name, start = self.places.get(key, Window(key, 0.0))
            before = round(start / self.hop_seconds)  # patches of the recording before this window
            for first, last, label in self._spans[name]:
                row[max(first - before, 0) : max(last + 1 - before, 0), label] = 1.0
        starts = torch.arange(patches, dtype=torch.float64) * self.hop_seconds  # (T,)
        ends = batch.lengths.cpu().double() / self.sample_rate  # (B,)
        beyond = starts >= ends[:, None] - SLACK_SECONDS  # (B, T)
        return targets.masked_fill_(beyond[..., None], torch.nan)


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
        self._numbers = {key: [number[token] for token in tokens] for key, tokens in cut.items()}
        self._longest = max(map(len, self._numbers.values()), default=0)
        self.digest = digest_texts({"": "\n".join([kind, *labels]), **texts})
        """Digest of all that stored targets depend on; an edited text has another one."""

    def __call__(self, batch: WaveBatch, patches: int) -> Tensor:
        made = np.full((len(batch.keys), self._longest), NOTHING, np.int64)
        for row, key in zip(made, batch.keys, strict=True):
            row[: len(self._numbers[key])] = self._numbers[key]
        return torch.from_numpy(made)

    def too_long(self, key: str, outputs: int) -> bool:
        """Return True if the text of clip ``key`` does not fit into ``outputs`` steps of CTC."""
        return steps_needed(self._numbers[key]) > outputs

    def is_empty(self, key: str) -> bool:
        """Return True if the text of clip ``key`` has no token."""
        return not self._numbers[key]


def tokens_of(text: str, kind: Kind) -> list[str]:
    """Splits ``text`` into its characters, or into words at blanks."""
    return list(text) if kind == "characters" else text.split()


def outputs(texts: Iterable[str], task: Task) -> list[str]:
    """Returns the names of a head's outputs: the blank, then the symbols of ``task``, or the tokens
    of training ``texts`` if it has none."""
    if task.symbols:
        return [BLANK, *task.symbols]
    return [BLANK, *sorted({token for text in texts for token in tokens_of(text, task.tokens)})]


def digest_texts(texts: Mapping[str, str]) -> str:
    """Returns a hash over keys and texts."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def steps_needed(tokens: Sequence[object]) -> int:
    """Returns the steps that CTC needs: one per token, and one between two equal ones."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))
