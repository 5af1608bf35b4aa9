"""A shard's table: nothing impossible is believed, wherever the table lies."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.data import tar as tars
from bat.data.index import open_index
from bat.data.table import ShardTable, scan
from bat.data.tar import temporary, write_atomic
from bat.errors import UserError
from bat.shard.in_place import index_in_place
from bat.tasks.base import AUDIO_SUFFIXES
from tests.data.test_index import WAV, confit, tar_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three clips, the middle one having two labels."""
    members = confit("a", {"x": 0}) | confit("b", {"x": 0, "y": 1}) | confit("c", {"y": 1})
    members["b.json"] |= {"split": "train", "fold": 2}
    return tar_of(tmp_path / "s.tar", members)


def saved(path: Path, **changes: Any) -> Path:
    """The table of ``path`` with ``changes``, saved beside it."""
    table = scan(path)
    place = path.with_suffix(".idx.npz")
    ShardTable(**vars(table) | changes).save(place)
    return place


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codec", 200),
        ("codec", len(AUDIO_SUFFIXES)),
        ("split", 5),
        ("split", -2),
        ("size", 1 << 46),
        ("size", 0),
        ("size", -1),
        ("offset", 1 << 46),
        ("offset", (1 << 63) - 1),
        ("offset", 0),
        ("frames", -2),
        ("rate", -1),
        ("fold", -2),
        ("labels", 3),
        ("key", 0),
        ("key", 81),
    ],
)
def test_a_middle_clip_that_is_impossible(path: Path, field: str, value: int) -> None:
    good = scan(path)
    clips = good.clips.copy()
    assert ShardTable.load(saved(path, clips=clips), path) is not None
    clips[field][1] = value
    place = saved(path, clips=clips)
    assert ShardTable.load(place, path) is None
    index = open_index(path)  # scanned instead
    assert [index.read(i).data for i in range(3)] == [WAV] * 3
    assert index.labels(1) == (0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.array([0, 0, 2, 1], np.int32)},
        {"labels": np.array([0, 0, -1, 1], np.int32)},
        {"labels": np.array([0, 0, 1], np.int32)},
        {"labels": np.array([0, 0, 1, 1], np.float32)},
        {"labels": np.array([[0, 0, 1, 1]], np.int32)},
        {"keys": np.frombuffer(b"a\x1bc", np.uint8)},
        {"keys": np.frombuffer(b"a\xffc", np.uint8)},
        {"keys": np.frombuffer(b"abcd", np.uint8)},
        {"names": ["x", 5]},
        {"names": ["x"]},
        {"ids": [0]},
        {"ids": [0, "1"]},
        {"splits": [["train"]]},
        {"splits": None},
        {"left_out": ["x"]},
        {"sha256": None},
        {"tar_bytes": 1 << 70},
        {"tar_bytes": "x"},
        {"mtime_ns": None},
        {"names": ["x", "y", "never"], "ids": [0, 1, 2]},
    ],
)
def test_a_table_that_contradicts_itself(path: Path, changes: dict[str, Any]) -> None:
    assert ShardTable.load(saved(path, **changes), path) is None


def test_two_clips_in_one_place(path: Path) -> None:
    clips = scan(path).clips
    for field in ("offset", "size", "header"):  # b where a is
        clips[field][1] = clips[field][0]
    assert ShardTable.load(saved(path, clips=clips), path) is None


def swap(path: Path) -> None:
    """Rewrite the tar: a's and c's audio and labels swapped, at the same size."""
    members = confit("a", {"y": 1}) | confit("b", {"x": 0, "y": 1}) | confit("c", {"x": 0})
    members["b.json"] |= {"split": "train", "fold": 2}
    tar_of(path, members)


def test_a_tar_rewritten_at_the_same_size_is_indexed_anew(path: Path) -> None:
    before, then = open_index(path), path.stat()
    assert before.labels(0) == (0,)
    swap(path)
    assert path.stat().st_size == then.st_size
    after = open_index(path)
    assert [after.vocabulary[i] for i in after.labels(0)] == ["y"]
    assert ShardTable.load(path.with_suffix(".idx.npz"), path) is not None  # made and kept


def test_a_tar_that_changes_while_it_is_open_gives_no_other_clip(path: Path) -> None:
    index = open_index(path)
    members = confit("c", {"x": 0}) | confit("b", {"x": 0, "y": 1}) | confit("a", {"y": 1})
    members["b.json"] |= {"split": "train", "fold": 2}
    tar_of(path, members)
    for i in (0, 2):
        with pytest.raises(OSError, match=r"s\.tar .*changed since it was indexed"):
            index.read(i)
    assert index.read(1).data == WAV


def test_a_copy_with_other_times_keeps_the_lengths_of_its_table(path: Path) -> None:
    place = path.with_suffix(".idx.npz")
    scan(path, probe=True).save(place)
    before = open_index(path)
    assert before.frames.min() > 0
    os.utime(path, ns=(1, 1))
    assert ShardTable.load(place, path) is None
    assert open_index(path).hash == before.hash
    assert ShardTable.load(place, path) is not None


def test_a_shard_that_is_not_its_manifests_any_more_is_refused(path: Path) -> None:
    index_in_place(path.parent)
    swap(path)
    with pytest.raises(UserError, match=r"s\.tar was changed since its manifest\.json"):
        open_index(path.parent)
    with pytest.raises(UserError, match=r"s\.tar was changed since its manifest\.json"):
        index_in_place(path.parent)
    (path.parent / "manifest.json").unlink()
    index_in_place(path.parent)
    assert open_index(path.parent).labels(0) == (1,)


def test_files_that_are_no_tables(path: Path) -> None:
    place = saved(path)
    whole = place.read_bytes()
    assert ShardTable.load(place, path) is not None
    deep = io.BytesIO()
    np.savez(deep, head=np.frombuffer(b"[" * 200_000, np.uint8))
    vast = io.BytesIO()
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % (1 << 50)
    with zipfile.ZipFile(vast, "w") as file:
        text = header.ljust(117) + b"\n"
        file.writestr("head.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    listed = io.BytesIO()
    np.savez(listed, head=np.frombuffer(json.dumps(["version"]).encode(), np.uint8))
    files = (deep, vast, listed)
    for data in (b"", whole[:100], b"PK rubbish", *(file.getvalue() for file in files)):
        place.write_bytes(data)
        assert ShardTable.load(place, path) is None
    place.write_bytes(b"")
    assert len(open_index(path)) == 3


def test_a_table_that_unpacks_to_too_much(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved(path)
    with np.load(place) as file:
        parts = {name: file[name] for name in file.files}
    np.savez_compressed(place, zeros=np.zeros(100_000), **parts)
    assert ShardTable.load(place, path) is not None
    monkeypatch.setattr("bat.data.table.MAX_TABLE_BYTES", 100_000)
    assert place.stat().st_size < 10_000
    assert ShardTable.load(place, path) is None


def test_temporary_names_differ_between_machines_that_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = temporary(tmp_path / "x")
    monkeypatch.setattr(tars.socket, "gethostname", lambda: "other/../host")
    names = {one.name, temporary(tmp_path / "x").name, temporary(tmp_path / "x").name}
    assert len(names) == 3  # not by the pid alone
    assert {temporary(tmp_path / "x").parent, one.parent} == {tmp_path}
    assert sum(f".x.other____host-{os.getpid()}-" in name for name in names) == 2
    write_atomic(tmp_path / "x", b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
