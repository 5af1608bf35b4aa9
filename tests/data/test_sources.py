"""Naming shards: folders, globs, braces, splits by folder, what is refused."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.data.index import NotIndexable, open_index
from bat.data.sources import Shard, find, names_of
from bat.errors import UserError
from tests.shard.files import WAV, write_tar


def test_find__many_ways_to_name_shards(tmp_path: Path) -> None:
    for i in range(11):
        write_tar(tmp_path / f"s/shard-{i:05d}.tar", {f"{i}.wav": WAV})

    def keys(source: Any) -> list[str]:
        index = open_index(source)
        return [index.key(i) for i in range(len(index))]

    assert keys(tmp_path / "s") == [str(i) for i in range(11)]
    assert keys(f"{tmp_path}/s/shard-0000[0-2].tar") == ["0", "1", "2"]
    assert keys(f"{tmp_path}/s/shard-{{00008..00010}}.tar") == ["8", "9", "10"]
    assert keys(f"{tmp_path}/s/shard-{{00008,00001}}.tar") == ["8", "1"]
    assert keys([tmp_path / "s/shard-00002.tar", f"{tmp_path}/s/shard-00000.tar"]) == ["2", "0"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "list of shards is empty"),
        ("none", "no shard at .*none"),
        ("none-*.tar", "no shard at"),
        ("s/shard-{0..1}.tar", "no shard at .*shard-1.tar"),
        (".", r"holds no \.tar shards: bat-shard \S+ OUT makes some"),
        ("s/x.txt", r"not a \.tar"),
        (["s/shard-0.tar", "s/shard-0.tar"], "listed twice"),
        ("empty", r"holds no \.tar shards: bat-shard \S+ OUT makes some"),
        ("s/none.tar", "no shard at"),
        ("s2", "hold no audio"),
    ],
)
def test_find__mistakes_in_naming_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("s/shard-0.tar"), {"a.wav": WAV})
    write_tar(Path("s2/a.tar"), {"a.txt": b"no audio"})
    Path("s/x.txt").touch()
    Path("empty").mkdir()
    if source == ".":
        for folder in ("s", "s2"):
            shutil.rmtree(folder)
    with pytest.raises(UserError, match=says):
        open_index(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("PIPE:curl x", "pipe: sources are refused.* say --allow-pipe"),
        ("simplecache::http://host/a.tar", "simplecache: sources are refused"),
        ("reference://x.json", "reference: sources are refused: give a path or a plain URL"),
        ("gopher://me:secret@host/a.tar?token=t", "unknown protocol in 'gopher://host/a.tar'"),
        ("gs://bucket/a.tar", "gs:// needs another package: .*gcsfs"),
    ],
)
def test_find__sources_that_are_refused_not_run(source: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_index(source)


def test_find__sub_folders_are_splits_unless_the_json_says_another(tmp_path: Path) -> None:
    member = {"a.wav": WAV, "b.wav": WAV, "b.json": {"split": "valid"}}
    write_tar(tmp_path / "train/s-0.tar", member)
    write_tar(tmp_path / "test/s-0.tar", {"c.wav": WAV})
    write_tar(tmp_path / "none/deeper/s-0.tar", {"d.wav": WAV})
    index = open_index(tmp_path)
    assert index.splits == ["test", "train", "valid"]
    assert [index.key(i) for i in range(len(index))] == ["c", "a", "b"]
    assert index.split.tolist() == [0, 1, 2]
    assert index.clips_in_split("train").tolist() == [1]
    assert [index.shard_name(i) for i in range(3)] == ["test/s-0.tar", *["train/s-0.tar"] * 2]
    assert open_index(tmp_path / "train").splits == ["valid"]
    assert open_index(tmp_path / "train").split.tolist() == [-1, 0]
    assert open_index(f"file://{tmp_path}/train").shard_name(0) == "s-0.tar"


def test_find__each_clip_knows_its_source(tmp_path: Path) -> None:
    for name, clips in (("one/a", "x"), ("one/b", "y"), ("two/a", "zw")):
        write_tar(tmp_path / f"{name}.tar", {f"{key}.wav": WAV for key in clips})
    index = open_index([tmp_path / "two", tmp_path / "one"])
    assert index.source.tolist() == [0, 0, 1, 1]
    assert index.source.dtype == np.int16
    assert [index.shard_name(i) for i in range(4)] == ["two/a.tar"] * 2 + ["one/a.tar", "one/b.tar"]
    assert index.shard_bytes.tolist() == [
        (tmp_path / f"{name}.tar").stat().st_size for name in ("two/a", "one/a", "one/b")
    ]
    assert (index.remote, index.fits) == (False, True)
    index.prefetch([0, 1])  # nothing to do


def test_find__compressed_tars_cannot_be_indexed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    for source in (tmp_path, tmp_path / "a.tar.gz", "http://host/a.tgz"):
        with pytest.raises(NotIndexable, match=r"a\.t(ar\.)?gz is compressed"):
            open_index(source)


def test_find__two_kinds_of_shards_in_a_folder_are_not_silently_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/b.tar", {"a.wav": WAV})
    write_tar(tmp_path / "s/.hidden/c.tar", {"b.wav": WAV})
    assert len(open_index(tmp_path / "s")) == 1
    other = tmp_path / "s/a.tar.gz"
    other.touch()
    with pytest.raises(UserError, match=r"/s holds a\.tar\.gz and b\.tar: two kinds"):
        open_index(tmp_path / "s")
    assert len(open_index(f"{tmp_path}/s/*.tar")) == 1
    other.unlink()
    write_tar(tmp_path / "s/train/d.tar", {"d.wav": WAV})
    with pytest.raises(UserError, match=r"/s holds b\.tar and train/d\.tar: two kinds"):
        open_index(tmp_path / "s")
    assert open_index([f"{tmp_path}/s/*.tar", tmp_path / "s/train"]).source.tolist() == [0, 1]


def test_find__one_shard_under_two_names_is_listed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "A/x.tar", {"a.wav": WAV})
    (tmp_path / "L").symlink_to("A")
    for other in ("A", "A/../A/x.tar", "L", f"file://{tmp_path}/A"):
        with pytest.raises(UserError, match=r"shard x\.tar is listed twice"):
            open_index([tmp_path / "A", other])
    url = "http://me:pw@h/x.tar?id=1&X-Amz-Signature="
    assert Shard(url + "a").identity == Shard("http://h/x.tar?sig=b&id=1").identity
    assert Shard(url + "a").identity != Shard("http://h/x.tar?id=2").identity


def test_find__names_grow_until_they_differ_and_show_no_query(tmp_path: Path) -> None:
    places = ("x/train/a.tar", "y/train/a.tar", "y/train/b.tar")
    for i, place in enumerate(places):
        write_tar(tmp_path / place, {f"{i}.wav": WAV, f"{i}b.json": b"["})
    index = open_index([tmp_path / "x/train", tmp_path / "y/train"])
    assert [index.shard_name(i) for i in range(3)] == list(places)
    assert sorted(index.left_out) == [f"{place}/{i}b.json" for i, place in enumerate(places)]
    secret = "?X-Amz-Credential=a/b/secret&token=c/d"
    urls = [Shard("http://h/p/a%20b.tar" + secret), Shard("http://me:pw@g/p/a%20b.tar" + secret)]
    assert names_of(urls) == ["h/p/a b.tar", "g/p/a b.tar"]
    assert names_of(urls[:1]) == ["a b.tar"]


def test_find__sub_folders_are_called_as_splits_are(tmp_path: Path) -> None:
    for folder in ("Training", "dev", "part7"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s-0.tar").touch()
    assert [shard.split for shard in find(tmp_path)] == ["train", "valid", "part7"]
