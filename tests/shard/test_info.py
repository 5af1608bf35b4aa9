"""``summarise``: the counts are those of the clips, whatever a table knows of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bat.shard.info import Summary, balance, duration, summarise
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.shard.files import noise, recording


@pytest.fixture
def split_shards(tmp_path: Path) -> Path:
    def row(name: str, labels: tuple[str, ...], seconds: float, rate: int, **more: object) -> Row:
        wave = noise(len(name), seconds, rate=rate)
        return recording(tmp_path / f"in/{name}.wav", wave, rate, labels=labels, **more)

    rows = [
        row("a", ("cat",), 0.5, 8_000, fold=1, split="train"),
        row("b", ("cat", "dog"), 1.0, 8_000, fold=2, split="train"),
        row("c", (), 1.5, 16_000, fold=2, split="train"),
    ]
    (tmp_path / "in/bad.wav").write_bytes(b"no")
    bad = Row(tmp_path / "in/bad.wav", "bad", ("cat",), split="train")
    names = ["cat", "dog", "emu"]
    write_shards([*rows, bad], tmp_path / "s/train", vocabulary=names)
    test = row("d", ("dog",), 0.25, 8_000)  # its JSON names no split
    write_shards([test], tmp_path / "s/test", vocabulary=names, codec="flac")
    return tmp_path / "s"


def test_summarise__counts_over_sub_folders(split_shards: Path) -> None:
    found = summarise(split_shards)
    assert found.seconds.tolist() == [0.25, 0.5, 1.0, 1.5]
    assert found.headline == "4 clips, 3.2 s, 3 classes"
    assert found.text() == [
        "clips     4 (3.2 s)",
        f"shards    2 ({sum(p.stat().st_size for p in split_shards.rglob('*.tar')) / 1e6:.2f} MB)",
        "length    0.75 s at the median, 0.25 to 1.50",
        "rates     8000 Hz 3, 16000 Hz 1",
        "codecs    wav 3, flac 1",
        "splits    train 3, test 1",
        "folds     1 1, 2 2",
        "labels    3 classes, 1.00 a clip, 2 at most, 1 without",
        "balance   0 clips in the smallest class, 2 at the median, 2 in the largest",
        "common    cat 2, dog 2, emu 0",
        "rare      emu 0, dog 2, cat 2",
        "empty     1 of 3 classes",
        "left out  1 (corrupt 1)",
    ]


def test_summarise__one_folder_has_the_splits_of_its_json_and_nothing_is_written(
    split_shards: Path,
) -> None:
    for path in split_shards.rglob("*.npz"):
        path.unlink()
    before = sorted(split_shards.rglob("*"))
    assert summarise(split_shards / "train").splits == {"train": 3}
    assert summarise(split_shards / "test").splits == {}
    assert sorted(split_shards.rglob("*")) == before


def test_text__unknown_lengths_and_missing_labels_are_said() -> None:
    text = Summary(
        shards=1,
        bytes=10,
        clips=2,
        vocabulary=[],
        label_counts=np.zeros(0, np.int64),
        labels_per_clip=Counter({0: 2}),
        seconds=np.full(2, np.nan, np.float32),
    ).text()
    assert text[0] == "clips     2 (0.0 s; 2 of unknown length)"
    assert text[2] == "length    unknown: bat-shard SHARDS indexes them in place and finds out"
    assert "labels    none (fine for pre-training)" in text


def test_balance__even_classes_take_one_line() -> None:
    assert len(balance(["a", "b"], np.array([4, 4]))) == 1
    assert balance(["a", "b"], np.array([4, 7]))[1:] == ["common    b 7, a 4", "rare      a 4, b 7"]


@pytest.mark.parametrize(("seconds", "text"), [(3.04, "3.0 s"), (90, "1.5 min"), (9000, "2.5 h")])
def test_duration__has_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
