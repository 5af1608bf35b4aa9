"""Shards asked for again: the same files, changed ones, shards that are gone; what was absent."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.manifest import Manifest
from bat.errors import UserError
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks.base import LeftOut, Row, load_task
from tests.shard.test_write import contents, rows, wave_file

__all__ = ["rows"]  # the fixture


def rewrite(path: Path) -> None:
    """Other audio of the same length, a moment later."""
    then, size = path.stat().st_mtime_ns, path.stat().st_size
    path.write_bytes(encode(np.full(800, 0.25), sample_rate=16_000, codec="wav"))
    assert path.stat().st_size == size
    os.utime(path, ns=(then, then + 1_000_000))


def test_a_file_written_again_with_the_same_length_is_another(tmp_path: Path) -> None:
    for name in ("dog/1.wav", "cat/1.wav"):
        wave_file(tmp_path / "data" / name)
    task = load_task("folder")
    rows, _ = task.read(tmp_path / "data")
    write_shards(rows, tmp_path / "s")
    rewrite(tmp_path / "data/cat/1.wav")
    with pytest.raises(UserError, match="complete set of 2 clips from other files"):
        write_shards(rows, tmp_path / "s")


def test_a_tar_written_again_is_another_source(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "s")
    found = open_rows(tmp_path / "s").rows
    write_shards(found, tmp_path / "again", codec="flac")
    tar = tmp_path / "s/shard-00000.tar"
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1_000_000))
    with pytest.raises(UserError, match="from other files"):
        write_shards(found, tmp_path / "again", codec="flac")


def test_a_copy_without_its_times_differs_in_the_source_alone(
    rows: list[Row], tmp_path: Path
) -> None:
    one = write_shards(rows, tmp_path / "one", shard_bytes=11_000)
    for row in rows:
        os.utime(row.path, ns=(0, 1_000_000))
    two = write_shards(rows, tmp_path / "two", shard_bytes=11_000)
    assert one.source != two.source
    assert replace(two, source=one.source) == one
    left, right = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in left if left[name] != right[name]} == {"manifest.json"}


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("gone", "shard-00001.tar is missing: copy it again, or remove the folder and run"),
        ("cut", r"shard-00001.tar has 5000 bytes, its manifest.json says \d+: copy it again"),
    ],
)
def test_a_complete_set_that_lost_a_shard_is_told(
    rows: list[Row], tmp_path: Path, harm: str, says: str
) -> None:
    write_shards(rows, tmp_path / "s", shard_bytes=11_000)
    shard = tmp_path / "s/shard-00001.tar"
    if harm == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 5_000)
    with pytest.raises(UserError, match=says):
        write_shards(rows, tmp_path / "s", shard_bytes=11_000)


def test_what_the_source_lacks_is_in_the_manifest(rows: list[Row], tmp_path: Path) -> None:
    rows[1].path.write_bytes(b"no audio at all")
    absent = [LeftOut('Y\'"left_out": []', "Yä", "no file", "train"), LeftOut("b", "c", "d")]
    manifest = write_shards(rows, tmp_path / "s", left_out=absent)
    assert [entry["key"] for entry in manifest.left_out] == [absent[0].key, "b", "song.v3"]
    assert manifest.left_out[1] == {"key": "b", "file": "c", "reason": "d"}
    assert Manifest.load(tmp_path / "s") == manifest
    lines = (tmp_path / "s/manifest.json").read_text().splitlines()
    assert lines.count('  {"key": "b", "file": "c", "reason": "d"},') == 1
