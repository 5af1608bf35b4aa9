"""Makes labels of every time patch from the events of recordings (docs/method.md 5, ``dcase16``).

Patch t stands for its start, ``t x patch_hop_ms``: a class is active if that time lies in
``[onset, offset]`` of one of its events. The rows of patches that start at or beyond a clip's end
are NaN and are excluded from the loss and the metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bat.data.tar import escape_key
from bat.errors import UserError
from bat.tasks import events as listed
from bat.tasks.events import Events
from bat.types import WaveBatch

SLACK_SECONDS = 1e-6
"""Tolerance for floating-point products: 0.48 s is patch 3 of 160 ms."""


class FrameTargets:
    """Callable ``targets_of(batch, patches)`` for a data set with events.

    ``labels``: class names in the order of their indices; ``patch_hop_ms`` and ``sample_rate`` are
    the encoder's. Waves must begin where their recordings do: no roll, no random crop or offset.
    """

    def __init__(
        self, events: Events, *, labels: Sequence[str], patch_hop_ms: float, sample_rate: int
    ) -> None:
        number = {name: i for i, name in enumerate(labels)}
        self.classes, self.hop_seconds = len(labels), patch_hop_ms / 1000
        self.sample_rate = sample_rate
        self.missed = 0
        """Number of events between the starts of two patches, which no patch's label contains."""
        self._spans: Mapping[str, np.ndarray] = {}  # (events x labels, 3): first, last, class
        self._spans = {escape_key(key): self._of(found, number) for key, found in events.items()}
        self._events = {
            escape_key(key): [(e[0], e[1], number[label]) for e in found for label in e.labels]
            for key, found in events.items()
        }
        if len(self._spans) < len(events):
            raise UserError(
                "two recordings of the CSV have the same key once it is shortened: give them "
                "shorter paths"
            )
        said = f"{listed.digest(events)} {list(labels)} {patch_hop_ms} {sample_rate}"
        self.digest = hashlib.sha256(said.encode()).hexdigest()
        """Digest of all that stored targets depend on; an edited CSV has another one."""

    def _of(self, found: Sequence[listed.Event], number: Mapping[str, int]) -> np.ndarray:
        spans = []
        for event in found:
            first = int(np.ceil((event.onset_seconds - SLACK_SECONDS) / self.hop_seconds))
            last = int(np.floor((event.offset_seconds + SLACK_SECONDS) / self.hop_seconds))
            self.missed += last < first
            spans += [(max(first, 0), last, number[label]) for label in event.labels]
        return np.array(spans, np.int64).reshape(-1, 3)

    def reference(self, key: str) -> list[tuple[float, float, int]]:
        """Returns ``(onset_seconds, offset_seconds, class)`` of the events of clip ``key``."""
        return self._events[key]

    def __call__(self, batch: WaveBatch, patches: int) -> Tensor:
        """Returns (B, T, C) float32, T = ``patches``: 1 active, 0 not, NaN beyond the clip."""
        made = np.zeros((len(batch.keys), patches, self.classes), np.float32)
        for row, key in zip(made, batch.keys, strict=True):
            for first, last, label in self._spans[key]:
                row[first : last + 1, label] = 1.0
        targets = torch.from_numpy(made)
        starts = torch.arange(patches, dtype=torch.float64) * self.hop_seconds  # (T,)
        ends = batch.lengths.cpu().double() / self.sample_rate  # (B,)
        beyond = starts >= ends[:, None] - SLACK_SECONDS  # (B, T)
        return targets.masked_fill_(beyond[..., None], float("nan"))
