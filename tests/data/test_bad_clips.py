"""Bad clips: counted by kind and shard, each listed once, also over a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bat.data.bad_clips import BadClips
from bat.errors import UserError
from bat.types import Skipped, WaveBatch


def batch(good: int, *bad: Skipped) -> WaveBatch:
    return WaveBatch(
        waves=torch.zeros(good, 4),
        lengths=torch.full((good,), 4),
        targets=torch.zeros(good, 0),
        keys=[str(i) for i in range(good)],
        positions=torch.arange(good),
        skipped=list(bad),
    )


A = Skipped("a", "shard-00001.tar", "corrupt", "damaged", 3)
B = Skipped("b", "shard-00001.tar", "nan", "samples that are not finite", 5)
C = Skipped("c", "shard-00007.tar", "corrupt", "damaged", 9)


def test_bad_clips__error_names_kinds_shards_and_the_list(tmp_path: Path) -> None:
    bad = BadClips(max_bad=0.1, check_after=10, file=tmp_path / "run" / "bad_clips.jsonl")
    bad.add(batch(5, A, B))
    bad.check()  # too few
    bad.add(batch(5, C, A))
    with pytest.raises(UserError) as caught:
        bad.check()
    text = str(caught.value)
    assert text.startswith("4 of 14 clips unreadable (3 corrupt, 1 nan): more than max_bad=0.1")
    assert "Most are in shard-00001.tar (3), shard-00007.tar (1); all are listed in" in text
    assert "bad_clips.jsonl" in text


def test_bad_clips__each_bad_clip_is_listed_once_also_after_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "bad_clips.jsonl"
    first = BadClips(max_bad=1.0, file=file)
    first.add(batch(1, A))
    first.add(batch(1, A, B))
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        A._asdict(),
        B._asdict(),
    ]
    file.write_text(file.read_text() + '{"key": "hal')  # killed while writing
    second = BadClips(max_bad=1.0, file=file)
    second.load_state_dict(first.state_dict())
    second.add(batch(1, B, C))
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    assert (second.seen, second.bad, dict(second.shards)) == (
        8,
        5,
        {"shard-00001.tar": 4, "shard-00007.tar": 1},
    )


def test_bad_clips__disk_that_fails_late_is_noticed() -> None:
    bad = BadClips(max_bad=0.05)
    for _ in range(2_000):
        bad.add(batch(100))
        bad.check()

    def fail() -> None:
        for _ in range(60):
            bad.add(batch(90, *[A] * 10))
            bad.check()

    with pytest.raises(UserError, match=r"of the latest 10\d\d\d \d+: more than max_bad=0.05"):
        fail()
    assert 500 <= bad.bad <= 520  # 5 % of the latest 10,000, not of 200,000
