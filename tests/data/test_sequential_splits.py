"""Which split is read where there is no index: sub-folders, JSON, both, neither."""

from __future__ import annotations

import gzip
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from bat.data import sequential_data
from bat.data.sequential import SequentialClips
from bat.data.sequential_data import SequentialData
from bat.errors import UserError
from tests.data.test_sequential import WAV, tar_bytes


def put(path: Path, clips: Mapping[str, str | None]) -> None:
    """A packed shard of clips with the split that their JSON says."""
    members: dict[str, object] = {}
    for key, split in clips.items():
        said = {"label": "a"} | ({} if split is None else {"split": split})
        members |= {f"{key}.wav": WAV, f"{key}.json": said}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(tar_bytes(members)))


def opened(folder: Path, split: str = "auto", max_bad: float = 0.05) -> SequentialData:
    return SequentialData(
        [folder], batch=1, sample_rate=16_000, clip_seconds=0.05, split=split, max_bad=max_bad
    )


def read(folder: Path, split: str = "auto", batches: int = 40) -> tuple[set[str], int]:
    """Keys that a stream gives, and how many it counts as skipped."""
    keys, skipped = set(), 0
    for batch in itertools.islice(opened(folder, split).train_dataloader(), batches):
        keys |= set(batch.keys)
        skipped += len(batch.skipped)
    return keys, skipped


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    put(tmp_path / "train/s-0.tar.gz", {"a": None, "b": "train", "c": "test"})
    put(tmp_path / "train/s-1.tar.gz", {"d": "train"})
    put(tmp_path / "test/s-0.tar.gz", {"e": None, "f": "test"})
    return tmp_path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    put(tmp_path / "s-0.tar.gz", {"a": "train", "b": "test", "c": None})
    put(tmp_path / "s-1.tar.gz", {"d": "test", "e": "train", "f": "valid"})
    return tmp_path


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("auto", "abd"), ("train", "abd"), ("test", "ef"), ("all", "abcdef")],
)
def test_folders_name_splits_and_json_goes_before(folders: Path, split: str, wanted: str) -> None:
    assert read(folders, split) == (set(wanted), 0)


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("auto", "ae"), ("train", "ae"), ("test", "bd"), ("valid", "f"), ("all", "abcdef")],
)
def test_json_alone_names_splits(flat: Path, split: str, wanted: str) -> None:
    assert read(flat, split) == (set(wanted), 0)


def test_what_auto_does_is_told(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bat")
    assert len(opened(folders).shards) == 2
    assert "the 2 shards of split train; data.split=all takes those of test too" in caplog.text
    put(tmp_path / "x/s-0.tar.gz", {"a": "train", "b": "test"})
    opened(tmp_path / "x")
    assert "the clips of split train; data.split=all takes those of test too" in caplog.text
    caplog.clear()
    put(tmp_path / "v/s-0.tar.gz", {"a": "eval", "b": None})
    put(tmp_path / "w/dev/s-0.tar.gz", {"c": None})
    for name, splits in (("v", "eval"), ("w", "valid")):  # dev is valid
        with pytest.raises(UserError, match=f"the splits {splits}: none of them is called train"):
            opened(tmp_path / name)
    put(tmp_path / "y/s-0.tar.gz", {"a": "north", "b": None})
    put(tmp_path / "z/south/s-0.tar.gz", {"c": None})
    for name, splits, keys in (("y", "north", "ab"), ("z", "south", "c")):
        assert read(tmp_path / name) == (set(keys), 0)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"none of the splits ({splits}) is called train; data.split=NAME" in record.message
        caplog.clear()
    put(tmp_path / "n/s-0.tar.gz", {"a": None})
    opened(tmp_path / "n")
    assert caplog.records == []


def test_a_split_that_is_not_there(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "x/s-0.tar.gz", {"a": None})
    with pytest.raises(UserError, match="no clip has split 'valid': splits are not given"):
        opened(tmp_path / "x", "valid")
    put(tmp_path / "y/p/s-0.tar.gz", {"a": None})
    with pytest.raises(UserError, match=r"no clip has split 'valid': splits are \['p'\]"):
        opened(tmp_path / "y", "valid")
    # JSON may say it further on than is looked at: it is known when all has been read
    with pytest.raises(UserError, match=r"no clip has split 'valid': splits are \['test', 'train"):
        read(folders, "valid")
    assert "looking for 'valid' among the others" in caplog.text
    put(tmp_path / "z/s-0.tar.gz", {f"k{i}": "train" for i in range(30)} | {"last": "valid"})
    assert read(tmp_path / "z", "valid", batches=3) == ({"last"}, 0)


def test_a_split_that_shows_up_late_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "s-0.tar.gz", {f"k{i}": None for i in range(20)} | {"held": "test"})
    assert read(tmp_path, batches=60) == ({f"k{i}" for i in range(20)}, 0)
    assert "held" in read(tmp_path, "all", batches=60)[0]


