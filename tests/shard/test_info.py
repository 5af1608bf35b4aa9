"""``info``: the counts are those of the clips, whatever a table knows of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.manifest import joint_vocabulary
from bat.data.table import scan
from bat.errors import UserError
from bat.shard.info import Summary, balance, duration, summarise
from bat.shard.write import write_shards
from bat.tasks.base import Row


def wav_row(folder: Path, name: str, labels: tuple[str, ...], seconds: float, **how: object) -> Row:
    rate = int(how.pop("rate", 8_000))  # type: ignore[call-overload]
    path = folder / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(len(name)).uniform(-0.5, 0.5, round(seconds * rate))
    path.write_bytes(encode(wave, sample_rate=rate, codec="wav"))
    return Row(path, name, labels, **how)  # type: ignore[arg-type]


@pytest.fixture
def split_shards(tmp_path: Path) -> Path:
    rows = [
        wav_row(tmp_path / "in", "a", ("cat",), 0.5, fold=1, split="train"),
        wav_row(tmp_path / "in", "b", ("cat", "dog"), 1.0, fold=2, split="train"),
        wav_row(tmp_path / "in", "c", (), 1.5, fold=2, split="train", rate=16_000),
    ]
    (tmp_path / "in/bad.wav").write_bytes(b"no")
    bad = Row(tmp_path / "in/bad.wav", "bad", ("cat",), split="train")
    names = ["cat", "dog", "emu"]
    write_shards([*rows, bad], tmp_path / "s/train", vocabulary=names)
    test = wav_row(tmp_path / "in", "d", ("dog",), 0.25)  # its JSON names no split
    write_shards([test], tmp_path / "s/test", vocabulary=names, codec="flac")
    return tmp_path / "s"


def test_counts_over_sub_folders(split_shards: Path) -> None:
    found = summarise(split_shards)
    assert (found.shards, found.clips) == (2, 4)
    assert found.bytes == sum(p.stat().st_size for p in split_shards.rglob("*.tar"))
    assert found.vocabulary == ["cat", "dog", "emu"]
    assert found.label_counts.tolist() == [2, 2, 0]
    assert found.labels_per_clip == {0: 1, 1: 2, 2: 1}
    assert found.seconds.tolist() == [0.25, 0.5, 1.0, 1.5]
    assert (found.total_seconds, found.unknown) == (3.25, 0)
    assert found.rates == {"8000": 3, "16000": 1}
    assert found.codecs == {"wav": 3, "flac": 1}
    assert found.splits == {"train": 3, "test": 1}
    assert found.folds == {"1": 1, "2": 2}
    assert found.left_out == {"corrupt": 1}
    assert found.headline == "4 clips, 3.2 s, 3 classes"


def test_the_text_says_it(split_shards: Path) -> None:
    assert summarise(split_shards).text() == [
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


def test_one_folder_alone_has_the_splits_of_its_json(split_shards: Path) -> None:
    assert summarise(split_shards / "train").splits == {"train": 3}
    assert summarise(split_shards / "test").splits == {}


def test_nothing_is_written(split_shards: Path) -> None:
    for path in split_shards.rglob("*.npz"):
        path.unlink()
    before = sorted(split_shards.rglob("*"))
    assert summarise(split_shards).clips == 4
    assert sorted(split_shards.rglob("*")) == before


def summary(seconds: list[float], **how: object) -> Summary:
    fields: dict[str, object] = {
        "shards": 1, "bytes": 10, "clips": len(seconds), "vocabulary": [],
        "label_counts": np.zeros(0, np.int64), "labels_per_clip": Counter({0: len(seconds)}),
        "seconds": np.array(seconds, np.float32),
    }  # fmt: skip
    return Summary(**(fields | how))  # type: ignore[arg-type]


def test_duration_histograms_linear_geometric_and_single() -> None:
    counts, edges = summary([1.0, 2.0, 2.1, 5.0, np.nan]).duration_histogram(bins=4)
    assert (counts.tolist(), edges.tolist()) == ([1, 2, 0, 1], [1, 2, 3, 4, 5])
    counts, edges = summary([1.0, 10.0, 99.0, 100.0]).duration_histogram(bins=2)
    assert counts.tolist() == [1, 3]
    assert edges.tolist() == pytest.approx([1, 10, 100])
    counts, edges = summary([5.0, 5.0, 5.0]).duration_histogram(bins=8)
    assert (counts.tolist(), edges.tolist()) == ([3], [5.0, 5.0])
    assert summary([np.nan]).duration_histogram(bins=8)[0].tolist() == [0]


def test_unknown_lengths_and_no_labels_are_said() -> None:
    text = summary([np.nan, np.nan]).text()
    assert text[0] == "clips     2 (0.0 s; 2 of unknown length)"
    assert text[2] == "length    unknown: bat-shard SHARDS indexes them in place and finds out"
    assert "labels    none (fine for pre-training)" in text
    assert summary([np.nan]).histograms() == []


def test_bars_are_in_proportion_and_many_classes_are_shortened() -> None:
    names = [f"c{i:02d}" for i in range(30)]
    found = summary([1.0], vocabulary=names, label_counts=np.arange(30) * 10)
    lines = found.histograms()
    assert lines[:3] == ["", "clips a class", "  c29  ############################## 290"]
    assert lines[12].strip() == "..."
    assert lines[22] == "  c00   "
    assert lines[21] == "  c01  # 10"
    assert lines[17] == "  c05  ##### 50"
    assert lines[-2:] == ["clips by length", "  1.00 - 1.00 s  ############################## 1"]


def test_balance_of_even_classes_is_one_line() -> None:
    assert len(balance(["a", "b"], np.array([4, 4]))) == 1
    assert balance(["a", "b"], np.array([4, 7]))[1:] == [
        "common    b 7, a 4",
        "rare      a 4, b 7",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3.04, "3.0 s"), (90, "1.5 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_labels_outside_the_vocabulary_name_the_command(split_shards: Path) -> None:
    tables = [scan(path) for path in split_shards.rglob("*.tar")]
    assert joint_vocabulary(tables, []) == ["cat", "dog"]
    with pytest.raises(UserError, match=r"label 'dog' is not in the vocabulary.*bat-shard verify"):
        joint_vocabulary(tables, [["cat"]])
    with pytest.raises(UserError, match=r"different labels .*dog.*data.labels=drop"):
        joint_vocabulary(tables, [["cat"], ["cat", "dog"]])
