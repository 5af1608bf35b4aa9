"""A batch's memory: waves on the left of rows of one fixed length, silence after them.

The length is the same for every batch, so shapes stay constant under ``torch.compile``. In a
loader worker the memory is shared from the start: torch would otherwise copy each batch there.
A batch of an evaluation may be smaller than asked for, even empty: unreadable clips have no row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Rows:
    """Up to ``rows`` waves of up to ``samples`` samples; filled from the top by ``add``."""

    def __init__(self, rows: int, samples: int) -> None:
        waves = torch.empty(0, dtype=torch.float32)
        if get_worker_info() is not None:  # as torch's own default_collate does
            storage = waves._typed_storage()._new_shared(rows * samples, device=waves.device)
            waves = waves.new(storage).view(rows, samples)
        else:
            waves = waves.new_empty(rows, samples)
        self._tensor = waves
        self._waves = waves.numpy()
        self._lengths: list[int] = []

    def add(self, wave: np.ndarray, *, roll: int = 0, offset: int = 0, whole: bool = False) -> None:
        """Put ``wave`` (S,) in the next row.

        Args:
            roll: samples by which it is shifted circularly, ``0 .. S - 1``.
            offset: samples of silence before it.
            whole: the row counts as signal up to its end, silence included.
        """
        row = self._waves[len(self._lengths)]
        wave = wave[: len(row) - offset]
        end = offset + len(wave)
        row[:offset] = 0.0
        row[end:] = 0.0
        if roll:
            row[offset : offset + roll] = wave[-roll:]
            row[offset + roll : end] = wave[:-roll]
        else:
            row[offset:end] = wave
        self._lengths.append(len(row) if whole else end)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Waves (B, S) float32 and lengths (B,) int64 of the rows that were filled."""
        filled = len(self._lengths)
        return self._tensor[:filled], torch.tensor(self._lengths, dtype=torch.int64)