def test_a_clip_whose_json_is_lost_has_no_known_split(tmp_path: Path) -> None:
    members = {"a.wav": WAV, "a.json": {"split": "train"}, "b.wav": WAV, "b.json": {"split": "t"}}
    whole = tar_bytes(members)
    (tmp_path / "s.tar").write_bytes(whole[: 2 * (512 + 2048) + 1024 + 100])
    for splits, wanted in ((["", "train"], ["a", "a"]), (None, ["a", "b"])):
        clips = SequentialClips(tmp_path, splits=splits, shuffle_clips=1)
        assert [clip.key for clip in itertools.islice(clips, 2)] == wanted


def test_a_data_set_is_known_by_names_sizes_and_splits(folders: Path) -> None:
    def of(split: str) -> str:
        return str(opened(folders, split).facts()["hash"])

    before = of("train")
    assert before == of("auto") != of("all") != of("test")
    put(folders / "test/s-0.tar.gz", {"e": None})
    assert of("train") == before  # what is not read does not matter
    put(folders / "train/s-1.tar.gz", {"d": "train", "g": "train"})
    after = of("train")
    assert after != before
    (folders / "train/s-1.tar.gz").rename(folders / "train/s-2.tar.gz")
    assert of("train") not in (before, after)
    (folders / "train/s-3.tar.gz").symlink_to("nowhere")
    assert len(of("train")) == 64


def test_unreadable_clips_in_a_row_are_not_lost_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_data, "TOO_MANY_IN_A_ROW", 2)
    bad = {f"b{i}.wav": b"RIFF no" for i in range(2)}
    (tmp_path / "s-0.tar").write_bytes(tar_bytes({**bad, "x.wav": WAV}))
    for i in range(1, 6):
        (tmp_path / f"s-{i}.tar").write_bytes(b"no tar")
    data = opened(tmp_path, "all")
    batches = list(itertools.islice(data.train_dataloader(), 4))
    assert [batch.keys for batch in batches] == [["x"]] * 4
    assert max(len(batch.skipped) for batch in batches) > 4
    (tmp_path / "s-0.tar").write_bytes(tar_bytes(bad))
    with pytest.raises(UserError, match="3 unreadable clips in a row"):
        next(iter(data.train_dataloader()))


def test_several_splits_and_audiosets_own(tmp_path: Path) -> None:
    names = ("train-balanced", "train-unbalanced", "test")
    for name, key in zip(names, "abc", strict=True):
        put(tmp_path / f"deep/{name}/s-0.tar.gz", {key: None})
    put(tmp_path / "flat/s-0.tar.gz", dict(zip("abc", names, strict=True)))
    for folder in ("deep", "flat"):
        assert read(tmp_path / folder) == ({"b"}, 0)
        assert read(tmp_path / folder, "train-balanced,train-unbalanced") == ({"a", "b"}, 0)
