"""``write_shards``: the format, that it is the same twice, and what the manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bat.audio.decode import decode
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks.base import LeftOut, Row, load_task
from tests.shard.files import audio, clips, contents, noise, recording, write_tar


def packed(root: Path, out: Path) -> Manifest:
    """Writes the files below ``root`` as shards in ``out``."""
    rows, names = load_task("folder").read(root)
    return write_shards(rows, out, vocabulary=names)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return [
        replace(
            recording(tmp_path / f"in/{i}.wav", noise(i, 0.05)),
            key=name,
            labels=("x",) if i % 2 else ("y", "x"),
            fold=i,
        )
        for i, name in enumerate(["a", "song.v3", "song.v4", "ü/ß", "b"])
    ]


def test_write_shards__esc10_reads_back_with_webdataset_and_with_the_index(
    esc10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_rows, names = load_task("esc10").read(esc10)
    rows = all_rows[::20]
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=1_000_000, vocabulary=names)
    assert manifest.clips == 20
    assert len(manifest.shards) >= 2
    assert manifest.seconds == pytest.approx(100, abs=3)
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    urls = [str(tmp_path / "s" / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    index = open_index(tmp_path / "s")
    assert len(samples) == len(index) == 20
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        clip, meta = index.read(i), json.loads(sample["json"])
        assert clip.key == sample["__key__"] == row.key == meta["id"]
        assert clip.data == sample["ogg"] == row.path.read_bytes()
        assert meta["label"] == list(row.labels) == [index.vocabulary[k] for k in clip.labels]
        assert meta["label_id"] == list(clip.labels)
        assert (meta["fold"], meta["start_seconds"]) == (row.fold, 0.0)
        assert (meta["num_samples"], meta["sample_rate"]) == (index.frames[i], index.rate[i])
        assert len(decode(clip.data, sample_rate=44_100)) == index.frames[i]
    for fold in index.folds:
        wanted = [i for i, row in enumerate(rows) if row.fold == fold]
        assert index.clips_in_fold(fold).tolist() == wanted


def test_write_shards__same_bytes_from_anywhere(rows: list[Row], tmp_path: Path) -> None:
    one = write_shards(rows, tmp_path / "one", shard_bytes=11_000)
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere/in")
    moved = [replace(r, path=tmp_path / "elsewhere/in" / r.path.name) for r in rows]
    write_shards(moved, tmp_path / "two", shard_bytes=11_000)
    wanted = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == wanted
    assert set(wanted) == {
        "manifest.json",
        *(f"shard-{i:05d}{end}" for i in range(2) for end in (".tar", ".idx.npz")),
    }
    for row in rows:  # a copy without its times differs in the source alone
        os.utime(row.path, ns=(0, 1_000_000))
    three = write_shards(rows, tmp_path / "three", shard_bytes=11_000)
    assert one.source != three.source
    assert replace(three, source=one.source) == one
    found = contents(tmp_path / "three")
    assert {name for name in wanted if wanted[name] != found[name]} == {"manifest.json"}


def test_write_shards__tars_are_plain_and_match_the_manifest(
    rows: list[Row], tmp_path: Path
) -> None:
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=11_000)
    assert [s.clips for s in manifest.shards] == [3, 2]
    for shard in manifest.shards:
        data = (tmp_path / "s" / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert data[257:265] == b"ustar\x0000"
        with tarfile.open(tmp_path / "s" / shard.name) as tar:
            assert {(m.mtime, m.uid, m.uname, m.isreg()) for m in tar} == {(0, 0, "bat", True)}
    assert manifest.bytes == sum(s.bytes for s in manifest.shards)
    assert manifest.vocabulary == ["x", "y"]
    assert Manifest.load(tmp_path / "s") == manifest
    written = open_index(tmp_path / "s")
    for path in (tmp_path / "s").glob("*.idx.npz"):
        path.unlink()
    rebuilt = open_index(tmp_path / "s")
    assert rebuilt.hash == written.hash
    assert np.array_equal(rebuilt.offset, written.offset)


def test_write_shards__keys_are_escaped_and_stay_apart(rows: list[Row], tmp_path: Path) -> None:
    write_shards([*rows, replace(rows[0], path=rows[1].path)], tmp_path / "s")
    index = open_index(tmp_path / "s")
    keys = [index.key(i) for i in range(len(index))]
    assert len(set(keys)) == 6
    assert keys[0] == "a"
    assert keys[1].startswith("song_v3-")
    assert all(key == escape_key(key) for key in keys)
    assert escape_key("../../etc/x").startswith("______etc_x-")
    assert len(escape_key("k" * 300)) == 80


def test_write_shards__unreadable_and_absent_files_are_listed(
    rows: list[Row], tmp_path: Path
) -> None:
    rows[1].path.write_bytes(b"no audio at all")
    cut = recording(tmp_path / "in/cut.flac", noise(1, 1.0))
    cut.path.write_bytes(cut.path.read_bytes()[: cut.path.stat().st_size // 2])
    (tmp_path / "in/empty.wav").touch()
    missing = (replace(cut, path=tmp_path / f"in/{name}.wav", key=name) for name in ("n", "empty"))
    absent = [LeftOut('Y\'"left_out": []', "Yä", "no file", "train"), LeftOut("b", "c", "d")]
    manifest = write_shards([*rows, cut, *missing], tmp_path / "s", left_out=absent)
    assert manifest.clips == 4
    assert open_index(tmp_path / "s").labels_per_clip.sum() == sum(manifest.label_counts)
    assert [(e["key"], e["reason"].split(":")[0]) for e in manifest.left_out] == [
        (absent[0].key, "no file"),
        ("b", "d"),
        ("song.v3", "corrupt"),
        ("cut", "corrupt"),
        ("n", "unreadable"),
        ("empty", "empty"),
    ]
    assert Manifest.load(tmp_path / "s") == manifest
    text = (tmp_path / "s/manifest.json").read_text()
    assert str(tmp_path) not in text
    assert text.splitlines().count('  {"key": "b", "file": "c", "reason": "d"},') == 1


def test_write_shards__failure_leaves_nothing(rows: list[Row], tmp_path: Path) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"vocabulary": ["x"]}, "'y' is not among the 1 classes"),
        ({"jobs": 0}, "jobs=0"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
    )
    for options, says in refused:
        with pytest.raises(UserError, match=says):
            write_shards(rows, tmp_path / "s", **options)
    with pytest.raises(UserError, match="no clips"):
        write_shards([], tmp_path / "s")
    for row in rows:
        row.path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 5 clips can be read \(the first: 0.wav"):
        write_shards(rows, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_write_shards__complete_set_is_not_written_again_nor_over(
    rows: list[Row], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    write_shards(rows, out, shard_bytes=11_000)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    write_shards(rows, out, shard_bytes=11_000)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(UserError, match="already holds a complete set of 5 clips from other"):
        write_shards(rows[:3], out, shard_bytes=11_000)
    path, then = rows[2].path, rows[2].path.stat().st_mtime_ns
    data = path.read_bytes()
    path.write_bytes(audio(77, seconds=0.05))
    assert path.stat().st_size == len(data)
    os.utime(path, ns=(then, then + 1_000_000))
    with pytest.raises(UserError, match="from other files"):  # other audio of the same length
        write_shards(rows, out, shard_bytes=11_000)
    path.write_bytes(data)
    os.utime(path, ns=(then, then))
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    os.truncate(out / "shard-00001.tar", 5_000)
    with pytest.raises(UserError, match=r"00001.tar has 5000 bytes, its manifest.json says \d+"):
        write_shards(rows, out, shard_bytes=11_000)
    (out / "shard-00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar is missing: copy it again"):
        write_shards(rows, out, shard_bytes=11_000)


def test_write_shards__other_tar_of_rows_is_another_source(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "s")
    found = open_rows(tmp_path / "s").rows
    write_shards(found, tmp_path / "again", codec="flac")
    tar = tmp_path / "s/shard-00000.tar"
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1_000_000))
    with pytest.raises(UserError, match="from other files"):
        write_shards(found, tmp_path / "again", codec="flac")


def test_write_shards__other_programs_shards_are_not_touched(
    rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="did not write"):
        write_shards(rows, tmp_path / "theirs")
    assert contents(tmp_path / "theirs").keys() == {"shard-00000.tar"}


@pytest.mark.filterwarnings("error")
def test_write_shards__progress_reaches_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = recording(tmp_path / "in/long.flac", noise(0, 0.9))
    write_shards([row], tmp_path / "s", clip_seconds=0.05, progress=True)
    assert "100%" in capsys.readouterr().err


def test_write_shards__audio_without_a_decoder_is_left_out_by_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bat.data.files.has_av", lambda: False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(audio(0))
    (tmp_path / "in/b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    manifest = packed(tmp_path / "in", tmp_path / "out")
    why = "no decoder for m4a: convert it with ffmpeg"
    remedy = f"{why}, or pip install 'bat-audio[av]'"
    assert manifest.left_out == [{"key": "b", "file": "b.m4a", "reason": remedy}]
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    index = open_index(write_tar(tmp_path / "foreign.tar", files))
    assert (len(index), index.left_out) == (1, {"foreign.tar/b.m4a": why})


FORMATS = {
    **dict.fromkeys(("aif", "aiff"), "AIFF"),
    **dict.fromkeys(("wav", "wave"), "WAV"),
    **dict.fromkeys(("ogg", "oga"), "OGG"),
    **dict.fromkeys(("mp3", "mpga"), "MP3"),
    **dict.fromkeys(("nist", "sph"), "NIST"),
    **dict.fromkeys(("iff", "svx"), "SVX"),
    **dict.fromkeys(("sf", "ircam"), "IRCAM"),
    **{name: name.upper() for name in ("au", "avr", "caf", "flac", "htk", "paf", "pvf", "rf64")},
    **{name: name.upper() for name in ("sds", "voc", "w64", "wve", "xi")},
    "snd": "MPC2K",
}
"""Suffixes, and libsndfile's name of the format of such a file."""


