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


class BatchRows:
    """Up to ``rows`` waves of up to ``samples`` samples; filled from the top, see ``next``."""

    def __init__(self, rows: int, samples: int) -> None:
        if get_worker_info() is not None:  # as torch's own default_collate does
            empty = torch.empty(0, dtype=torch.float32)
            storage = empty._typed_storage()._new_shared(rows * samples, device=empty.device)
            self._tensor = empty.new(storage).view(rows, samples)
        else:  # by numpy, which asks for huge pages: faults cost a twentieth of a FLAC clip
            self._tensor = torch.from_numpy(np.empty((rows, samples), np.float32))
        self._waves = self._tensor.numpy()
        self._lengths: list[int] = []

    @property
    def next(self) -> np.ndarray:
        """The next free row, (S,) float32, to be filled; then ``keep`` it."""
        row: np.ndarray = self._waves[len(self._lengths)]
        return row

    def keep(self, offset: int, samples: int, *, whole: bool = False) -> None:
        """The next row holds a wave of ``samples`` from ``offset`` on: silence around it.

        ``whole``: the row counts as signal up to its end, silence included.
        """
        row = self.next
        row[:offset] = 0.0
        row[offset + samples :] = 0.0
        self._lengths.append(len(row) if whole else offset + samples)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Waves (B, S) float32 and lengths (B,) int64 of the rows that were filled."""
        filled = len(self._lengths)
        return self._tensor[:filled], torch.tensor(self._lengths, dtype=torch.int64)
