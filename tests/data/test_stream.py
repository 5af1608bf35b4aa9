"""The plan: every clip once an epoch, whoever reads; and clips that depend on the place only."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bat.audio.decode import decode, encode
from bat.data.collate import Collate
from bat.data.index import Index, open_index
from bat.data.shards import write_shards
from bat.data.stream import (
    ClipDataset,
    EvalSampler,
    Item,
    Plan,
    PlanSampler,
    below,
    clip_samples,
    philox,
)
from bat.shapes import UserError, WaveBatch
from bat.tasks.base import Row

CASES = [  # clips, batch, world
    (10, 4, 1),
    (10, 3, 2),
    (7, 16, 1),
    (1, 2, 3),
    (64, 8, 8),
    (101, 5, 3),
]


def global_batches(
    plan: Plan, *, batch: int, world: int, first: int, count: int
) -> list[list[Item]]:
    """Micro-batches ``first ..`` as all ranks together see them, by position."""
    ranks = [
        list(
            PlanSampler(
                plan, batch=batch, batches=count, rank=r, world=world, batches_done=lambda: first
            )
        )
        for r in range(world)
    ]
    return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("n", "batch", "world"), CASES)
def test_every_clip_exactly_once_an_epoch(n: int, batch: int, world: int) -> None:
    plan = Plan(n, seed=3)
    count = -(-3 * n // (batch * world))  # three epochs at least
    batches = global_batches(plan, batch=batch, world=world, first=0, count=count)
    items = list(itertools.chain(*batches))
    assert [p for p, _ in items] == list(range(count * batch * world))
    for epoch in range(3):
        clips = [c for _, c in items[epoch * n : (epoch + 1) * n]]
        assert sorted(clips) == list(range(n))
        assert clips == plan.order(epoch).tolist()


@pytest.mark.parametrize(("n", "batch", "world"), CASES)
def test_going_on_anywhere_equals_not_stopping(n: int, batch: int, world: int) -> None:
    whole = global_batches(Plan(n, seed=1), batch=batch, world=world, first=0, count=12)
    for first in (1, 5, 11):
        rest = global_batches(
            Plan(n, seed=1), batch=batch, world=world, first=first, count=12 - first
        )
        assert rest == whole[first:]


@pytest.mark.parametrize(("n", "batch", "world"), [(10, 3, 2), (64, 8, 8), (101, 5, 4)])
def test_another_world_with_the_same_global_batch_keeps_the_batches(
    n: int, batch: int, world: int
) -> None:
    many = global_batches(Plan(n, seed=1), batch=batch, world=world, first=4, count=9)
    one = global_batches(Plan(n, seed=1), batch=batch * world, world=1, first=4, count=9)
    half = global_batches(Plan(n, seed=1), batch=batch * 2, world=world // 2, first=4, count=9)
    assert many == one == half


def test_two_million_clips_in_64_ranks() -> None:
    plan = Plan(2_000_000, seed=0)
    seen = np.zeros(2_000_000, np.int64)
    size = 64 * 48
    for k in range(0, -(-2_000_000 // size), 50):  # runs of 50 micro-batches at once
        positions = np.arange(k * size, min((k + 50) * size, 2_000_000))
        np.add.at(seen, plan.clips(positions), 1)
    assert (seen == 1).all()


def test_order_depends_on_seed_and_epoch_only() -> None:
    order = Plan(8, seed=0).order
    assert order(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]  # a change here breaks running resumes
    assert order(1).tolist() != order(0).tolist()
    assert Plan(8, seed=1).order(0).tolist() != order(0).tolist()
    assert Plan([5, 7, 9], seed=4).order(2).tolist() == [
        [5, 7, 9][i] for i in Plan(3, seed=4).order(2)
    ]


def test_orders_are_uniform() -> None:
    first = Counter(int(Plan(5, seed=s).order(e)[0]) for s in range(100) for e in range(20))
    assert all(abs(first[c] - 400) < 5 * np.sqrt(400 * 0.8) for c in range(5))
    draws = Counter(below(3, philox(0, i, 1)) for i in range(3000))
    assert all(abs(draws[c] - 1000) < 130 for c in range(3))


def test_an_empty_selection_and_wrong_sizes() -> None:
    with pytest.raises(UserError, match="selection is empty"):
        Plan([], seed=0)
    with pytest.raises(UserError, match="seed=-1"):
        Plan(3, seed=-1)
    with pytest.raises(UserError, match="batch=0"):
        PlanSampler(Plan(3, seed=0), batch=0, batches=1)


def test_evaluation_reads_each_row_once_in_order() -> None:
    ids = np.array([4, 2, 9, 7, 1])
    sampler = EvalSampler(ids, batch=2)
    assert list(sampler) == [[(0, 4), (1, 2)], [(2, 9), (3, 7)], [(4, 1)]]
    assert len(sampler) == 3


# ---- clips


def noise_set(
    folder: Path, *, seconds: list[float], rate: int = 16_000, codec: str = "flac"
) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i, s in enumerate(seconds):
        wave = rng.uniform(-0.5, 0.5, round(s * rate))
        (folder / f"{i}.flac").write_bytes(encode(wave, sample_rate=rate, codec="flac"))
        rows.append(Row(folder / f"{i}.flac", f"clip{i}", ("a",)))
    write_shards(rows, folder / "s")
    return open_index(folder / "s")


def find(whole: np.ndarray, piece: np.ndarray) -> int:
    """Where ``piece`` begins in ``whole``."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, 4)
    return int(np.flatnonzero((windows == piece[:4]).all(1))[0])


