"""Lost shards count as about the clips that went with them, without a jump at the first."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from bat.data.sequential import Losses, SequentialClips
from bat.data.sequential_data import SequentialData
from bat.types import Skipped
from tests.data.test_sequential import WAV, make, tar_bytes

LOST = Skipped("", "s", "unreadable", "gone", 0)


def told(losses: Losses, shards: str, clips: int) -> list[int]:
    """How many are told after each of ``shards``: ``.`` read whole, ``x`` lost."""
    counts, total = [], 0
    for mark in shards:
        if mark == ".":
            total += sum(len(losses.due()) for _ in range(clips))
            losses.shard(clips, None)
        else:
            total += 1  # the reader tells the first itself
            losses.shard(0, LOST)
        counts.append(total)
    return counts


def test_a_lost_shard_is_told_over_the_span_that_follows() -> None:
    counts = told(Losses(20), "." * 10 + "x" + "." * 40, 1000)
    assert counts[10] == 1
    assert counts[20] == pytest.approx(1000 * 10 / 19, rel=0.02)
    assert counts[-1] == pytest.approx(1000, rel=0.06)  # and no more thereafter
    assert counts[-1] == counts[-15]
    first = told(Losses(20), "x" + "." * 19, 1000)  # lost before it is known how much that is
    assert first[1] == pytest.approx(50, abs=55)
    assert 800 < first[-1] < 1100


@pytest.mark.parametrize(("every", "share"), [(2, 0.5), (10, 0.1)])
def test_the_share_told_is_the_share_lost(every: int, share: float) -> None:
    counts = told(Losses(20), ("." * (every - 1) + "x") * (400 // every), 100)
    read = 100 * (400 - 400 // every)
    assert counts[-1] / (counts[-1] + read) == pytest.approx(share, abs=0.1 * share)


def test_a_shard_that_breaks_off_costs_what_it_did_not_give() -> None:
    for gave, rate in ((90, 10), (100, 1), (0, 100)):
        losses = Losses(10)
        losses.shard(100, None)
        losses.shard(gave, LOST)
        total = sum(len(losses.due()) for _ in range(900))
        assert total == pytest.approx(rate * 900 / (900 + gave), abs=2)


def test_nothing_but_lost_shards_stays_bounded() -> None:
    losses = Losses(8)
    for _ in range(100):
        losses.shard(0, LOST)
    assert sum(len(losses.due()) for _ in range(1000)) <= 100_000


@pytest.mark.parametrize("workers", [0, 2])
def test_max_bad_sees_lost_shards(tmp_path: Path, workers: int) -> None:
    make(tmp_path, 20, 30)
    for s in range(4):
        (tmp_path / f"s-{s}.tar.gz").write_bytes(b"\x1f\x8b rubbish")
    data = SequentialData(
        [tmp_path], batch=8, sample_rate=16_000, clip_seconds=0.05, workers=workers
    )
    seen, skipped = 0, Counter[str]()
    for batch in itertools.islice(data.train_dataloader(), 480):  # 8 epochs of 480 clips
        seen += len(batch.keys)
        skipped.update(clip.shard for clip in batch.skipped)
    assert set(skipped) == {f"s-{s}.tar.gz" for s in range(4)}
    assert skipped.total() / (seen + skipped.total()) == pytest.approx(0.2, abs=0.04)
    assert max(skipped.values()) < 2 * min(skipped.values())


def test_one_of_many_does_not_stop_a_run_wherever_it_comes(tmp_path: Path) -> None:
    folder = make(tmp_path, 60, 2)
    for seed in range(3):
        first = int(SequentialClips(folder, seed=seed).order(0)[0])
        path = SequentialClips(folder).shards[first].place
        assert isinstance(path, Path)
        before = path.read_bytes()
        path.write_bytes(b"\x1f\x8b rubbish")
        clips = SequentialClips(folder, seed=seed, shuffle_clips=1)
        worst, count = 0.0, 0
        for n, _ in enumerate(itertools.islice(clips, 500), 1):
            count += len(clips.take_skipped())
            worst = max(worst, count / (n + count)) if n + count >= 100 else worst
        assert 0.01 < worst < 0.035
        path.write_bytes(before)


def test_shares_of_readers_that_all_read_all(tmp_path: Path) -> None:
    for s in range(2):
        members = {f"k{s}-{c}.wav": WAV for c in range(24)}
        (tmp_path / f"s-{s}.tar").write_bytes(tar_bytes(members)[: None if s else 100])
    seen, lost = 0, 0
    for rank in range(3):
        clips = SequentialClips(tmp_path, rank=rank, world=3, shuffle_clips=1)
        got = list(itertools.islice(clips, 160))  # 20 epochs of 8
        seen, lost = seen + len(got), lost + len(clips.take_skipped())
    assert lost / (seen + lost) == pytest.approx(0.5, abs=0.08)
