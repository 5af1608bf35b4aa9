"""Reading shards from front to end: order, dealing, splits, faults, safety."""

from __future__ import annotations

import gzip
import itertools
import logging
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from bat.data import sequential
from bat.data.index import NotIndexable, open_index
from bat.data.sequential import SequentialBatches, SequentialData
from bat.data.sources import RetryPolicy, find
from bat.errors import UserError
from bat.types import Clip, Skipped
from tests.data.http_server import FaultyServer
from tests.shard.files import WAV, tar_bytes

RUBBISH = b"\x1f\x8b rubbish"


def make(folder: Path, shards: int, clips: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        members: dict[str, Any] = {}
        for c in range(clips):
            members |= {f"k{s}-{c}.wav": WAV, f"k{s}-{c}.json": {"label": "ab"[c % 2]}}
        (folder / f"s-{s}.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    return folder


def batches(source: str | Path, **options: Any) -> SequentialBatches:
    """Batches of one clip."""
    how: dict[str, Any] = {"batch": 1, "sample_rate": 16_000, "clip_seconds": 0.05}
    return SequentialBatches(find(source), **(how | options))


def keys(stream: Any, count: int) -> list[str]:
    return [key for batch in itertools.islice(stream, count) for key in batch.keys]


def read_once(folder: Path, **options: Any) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Keys of the shards in their own order, and what was skipped: (key, kind, why)."""
    stream = batches(folder, **options)
    found = [item for n in range(len(stream.shards)) for item in stream._clips(n)]
    clips = [item.key for item in found if isinstance(item, Clip)]
    return clips, [(s.key, s.kind, s.why) for s in found if isinstance(s, Skipped)]


# ---- the order


def test_epoch__holds_every_clip_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, 5, 4)
    with pytest.raises(NotIndexable):
        open_index(tmp_path)
    clips = batches(tmp_path, seed=3, shuffle_clips=6)
    stream = keys(clips, 60)
    epochs = [stream[i : i + 20] for i in (0, 20, 40)]
    everything = sorted(f"k{s}-{c}" for s in range(5) for c in range(4))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(batches(tmp_path, seed=3, shuffle_clips=6), 60) == stream
    assert keys(batches(tmp_path, seed=4, shuffle_clips=6), 60) != stream
    later = keys(batches(tmp_path, seed=3, epoch=1, shuffle_clips=1), 20)
    assert sorted(later) == everything
    assert [k[:2] for k in later[::4]] == [f"k{s}" for s in clips.order(1)]


@pytest.mark.parametrize(("shards", "readers"), [(5, 2), (6, 3), (4, 4), (2, 3), (1, 4)])
def test_readers__share_the_work_evenly(tmp_path: Path, shards: int, readers: int) -> None:
    make(tmp_path, shards, 12)
    epochs = readers  # so many are dealt whole, however the numbers divide
    seen: Counter[str] = Counter()
    for rank in range(readers):
        stream = batches(tmp_path, rank=rank, world=readers, shuffle_clips=1)
        seen.update(keys(stream, 12 * shards * epochs // readers))
    assert set(seen.values()) == {epochs}
    assert len(seen) == 12 * shards


def test_readers__are_the_loader_workers_of_all_ranks(tmp_path: Path) -> None:
    make(tmp_path, 4, 6)
    seen: Counter[str] = Counter()
    for rank in range(2):
        stream = batches(tmp_path, rank=rank, world=2, batch=3)
        seen.update(keys(DataLoader(stream, batch_size=None, num_workers=2), 4))
    assert (len(seen), set(seen.values())) == (24, {1})


def test_window__is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1, 60)
    natural = {f"k0-{c}": c for c in range(60)}
    early = {}
    for bound in (3, 1000):
        monkeypatch.setattr(sequential, "WINDOW_BYTES", bound * len(WAV))
        got = keys(batches(tmp_path), 60)
        assert sorted(got) == sorted(natural)
        early[bound] = max(natural[key] - place for place, key in enumerate(got))
    assert early[3] == 3
    assert early[1000] > 20


# ---- what a shard may hold


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_clips__long_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "x" * 60
    (tmp_path / "a.tar").write_bytes(tar_bytes({f"./{long}.wav": WAV, "b.wav": WAV}, format))
    assert read_once(tmp_path) == ([open_index(tmp_path).key(0), "b"], [])


def test_clips__shard_that_breaks_off_is_left_there(tmp_path: Path) -> None:
    whole = tar_bytes({f"{i}.wav": WAV for i in range(3)})
    member = 512 + 2048
    damaged = bytearray(whole)
    damaged[member : member + 40] = b"\xff" * 40
    huge_name = tarfile.TarInfo("x")
    huge_name.type, huge_name.size = tarfile.XHDTYPE, 7 << 30
    for name, data, kept, why in (
        ("cut", whole[: 2 * member + 600], 2, f"breaks off at byte {2 * member + 600}"),
        ("border", whole[: 2 * member], 2, f"ends at byte {2 * member} without an end mark"),
        ("damaged", bytes(damaged), 1, f"damaged at byte {member}"),
        ("none", b"not a tar at all", 0, "not a tar"),
        ("empty", b"", 0, "not a tar"),
        ("packed", gzip.compress(whole)[:-20], 0, ""),
        ("name", huge_name.tobuf() + whole, 0, f"a name of {7 << 30} bytes"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(data)
        found, skipped = read_once(folder)
        assert len(found) >= kept, name
        assert [(s[0], s[1]) for s in skipped] == [("", "unreadable")], name
        assert why in skipped[0][2]


def test_clips__of_a_lost_json_have_no_known_split(tmp_path: Path) -> None:
    members = {"a.wav": WAV, "a.json": {"split": "train"}, "b.wav": WAV, "b.json": {"split": "t"}}
    whole = tar_bytes(members)
    (tmp_path / "s.tar").write_bytes(whole[: 2 * (512 + 2048) + 1024 + 100])
    assert read_once(tmp_path, splits=["", "train"])[0] == ["a"]
    assert read_once(tmp_path)[0] == ["a", "b"]


# ---- what ends the reading


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_shards__few_are_counted_and_many_are_an_error(tmp_path: Path, workers: int) -> None:
    make(tmp_path, 30, 2)
    (tmp_path / "s-0.tar.gz").write_bytes(RUBBISH)
    data = SequentialData(
        [tmp_path], batch=2, sample_rate=16_000, clip_seconds=0.05, workers=workers
    )
    made = list(itertools.islice(data.train_dataloader(), 80))
    assert len({key for batch in made for key in batch.keys}) == 58
    assert {s.shard for batch in made for s in batch.skipped} == {"s-0.tar.gz"}
    for s in range(1, 6):
        (tmp_path / f"s-{s}.tar.gz").write_bytes(RUBBISH)
    with pytest.raises(UserError, match=r"6 of the latest \d+ shards broke off .* max_bad=0.05"):
        list(itertools.islice(data.train_dataloader(), 400))


def test_no_clip_at_all__is_an_error_with_the_reason(tmp_path: Path) -> None:
    make(tmp_path, 2, 1)
    for s in range(2):
        (tmp_path / f"s-{s}.tar.gz").write_bytes(RUBBISH)
    with pytest.raises(UserError, match=r"none of the 2 shards gave a clip \(the last: s-"):
        next(iter(batches(tmp_path)))
    (tmp_path / "x/s.tar").parent.mkdir()
    (tmp_path / "x/s.tar").write_bytes(tar_bytes({"a.txt": b"x"}))
    with pytest.raises(UserError, match="they hold no audio"):
        next(iter(batches(tmp_path / "x")))


def test_unreadable_clips__too_many_in_a_row_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "TOO_MANY_IN_A_ROW", 2)
    bad = {f"b{i}.wav": b"RIFF no" for i in range(2)}
    (tmp_path / "s.tar").write_bytes(tar_bytes({**bad, "x.wav": WAV}))
    made = list(itertools.islice(batches(tmp_path), 3))
    assert [batch.keys for batch in made] == [["x"]] * 3
    assert max(len(batch.skipped) for batch in made) == 2
    (tmp_path / "s.tar").write_bytes(tar_bytes(bad))
    with pytest.raises(UserError, match="3 unreadable clips in a row"):
        next(iter(batches(tmp_path)))


def test_remote_shards__through_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 3, 4)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with FaultyServer(tmp_path) as server:
        source = f"{server.url}/s-{{0..2}}.tar.gz"
        server.faults["s-1.tar.gz"] = ["500", "", "drop:300"]
        stream = batches(source, policy=RetryPolicy(5, 0.5))
        wanted = sorted(f"k{s}-{c}" for s in range(3) for c in range(4))
        assert sorted(keys(stream, 12)) == wanted
        server.faults["s-1.tar.gz"] = ["500*"]
        made = list(itertools.islice(batches(source, policy=RetryPolicy(2, 0.5)), 16))
        assert {batch.keys[0][:2] for batch in made} == {"k0", "k2"}
        said = [skip.why for batch in made for skip in batch.skipped]
        assert "cannot be reached: HTTP 500 (2 tries)" in said[0]


# ---- splits


def put(path: Path, clips: Mapping[str, str | None]) -> None:
    """A packed shard of clips with the split that their JSON says."""
    members: dict[str, object] = {}
    for key, split in clips.items():
        said = {"label": "a"} | ({} if split is None else {"split": split})
        members |= {f"{key}.wav": WAV, f"{key}.json": said}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(tar_bytes(members)))


def opened(folder: Path, split: str = "auto") -> SequentialData:
    return SequentialData([folder], batch=1, sample_rate=16_000, clip_seconds=0.05, split=split)


def read(folder: Path, split: str = "auto") -> tuple[str, int]:
    """Keys that a stream gives, and how many it counts as skipped."""
    made = list(itertools.islice(opened(folder, split).train_dataloader(), 24))
    keys = sorted({key for batch in made for key in batch.keys})
    return "".join(keys), sum(len(batch.skipped) for batch in made)


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
def test_split__folders_name_it_and_json_goes_before(
    folders: Path, split: str, wanted: str
) -> None:
    assert read(folders, split) == (wanted, 0)


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("auto", "ace"), ("train", "ae"), ("test, valid", "bdf"), ("valid", "f"), ("all", "abcdef")],
)
def test_split__json_alone_names_it(flat: Path, split: str, wanted: str) -> None:
    assert read(flat, split) == (wanted, 0)


def test_split__auto_says_what_it_takes(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bat")
    assert len(opened(folders).shards) == 2
    assert "split train; data.split=all takes test too" in caplog.text
    caplog.clear()
    put(tmp_path / "w/dev/s-0.tar.gz", {"c": None})
    with pytest.raises(UserError, match="the splits valid: none of them is called train"):
        opened(tmp_path / "w")  # dev is valid
    put(tmp_path / "z/south/s-0.tar.gz", {"c": None})
    assert read(tmp_path / "z") == ("c", 0)
    (record,) = caplog.records
    assert "none of the splits (south) is called train; data.split=NAME" in record.message
    for name in ("train-balanced", "train-unbalanced", "test"):
        put(tmp_path / f"as/{name}/s-0.tar.gz", {name[-3]: None})
    assert read(tmp_path / "as") == ("c", 0)
    assert read(tmp_path / "as", "train-balanced,train-unbalanced") == ("c", 0)


def test_split__that_no_clip_has_is_an_error_when_all_is_read(flat: Path, tmp_path: Path) -> None:
    says = r"none has split 'other'; splits are test, train, valid; see data\.split"
    with pytest.raises(UserError, match=says):
        read(flat, "other")
    put(tmp_path / "y/s-0.tar.gz", {"a": "north"})
    with pytest.raises(UserError, match=r"has split 'train' or .*; splits are north"):
        read(tmp_path / "y")


def test_identity__is_of_names_sizes_and_splits(folders: Path) -> None:
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
    with pytest.raises(UserError, match="list of shards is empty"):
        SequentialData([], batch=1, sample_rate=16_000, clip_seconds=0.05)