def dataset(index: Index, **kw: object) -> ClipDataset:
    settings = {"sample_rate": 16_000, "clip_seconds": 0.5, "seed": 0} | kw
    return ClipDataset(index, **settings)  # type: ignore[arg-type]


def test_a_crop_is_a_piece_of_the_clip_and_changes_with_the_position(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[2.0])
    whole = decode(index.read(0).data, sample_rate=16_000)
    data, starts = dataset(index), []
    for position in range(40):
        wave = data[position, 0].wave
        assert wave is not None
        assert wave.shape == (8_000,)
        start = find(whole, wave)
        assert np.array_equal(whole[start : start + 8_000], wave)
        assert np.array_equal(data[position, 0].wave, wave)
        starts.append(start)
    assert len(set(starts)) > 35
    assert min(starts) < 4_000
    assert max(starts) > 20_000


def test_crop_at_the_start_and_in_the_centre(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[2.0])
    whole = decode(index.read(0).data, sample_rate=16_000)
    assert np.array_equal(dataset(index, crop="start")[0, 0].wave, whole[:8_000])
    assert np.array_equal(dataset(index, crop="centre")[9, 0].wave, whole[12_000:20_000])


def test_a_hair_too_long_is_read_from_the_start(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.505])
    whole = decode(index.read(0).data, sample_rate=16_000)
    assert all(np.array_equal(dataset(index)[p, 0].wave, whole[:8_000]) for p in range(4))


def test_roll_is_circular_and_of_the_position(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.25])
    plain, data = dataset(index)[0, 0].wave, dataset(index, roll=True)
    assert plain is not None
    offsets = set()
    for position in range(20):
        wave = data[position, 0].wave
        assert wave is not None
        offset = find(np.concatenate([wave, wave[:3]]), plain)
        assert np.array_equal(np.roll(plain, offset), wave)
        offsets.add(offset)
    assert len(offsets) > 15
    assert not np.array_equal(dataset(index, roll=True, seed=1)[0, 0].wave, data[0, 0].wave)


def test_the_cache_changes_no_value_and_holds_what_it_may(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5, 2.0, 0.25, 0.5])
    plain = dataset(index, roll=True)
    cached = dataset(index, roll=True, cache_bytes=4 * 13_000)
    for position in range(12):
        for _ in range(2):
            a, b = plain[position, position % 4].wave, cached[position, position % 4].wave
            assert np.array_equal(a, b)  # type: ignore[arg-type]
    assert sorted(cached._cache) == [0, 2]  # 1 is cropped at random, 3 finds no room


def test_resampled_rows_have_the_exact_length(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[1.0, 0.7], rate=44_100)
    data = dataset(index)
    for position in range(10):
        for clip in range(2):
            assert data[position, clip].wave.shape == (8_000,)  # type: ignore[union-attr]


def test_collate_pads_on_the_right_to_one_length(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.25, 2.0])
    data = dataset(index)
    batch = Collate(clip_samples(0.5, 16_000))([data[7, 0], data[8, 1]])
    assert isinstance(batch, WaveBatch)
    assert batch.waves.shape == (2, 8_000)
    assert batch.lengths.tolist() == [4_000, 8_000]
    assert batch.waves[0, 4_000:].abs().max() == 0
    assert batch.targets.tolist() == [[1.0], [1.0]]
    assert batch.keys == ["clip0", "clip1"]
    assert batch.positions.tolist() == [7, 8]
    assert batch.skipped == {}


