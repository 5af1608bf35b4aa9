"""A shard's table and manifest: nothing impossible is believed, wherever it lies."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from bat.io import temporary, write_atomic
from bat.shard.in_place import index_in_place
from bat.shard.write import write_shards
from bat.tasks.base import AUDIO_SUFFIXES, Row
from tests.shard.files import WAV, confit, write_tar


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three clips, the middle one having two labels."""
    return three(tmp_path / "s.tar", "x", "y")


def three(path: Path, first: str, last: str, keys: str = "abc") -> Path:
    """A tar of three clips; the same size whatever the names."""
    members = confit(keys[0], {first: 0}) | confit(keys[1], {"x": 0, "y": 1})
    members[f"{keys[1]}.json"] |= {"split": "train", "fold": 2}
    return write_tar(path, members | confit(keys[2], {last: 1}))


def saved(path: Path, **changes: Any) -> Path:
    """The table of ``path`` with ``changes``, saved beside it."""
    place = path.with_suffix(".idx.npz")
    ShardTable(**vars(scan(path)) | changes).save(place)
    return place


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("codec", 200), ("codec", len(AUDIO_SUFFIXES)), ("split", 5), ("split", -2)),
        *(("size", 1 << 46), ("size", 0), ("size", -1), ("offset", 1 << 46), ("offset", 0)),
        *(("offset", (1 << 63) - 1), ("frames", -2), ("rate", -1), ("fold", -2), ("labels", 3)),
        *(("key", 0), ("key", 81)),
    ],
)
def test_load__impossible_clip_is_not_believed(path: Path, field: str, value: int) -> None:
    clips = scan(path).clips.copy()
    assert ShardTable.load(saved(path, clips=clips), path) is not None
    clips[field][1] = value
    assert ShardTable.load(saved(path, clips=clips), path) is None
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
        {"keys": np.frombuffer(b"abcd", np.uint8)},
        *({"names": ["x", 5]}, {"names": ["x"]}, {"ids": [0]}, {"ids": [0, "1"]}),
        *({"splits": [["train"]]}, {"splits": None}, {"left_out": ["x"]}, {"sha256": None}),
        *({"tar_bytes": 1 << 70}, {"tar_bytes": "x"}, {"mtime_ns": None}),
        {"names": ["x", "y", "never"], "ids": [0, 1, 2]},
    ],
)
def test_load__table_that_contradicts_itself(path: Path, changes: dict[str, Any]) -> None:
    assert ShardTable.load(saved(path, **changes), path) is None


def test_load__two_clips_in_one_place(path: Path) -> None:
    clips = scan(path).clips
    for field in ("offset", "size", "header"):  # b where a is
        clips[field][1] = clips[field][0]
    assert ShardTable.load(saved(path, clips=clips), path) is None


def test_load__files_that_are_no_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved(path)
    whole = place.read_bytes()
    assert ShardTable.load(place, path) is not None
    deep, vast, listed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(deep, head=np.frombuffer(b"[" * 200_000, np.uint8))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % (1 << 50)
    with zipfile.ZipFile(vast, "w") as file:
        text = header.ljust(117) + b"\n"
        file.writestr("head.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    np.savez(listed, head=np.frombuffer(json.dumps(["version"]).encode(), np.uint8))
    files = (deep, vast, listed)
    for data in (b"", whole[:100], b"PK rubbish", *(file.getvalue() for file in files)):
        place.write_bytes(data)
        assert ShardTable.load(place, path) is None
        assert len(open_index(path)) == 3
    saved(path)
    monkeypatch.setattr("bat.data.table.MAX_TABLE_BYTES", 100)  # of what it unpacks to
    assert ShardTable.load(place, path) is None


def test_open_index__tar_rewritten_at_the_same_size_is_indexed_anew(path: Path) -> None:
    before, then = open_index(path), path.stat()
    assert before.labels(0) == (0,)
    three(path, "y", "x")
    assert path.stat().st_size == then.st_size
    after = open_index(path)
    assert [after.vocabulary[i] for i in after.labels(0)] == ["y"]
    assert ShardTable.load(path.with_suffix(".idx.npz"), path) is not None  # made and kept


def test_read__tar_that_changes_while_it_is_open_gives_no_other_clip(path: Path) -> None:
    index = open_index(path)
    three(path, "x", "y", keys="cba")
    for i in (0, 2):
        with pytest.raises(OSError, match=r"s\.tar .*changed since it was indexed"):
            index.read(i)
    assert index.read(1).data == WAV


def test_open_index__copy_with_other_times_keeps_the_lengths_of_its_table(path: Path) -> None:
    place = path.with_suffix(".idx.npz")
    scan(path, probe=True).save(place)
    before = open_index(path)
    assert before.frames.min() > 0
    os.utime(path, ns=(1, 1))
    assert ShardTable.load(place, path) is None
    assert open_index(path).hash == before.hash
    assert ShardTable.load(place, path) is not None


def test_open_index__shard_that_is_not_its_manifests_any_more_is_refused(path: Path) -> None:
    index_in_place(path.parent)
    three(path, "y", "x")
    for reading in (open_index, index_in_place):
        with pytest.raises(UserError, match=r"s\.tar was changed since its manifest\.json"):
            reading(path.parent)
    (path.parent / "manifest.json").unlink()
    index_in_place(path.parent)
    assert open_index(path.parent).labels(0) == (1,)


def test_temporary__names_differ_between_machines_that_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "other/../host")
    names = {temporary(tmp_path / "x").name for _ in range(3)}
    assert len(names) == 3  # not by the pid alone
    assert all(name.startswith(f".x.other____host-{os.getpid()}-") for name in names)
    write_atomic(tmp_path / "x", b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- manifests


def test_manifest__counts(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = [
        {"labels": ("a", "b"), "fold": 1, "split": "train"},
        {"labels": ("b",), "fold": 2, "split": "train"},
        {"labels": (), "split": "test"},
        {"labels": ("b",), "fold": 1},
    ]
    rows = []
    for i, (more, rate) in enumerate(zip(said, (8000, 8000, 16_000, 16_000), strict=True)):
        wave = np.zeros(round(0.1 * (i + 1) * rate))
        (tmp_path / f"{i}.wav").write_bytes(encode(wave, sample_rate=rate, codec="wav"))
        rows.append(Row(tmp_path / f"{i}.wav", str(i), **more))
    manifest = write_shards(rows, tmp_path / "s", vocabulary=["c", "b", "a"], shard_bytes=8_000)
    assert (manifest.vocabulary, manifest.label_counts) == (["c", "b", "a"], [0, 3, 1])
    assert (manifest.splits, manifest.folds) == ({"test": 1, "train": 2}, {"1": 2, "2": 1})
    assert manifest.rates == {"8000": 2, "16000": 2}
    assert len(manifest.shards) > 1
    assert [s.seconds for s in manifest.shards][-1] == pytest.approx(0.4)
    assert manifest.seconds == pytest.approx(1.0)
    assert Manifest.load(tmp_path / "s") == manifest


def test_manifest__older_one_says_what_to_do(tmp_path: Path) -> None:
    old = {"shards": [], "source": "x", "version": 1, "clips": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="version 1, this bat reads 2: remove it and run bat-shard"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(old | {"version": 2}))
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(tmp_path)