def test_write_shards__every_format_that_libsndfile_reads(tmp_path: Path) -> None:
    wave = np.sin(np.arange(8000) * 0.05) * 0.5
    (tmp_path / "in").mkdir()
    for suffix, kind in FORMATS.items():
        with (tmp_path / f"in/{suffix}.{suffix.upper()}").open("wb") as file:
            soundfile.write(file, wave, 8000, format=kind)
    assert packed(tmp_path / "in", tmp_path / "s").left_out == []
    index = open_index(tmp_path / "s")
    assert [index.key(i) for i in range(len(index))] == sorted(FORMATS)
    for i in range(len(index)):
        rate = int(index.rate[i])  # AVR, SVX and others store the rate as they can
        assert len(decode(index.read(i).data, sample_rate=rate)) >= 7990


def test_write_shards__names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9/\xff.wav", b"tea/b.wav", b"tea/\xfe.m4a"):
        path = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio(len(name), seconds=0.05))
    manifest = packed(tmp_path / "in", tmp_path / "s")
    assert manifest.vocabulary == [r"caf\xe9", "tea"]
    assert manifest.left_out == []  # an .m4a that is a WAV is read
    metas = [meta for _, meta in clips(tmp_path / "s").values()]
    assert [meta["id"] for meta in metas] == [r"caf\xe9__\xff", "tea__b", r"tea__\xfe"]
    row = Row(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/tea/\xfe.m4a")), "long", ())
    assert write_shards([row], tmp_path / "cut", clip_seconds=0.01).clips == 5  # by seeking


def test_write_shards__paths_of_the_same_key_are_numbered(tmp_path: Path) -> None:
    wanted = {
        "a/b.wav": "a__b.wav",
        "a__b.wav": "a__b.wav#2",
        "a/b/c.wav": "a__b__c.wav",
        "a/b__c.flac": "a__b__c.flac",
        "a__b/c.wav": "a__b__c.wav#2",
        "x.wav": "x.wav",
        "x.flac": "x.flac",
    }
    for name in wanted:
        recording(tmp_path / "in" / name, noise(0, 0.05))
    rows, _ = load_task("folder").read(tmp_path / "in")
    keys = {row.path.relative_to(tmp_path / "in").as_posix(): row.key for row in rows}
    assert keys == wanted
    assert write_shards(rows, tmp_path / "s").clips == len(clips(tmp_path / "s")) == len(wanted)


def test_open_rows__linked_folders_are_read_once_and_the_rest_is_listed(tmp_path: Path) -> None:
    for name in ("in/a/1.wav", "disk/b/2.wav", "disk/c/3.wav", "in/.git/4.wav", "in/._1.wav"):
        recording(tmp_path / name, noise(0, 0.05))
    for link, target in {
        "in/linked": "../disk",
        "in/loop": "..",
        "in/self": "a",
        "in/twice": "../disk/b",
        "in/gone": "../unmounted",
        "disk/back": "../in/a",
    }.items():
        (tmp_path / link).symlink_to(target)
    found = open_rows(tmp_path / "in")
    assert [row.key for row in found.rows] == ["a__1", "linked__b__2", "linked__c__3"]
    assert sorted((e.file, e.reason.split(":")[0]) for e in found.left_out) == [
        ("._1.wav", "hidden"),
        (".git/4.wav", "hidden"),
        ("gone", "link"),
        ("linked/back", "link"),
        ("loop", "link"),
        ("self", "link"),
        ("twice", "link"),
    ]
    assert f"link: {tmp_path / 'in/a'} is read already" in {e.reason for e in found.left_out}