def test_a_short_clip_at_a_random_offset_is_whole_and_its_window_is_signal(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.25, 0.5])
    whole = decode(index.read(0).data, sample_rate=16_000)
    data, starts = dataset(index, random_offset=True, cache_bytes=10**6), []
    for position in range(40):
        wave = data[position, 0].wave
        assert wave is not None
        starts.append(find(wave, whole))
        wanted = np.zeros(8_000, np.float32)
        wanted[starts[-1] : starts[-1] + 4_000] = whole
        assert np.array_equal(wave, wanted)
        assert np.array_equal(data[position, 0].wave, wave)  # by (seed, position) alone
    assert len(set(starts)) > 30
    assert min(starts) < 1_000
    assert max(starts) > 3_000
    assert Collate(8_000)([data[0, 0]]).lengths.tolist() == [8_000]
    full = decode(index.read(1).data, sample_rate=16_000)
    assert np.array_equal(data[0, 1].wave, full)  # type: ignore[arg-type]
    assert len(dataset(index)[0, 0].wave) == 4_000  # type: ignore[arg-type]


# ---- bad clips


def spoil(index: Index, *clips: int) -> None:
    """Overwrite the audio of clips where it lies."""
    for clip in clips:
        with index.paths[index.shard[clip]].open("r+b") as file:
            file.seek(int(index.offset[clip]))
            file.write(b"\0" * int(index.size[clip]))


def test_a_bad_clip_is_replaced_deterministically_from_the_pool(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5] * 6)
    spoil(index, 2, 3)
    data = dataset(index, pool=np.array([0, 2, 3, 5]))
    stand_ins = set()
    for position in range(20):
        sample = data[position, 2]
        assert sample.wave is not None
        assert sample.key in ("clip0", "clip5")  # never a clip outside the pool
        assert sample.skipped["clip2"].startswith("corrupt: ")
        again = data[position, 2]
        assert (again.key, again.skipped) == (sample.key, sample.skipped)
        stand_ins.add(sample.key)
    assert stand_ins == {"clip0", "clip5"}


def test_in_evaluation_a_bad_clip_is_dropped_and_reported(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5] * 3)
    spoil(index, 1)
    data = dataset(index, crop="centre")
    batch = Collate(8_000)([data[i, i] for i in range(3)])
    assert batch.keys == ["clip0", "clip2"]
    assert batch.positions.tolist() == [0, 2]
    assert batch.targets.shape == (2, 1)
    assert list(batch.skipped) == ["clip1"]
    empty = Collate(8_000)([data[1, 1]])
    assert (empty.waves.shape, empty.targets.shape) == ((0, 8_000), (0, 1))


def test_a_clip_shorter_than_indexed_is_noticed(tmp_path: Path) -> None:
    """A truncated WAV reads short without a word: only the recorded length tells."""
    wav = encode(np.zeros(800) + 0.1, sample_rate=16_000, codec="wav")
    cut = wav[:1_000]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("a.wav", cut),
            ("a.json", b'{"num_samples": 800, "sample_rate": 16000}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sample = dataset(open_index(tmp_path / "a.tar"))[0, 0]
    assert sample.wave is None
    assert sample.skipped["a"].startswith("short: ")


def test_a_shard_that_vanishes_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[0.5])
    index.paths[0].unlink()
    assert dataset(index)[0, 0].skipped == {"clip0": "unreadable: No such file or directory"}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_batches(toy_index: Index, workers: int) -> None:
    def batches(count: int) -> list[WaveBatch]:
        return list(
            DataLoader(
                dataset(toy_index, clip_seconds=0.3, roll=True),
                batch_sampler=PlanSampler(Plan(10, seed=5), batch=4, batches=5),
                collate_fn=Collate(4_800),
                num_workers=count,
            )
        )

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert one.keys == other.keys
        assert one.positions.tolist() == other.positions.tolist()
        assert one.waves.equal(other.waves)


def test_foreign_clips_without_a_length_are_probed(tmp_path: Path) -> None:
    index = noise_set(tmp_path, seconds=[2.0])
    data = dataset(index)
    known = data[3, 0].wave
    index.frames = np.array([-1])
    index.rate = np.array([0])
    assert np.array_equal(data[3, 0].wave, known)  # type: ignore[arg-type]
