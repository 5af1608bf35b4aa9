"""Clips that depend on their place in the stream only; bad ones; any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from bat.audio.decode import decode, write_rolled
from bat.data.index import Index, open_index
from bat.data.loader import as_it_is
from bat.data.plan import Plan
from bat.data.stream import BatchRows, ClipDataset, EvalSampler, PlanSampler
from bat.shard.write import write_shards
from bat.types import WaveBatch
from tests.shard.files import WAV, noise, recording, write_tar


def test_clip_dataset__evaluation_reads_each_row_once_in_order() -> None:
    ids = np.array([4, 2, 9, 7, 1])
    sampler = EvalSampler(ids, batch=2)
    assert list(sampler) == [[(0, 4), (1, 2)], [(2, 9), (3, 7)], [(4, 1)]]
    assert len(sampler) == 3


def noise_set(folder: Path, *, seconds: list[float], rate: int = 16_000) -> Index:
    rows = [
        recording(folder / f"clip{i}.flac", noise(i, s, rate=rate), rate)
        for i, s in enumerate(seconds)
    ]
    write_shards(rows, folder / "s")
    return open_index(folder / "s")


def find(whole: np.ndarray, piece: np.ndarray) -> int:
    """Where ``piece`` begins in ``whole``."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, 4)
    return int(np.flatnonzero((windows == piece[:4]).all(1))[0])


def wave_of(data: ClipDataset, position: int, clip: int) -> np.ndarray:
    """The signal part of the only row: (S,)."""
    batch = data[position, clip]
    return batch.waves[0, : int(batch.lengths[0])].numpy()


def dataset(index: Index, **kw: object) -> ClipDataset:
    settings = {"sample_rate": 16_000, "clip_seconds": 0.5, "seed": 0} | kw
    return ClipDataset(index, **settings)


def test_clip_dataset__crop_is_a_piece_of_the_clip_and_changes_with_the_position(
    tmp_path: Path,
) -> None:
    index = noise_set(tmp_path, seconds=[2.0])
    whole = decode(index.read(0).data, sample_rate=16_000)
    data, starts = dataset(index), []
    for position in range(40):
        wave = wave_of(data, position, 0)
        assert wave.shape == (8_000,)
        start = find(whole, wave)
        assert np.array_equal(whole[start : start + 8_000], wave)
        assert np.array_equal(wave_of(data, position, 0), wave)
        starts.append(start)
    assert len(set(starts)) > 35
    assert min(starts) < 4_000
    assert max(starts) > 20_000


@pytest.mark.parametrize(("seconds", "crop"), [(2.0, "start"), (0.505, "random")])
def test_clip_dataset__first_samples_in_evaluation_and_of_a_clip_a_hair_too_long(
    tmp_path: Path, seconds: float, crop: str
) -> None:
    index = noise_set(tmp_path, seconds=[seconds])
    whole = decode(index.read(0).data, sample_rate=16_000)
    data = dataset(index, crop=crop)
    assert all(np.array_equal(wave_of(data, p, 0), whole[:8_000]) for p in range(4))


def test_clip_dataset__roll_is_circular_and_of_the_position(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.25])
    plain, data = wave_of(dataset(index), 0, 0), dataset(index, roll=True)
    offsets = set()
    for position in range(20):
        wave = wave_of(data, position, 0)
        offset = find(np.concatenate([wave, wave[:3]]), plain)
        assert np.array_equal(np.roll(plain, offset), wave)
        offsets.add(offset)
    assert len(offsets) > 15
    assert not np.array_equal(wave_of(dataset(index, roll=True, seed=1), 0, 0), wave_of(data, 0, 0))


def test_clip_dataset__cache_changes_no_value_and_holds_what_it_may(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5, 2.0, 0.25, 0.5])
    plain = dataset(index, roll=True)
    cached = dataset(index, roll=True, cache_bytes=4 * 13_000)
    for position in range(12):
        for _ in range(2):
            a, b = wave_of(plain, position, position % 4), wave_of(cached, position, position % 4)
            assert np.array_equal(a, b)
    assert sorted(cached._cache) == [0, 2]  # 1 is cropped at random, 3 finds no room


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_clip_dataset__rows_are_padded_on_the_right_to_one_length(
    tmp_path: Path, rate: int
) -> None:
    index = noise_set(tmp_path, seconds=[0.25, 2.0, 0.7], rate=rate)
    batch = dataset(index).batch([(7, 0), (8, 1), (9, 2)])
    assert batch.waves.shape == (3, 8_000)
    assert batch.lengths.tolist() == [4_000, 8_000, 8_000]
    assert batch.waves[0, 4_000:].abs().max() == 0
    assert batch.targets.tolist() == [[1.0]] * 3
    assert batch.keys == ["clip0", "clip1", "clip2"]
    assert batch.positions.tolist() == [7, 8, 9]
    assert batch.skipped == []


def test_clip_dataset__short_clip_at_a_random_offset_is_whole_and_its_window_is_signal(
    tmp_path: Path,
) -> None:
    index = noise_set(tmp_path, seconds=[0.25, 0.5])
    whole = decode(index.read(0).data, sample_rate=16_000)
    data, starts = dataset(index, random_offset=True, cache_bytes=10**6), []
    for position in range(40):
        wave = wave_of(data, position, 0)
        starts.append(find(wave, whole))
        wanted = np.zeros(8_000, np.float32)
        wanted[starts[-1] : starts[-1] + 4_000] = whole
        assert np.array_equal(wave, wanted)
        assert np.array_equal(wave_of(data, position, 0), wave)  # by (seed, position) alone
    assert len(set(starts)) > 30
    assert min(starts) < 1_000
    assert max(starts) > 3_000
    assert data[0, 0].lengths.tolist() == [8_000]
    full = decode(index.read(1).data, sample_rate=16_000)
    assert np.array_equal(wave_of(data, 0, 1), full)
    assert len(wave_of(dataset(index), 0, 0)) == 4_000


