"""Samples to a ``WaveBatch``: waves padded on the right to one fixed length, labels stacked.

The length is the same for every batch (``clip_samples``), so shapes stay constant under
``torch.compile``. A sample without a wave (unreadable, no stand-in) is dropped and reported in
``skipped``; a batch of an evaluation may so be smaller, even empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bat.data.stream import Sample
from bat.shapes import WaveBatch


class Collate:
    """``samples -> WaveBatch`` of waves (B, S) with S = ``samples`` fixed."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, batch: Sequence[Sample]) -> WaveBatch:
        kept = [(sample, sample.wave) for sample in batch if sample.wave is not None]
        waves = np.zeros((len(kept), self.samples), np.float32)  # (B, S)
        lengths = np.zeros(len(kept), np.int64)
        for row, (_, wave) in enumerate(kept):
            lengths[row] = min(len(wave), self.samples)
            waves[row, : lengths[row]] = wave[: self.samples]
        targets = np.stack([s.target for s in batch])[[s.wave is not None for s in batch]]
        return WaveBatch(
            waves=torch.from_numpy(waves),
            lengths=torch.from_numpy(lengths),
            targets=torch.from_numpy(targets),  # (B, C)
            keys=[sample.key for sample, _ in kept],
            positions=torch.tensor([sample.position for sample, _ in kept], dtype=torch.int64),
            skipped={key: why for sample in batch for key, why in sample.skipped.items()},
        )
