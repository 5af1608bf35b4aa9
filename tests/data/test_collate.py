"""Rows of a batch: rolled, placed, padded; in a worker in shared memory from the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from bat.audio.decode import write_rolled
from bat.data.loader import as_it_is
from bat.data.stream import BatchRows

WAVE = np.arange(1, 6, dtype=np.float32)


@pytest.mark.parametrize("roll", range(5))
@pytest.mark.parametrize("offset", [0, 2])
def test_a_row_is_silence_the_rolled_wave_and_silence(roll: int, offset: int) -> None:
    rows = BatchRows(2, 9)
    rows.next[:] = 7.0  # whatever was there
    write_rolled(rows.next[offset:], WAVE, roll)
    rows.keep(offset, 5)
    waves, lengths = rows.tensors()
    wanted = np.zeros(9, np.float32)
    wanted[offset : offset + 5] = np.roll(WAVE, roll)
    assert waves.tolist() == [wanted.tolist()]
    assert lengths.tolist() == [offset + 5]


def test_whole_rows_are_signal_and_unkept_ones_are_no_row() -> None:
    rows = BatchRows(3, 4)
    rows.next[:] = WAVE[:4]
    rows.keep(0, 4)
    rows.next[:] = 9.0
    rows.keep(1, 2, whole=True)
    rows.next[:] = 5.0
    waves, lengths = rows.tensors()
    assert waves.tolist() == [[1, 2, 3, 4], [0, 9, 9, 0]]
    assert lengths.tolist() == [4, 4]


class Shared(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, bool]:
        rows = BatchRows(2, 5)
        rows.next[:] = WAVE
        rows.keep(0, 5)
        waves, _ = rows.tensors()
        return waves, waves.is_shared()


def test_memory_is_shared_in_a_worker_only() -> None:
    for workers in (0, 1):
        loader = DataLoader(Shared(), batch_size=2, num_workers=workers, collate_fn=as_it_is)
        ((waves, shared),) = list(loader)
        assert waves.tolist() == [WAVE.tolist()]
        assert shared is (workers == 1)
