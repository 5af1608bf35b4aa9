"""The index: foreign shards, hostile ones, stale tables, and how shards are named."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from bat.data import local_shards
from bat.data.index import Index, open_index
from bat.data.table import ShardTable, scan
from bat.data.tar import BLOCK
from bat.errors import UserError
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.shard.files import WAV, confit, write_tar


def test_index__confit_shards_are_read_in_place_with_their_own_numbers(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard-00000.tar", confit("Ya-_1", {"Speech": 0, "Music": 3}))
    write_tar(tmp_path / "shard-00001.tar", confit("Yb", {"Dog": 1}) | {"Yc.wav": WAV})
    index = open_index(tmp_path)
    assert index.vocabulary == ["Speech", "Dog", "class 2", "Music"]
    assert [index.key(i) for i in range(3)] == ["Ya-_1", "Yb", "Yc"]
    assert [index.labels(i) for i in range(3)] == [(0, 3), (1,), ()]
    assert index.targets(0).tolist() == [1, 0, 0, 1]
    assert index.labels_per_clip.tolist() == [2, 1, 0]
    assert index.read(1).data == index.read(2).data == WAV
    assert (index.frames.tolist(), index.rate.tolist()) == ([-1] * 3, [0] * 3)
    assert index.folds == []
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == [
        "shard-00000.idx.npz",
        "shard-00001.idx.npz",
    ]
    assert open_index(tmp_path).hash == index.hash


@pytest.mark.parametrize(
    ("metas", "vocabulary"),
    [
        ([{"label": ["b"]}, {"label": "a"}], ["a", "b"]),
        ([{"label_id": 1}, {"label_id": [0]}], ["0", "1"]),
        ([{"original_data": {"class_labels": ["x", "y"]}}, {"text": "no labels"}], ["x", "y"]),
        ([{"labels": ["b"], "label_id": [0]}, {"labels": ["a"], "label_id": [0]}], ["a", "b"]),
        ([{"label": ["b"], "label_id": [0]}, {"label": ["b"], "label_id": [1]}], ["b"]),
    ],
)
def test_index__label_fields_of_the_field(
    tmp_path: Path, metas: list[dict[str, Any]], vocabulary: list[str]
) -> None:
    members = {f"{i}.wav": WAV for i in range(2)} | {f"{i}.json": m for i, m in enumerate(metas)}
    write_tar(tmp_path / "a.tar", members)
    assert open_index(tmp_path).vocabulary == vocabulary


def test_index__dots_in_names_do_not_merge_clips(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {"song.v3.wav": WAV, "song.v3.json": {"label": "x"}, "song.v4.wav": WAV},
    )
    index = open_index(tmp_path)
    assert len(index) == 2
    assert index.labels_per_clip.tolist() == [1, 0]


def test_index__tar_cut_short_keeps_its_whole_clips_and_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.wav": WAV for i in range(3)})
    data = path.read_bytes()
    path.write_bytes(data[: 2 * (512 + 2048) + 600])
    assert scan(path).left_out["2.wav"] == "cut short: the tar ends before it"
    assert len(open_index(path)) == 2
    path.write_bytes(data[: 2 * (512 + 2048)])  # on a member's border
    assert scan(path).left_out == {"(end)": "no end marker: the tar may be cut short"}


@pytest.mark.parametrize("data", [b"", b"not a tar", b"x" * 5_000, WAV])
def test_index__what_is_not_a_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar is not a"):
        open_index(tmp_path)


def test_index__read_only_folder_uses_the_cache_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "ro/a.tar", {"a.wav": WAV})
    real = ShardTable.save

    def save(self: ShardTable, path: Path) -> None:
        if path.parent.name == "ro":
            raise PermissionError(13, "Permission denied")
        real(self, path)

    monkeypatch.setattr(ShardTable, "save", save)
    assert len(open_index(tmp_path / "ro")) == 1
    assert len(open_index(tmp_path / "ro", cache=tmp_path / "cache")) == 1
    assert len(list((tmp_path / "cache").glob("a-*.idx.npz"))) == 1
    monkeypatch.setattr(local_shards, "scan", None)  # not needed any more
    assert len(open_index(tmp_path / "ro", cache=tmp_path / "cache")) == 1


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(WAV)
    rows = [
        Row(tmp_path / f"{i}.wav", str(i), ("ab"[i % 2],), split="xy"[i // 2]) for i in range(4)
    ]
    write_shards(rows, tmp_path / "out", shard_bytes=8_000)
    return tmp_path / "out"


def test_index__shards_are_held_to_their_manifest(written: Path) -> None:
    last = written / "shard-00001.tar"
    data = last.read_bytes()
    last.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"has \d+ bytes, its manifest.json says \d+: copy it"):
        open_index(written)
    last.unlink()
    with pytest.raises(UserError, match=r"lacks shard-00001.tar, which its manifest"):
        open_index(written)
    assert len(open_index(written / "shard-00000.tar")) == 2
    (written / "manifest.json").write_text('{"source": 1}')
    with pytest.raises(UserError, match="is damaged"):
        open_index(written)
    (written / "manifest.json").write_text('{"another": "program"}')
    assert len(open_index(written)) == 2


def test_index__splits_and_selections(written: Path) -> None:
    index = open_index(written)
    assert index.splits == ["x", "y"]
    assert index.clips_in_split("y").tolist() == [2, 3]
    both = index.clips_in_split("y, x").tolist()
    assert both == sorted(both)
    assert set(both) == {2, 3, *index.clips_in_split("x").tolist()}
    with pytest.raises(UserError, match=r"no clip has split 'z': the data has the splits x ., y 2"):
        index.clips_in_split("z")
    with pytest.raises(UserError, match="no clip has fold 1: folds are not given"):
        index.clips_in_fold(1)


def test_index__data_sets_of_different_labels_do_not_mix(written: Path, tmp_path: Path) -> None:
    rows = [Row(tmp_path / "0.wav", "other", ("c",))]
    write_shards(rows, tmp_path / "other", vocabulary=["a", "b", "c"])
    with pytest.raises(UserError, match=r"different labels \('c' is in one only"):
        open_index([written, tmp_path / "other"])
    write_shards(rows, tmp_path / "same", vocabulary=["c"])
    with pytest.raises(UserError, match="different labels"):
        open_index([tmp_path / "other", tmp_path / "same"])
    write_shards([Row(tmp_path / "0.wav", "third", ())], tmp_path / "none")
    assert open_index([written, tmp_path / "none"]).vocabulary == ["a", "b"]


def test_index__labels_are_dropped_where_asked(written: Path, tmp_path: Path) -> None:
    write_shards([Row(tmp_path / "0.wav", "other", ("c",))], tmp_path / "other")
    index = open_index([written, tmp_path / "other"], labels="drop")
    assert (len(index), index.vocabulary, index.classes) == (5, [], 0)
    assert index.labels_per_clip.tolist() == [0] * 5
    assert index.read(4).labels == ()
    assert index.targets(0).shape == (0,)
    assert index.splits == ["x", "y"]


def test_index__folds_partition(toy_index: Index) -> None:
    assert toy_index.folds == [1, 2]
    for fold in (1, 2):
        held, rest = toy_index.clips_in_fold(fold), toy_index.clips_not_in_fold(fold)
        assert sorted([*held, *rest]) == list(range(10))
        assert sorted(k for i in held for k in toy_index.labels(i)) == list(range(5))


def test_index__hash_is_of_the_content_not_of_the_place(toy_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_shards, tmp_path / "copy")
    assert open_index(tmp_path / "copy").hash == open_index(toy_shards).hash
    assert open_index(toy_shards / "shard-00000.tar").hash != open_index(toy_shards).hash


def test_index__reading_after_a_fork_and_after_pickling(toy_index: Index) -> None:
    data = toy_index.read(3).data
    copy = pickle.loads(pickle.dumps(toy_index))
    assert copy.read(3).data == data
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"same" if toy_index.read(3).data == data else b"other")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 5) == b"same"
    assert toy_index.read(3).data == data


def test_index__clip_whose_json_is_cut_off_is_left_out(tmp_path: Path) -> None:
    """Not kept without labels: it has some."""
    path = write_tar(tmp_path / "a.tar", confit("a", {"x": 0}) | confit("b", {"x": 0}))
    whole = path.read_bytes()
    header = whole.index(b"b.json")
    for end in (header + BLOCK + 5, header + 100, header):
        path.write_bytes(whole[:end])
        index = open_index(path)
        assert [index.key(i) for i in range(len(index))] == ["a"]
        assert index.left_out["a.tar/b.wav"].startswith("its JSON cannot be read: ")
        assert len(open_rows(path).rows) == 1
    write_tar(path, {"a.wav": WAV, "b.wav": WAV})
    path.write_bytes(path.read_bytes()[: 2 * (BLOCK + 2048)])
    assert len(open_index(path)) == 2  # no clip has labels