# ---- bad clips


def spoil(index: Index, *clips: int) -> None:
    """Overwrite the audio of clips where it lies."""
    for clip in clips:
        with index.place(int(index.shard[clip])).open("r+b") as file:
            file.seek(int(index.offset[clip]))
            file.write(b"\0" * int(index.size[clip]))


def test_clip_dataset__bad_clip_is_replaced_deterministically_from_the_pool(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5] * 6)
    spoil(index, 2, 3)
    data = dataset(index, plan=Plan([0, 2, 3, 5], seed=0))
    stand_ins = set()
    for position in range(20):
        batch = data[position, 2]
        assert batch.keys[0] in ("clip0", "clip5")  # never a clip outside the pool
        assert (batch.skipped[0].key, batch.skipped[0].kind) == ("clip2", "corrupt")
        again = data[position, 2]
        assert (again.keys, again.skipped) == (batch.keys, batch.skipped)
        stand_ins.add(batch.keys[0])
    assert stand_ins == {"clip0", "clip5"}


def test_clip_dataset__in_evaluation_a_bad_clip_is_dropped_and_reported(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5] * 3)
    spoil(index, 1)
    data = dataset(index, crop="start")
    batch = data.batch([(i, i) for i in range(3)])
    assert batch.keys == ["clip0", "clip2"]
    assert batch.positions.tolist() == [0, 2]
    assert batch.targets.shape == (2, 1)
    assert [(s.key, s.shard, s.kind, s.position) for s in batch.skipped] == [
        ("clip1", "shard-00000.tar", "corrupt", 1)
    ]
    empty = data[1, 1]
    assert (empty.waves.shape, empty.targets.shape) == ((0, 8_000), (0, 1))


def test_clip_dataset__clip_shorter_than_indexed_is_noticed(tmp_path: Path) -> None:
    """A truncated WAV reads short without a word: only the recorded length tells."""
    said = {"num_samples": 800, "sample_rate": 16_000}
    write_tar(tmp_path / "a.tar", {"a.wav": WAV[:1_000], "a.json": said})
    batch = dataset(open_index(tmp_path / "a.tar"))[0, 0]
    assert batch.keys == []
    assert [(s.key, s.kind) for s in batch.skipped] == [("a", "truncated")]


def test_clip_dataset__too_long_a_clip_is_not_read_and_a_lost_shard_is_no_crash(
    tmp_path: Path,
) -> None:
    index = noise_set(tmp_path, seconds=[0.5])
    index.place(0).unlink()
    (skipped,) = dataset(index, max_seconds=0.4)[0, 0].skipped
    assert skipped.kind == "long"  # by the index alone
    (skipped,) = dataset(index)[0, 0].skipped
    assert (skipped.key, skipped.kind) == ("clip0", "unreadable")
    assert skipped.why == "No such file or directory"


def test_clip_dataset__any_number_of_workers_gives_the_same_batches(toy_index: Index) -> None:
    def batches(workers: int) -> list[WaveBatch]:
        return list(
            DataLoader(
                dataset(toy_index, clip_seconds=0.3, roll=True),
                batch_sampler=PlanSampler(Plan(10, seed=5), batch=4, batches=5),
                collate_fn=as_it_is,
                num_workers=workers,
            )
        )

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.keys == other.keys
        assert one.positions.tolist() == other.positions.tolist()
        assert one.waves.equal(other.waves)


def test_clip_dataset__foreign_clips_without_a_length_are_probed(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[2.0])
    data = dataset(index)
    known = wave_of(data, 3, 0)
    index.frames = np.array([-1])
    index.rate = np.array([0])
    assert np.array_equal(wave_of(data, 3, 0), known)


# ---- rows of a batch


WAVE = np.arange(1, 6, dtype=np.float32)


@pytest.mark.parametrize("roll", [0, 3])
@pytest.mark.parametrize("offset", [0, 2])
def test_clip_dataset__row_is_silence_the_rolled_wave_and_silence(roll: int, offset: int) -> None:
    rows = BatchRows(2, 9)
    rows.next[:] = 7.0  # whatever was there
    write_rolled(rows.next[offset:], WAVE, roll)
    rows.keep(offset, 5)
    waves, lengths = rows.tensors()
    after = [0.0] * (4 - offset)
    assert waves.tolist() == [[0.0] * offset + np.roll(WAVE, roll).tolist() + after]
    assert lengths.tolist() == [offset + 5]


class Shared(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, bool]:
        rows = BatchRows(2, 5)
        rows.next[:] = WAVE
        rows.keep(0, 5)
        waves, _ = rows.tensors()
        return waves, waves.is_shared()


def test_clip_dataset__memory_is_shared_in_a_worker_only() -> None:
    for workers in (0, 1):
        loader = DataLoader(Shared(), batch_size=2, num_workers=workers, collate_fn=as_it_is)
        ((waves, shared),) = list(loader)
        assert waves.tolist() == [WAVE.tolist()]
        assert shared is (workers == 1)
