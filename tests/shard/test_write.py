"""Shards: the format, that it is the same twice, atomic, and honest about what it left out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bat.audio.decode import decode, encode, probe
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.table import scan
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks.base import Row, load_task


def contents(folder: Path) -> dict[str, str]:
    """Names and hashes; of a table all but the time of its tar."""

    def told(path: Path) -> bytes:
        if path.suffix != ".npz":
            return path.read_bytes()
        with np.load(path) as file:
            head = json.loads(file["head"].tobytes())
            assert head.pop("mtime_ns") > 0
            arrays = [file[name].tobytes() for name in ("clips", "labels", "keys")]
        return b"\0".join([json.dumps(head).encode(), *arrays])

    return {p.name: hashlib.sha256(told(p)).hexdigest() for p in folder.iterdir()}


def wave_file(path: Path, *, frames: int = 800, rate: int = 16_000, codec: str = "wav") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(np.arange(frames) * 0.05 + len(path.name)) * 0.5
    path.write_bytes(encode(tone, sample_rate=rate, codec=codec))  # type: ignore[arg-type]
    return path


def packed(root: Path, out: Path) -> Path:
    """The files below ``root`` as shards in ``out``."""
    found, names = load_task("folder").read(root)
    write_shards(found, out, vocabulary=names)
    return out


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    names = ["a", "song.v3", "song.v4", "ü/ß", "b"]
    return [
        Row(wave_file(tmp_path / f"in/{i}.wav"), name, ("x",) if i % 2 else ("y", "x"), fold=i)
        for i, name in enumerate(names)
    ]


def test_esc10_subset_reads_back_with_webdataset_and_with_the_index(
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
        assert index.clips_in_fold(fold).tolist() == [
            i for i, row in enumerate(rows) if row.fold == fold
        ]


def test_same_input_same_bytes_from_anywhere(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "one", shard_bytes=11_000)
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere/in")
    moved = [replace(r, path=tmp_path / "elsewhere/in" / r.path.name) for r in rows]
    write_shards(moved, tmp_path / "two", shard_bytes=11_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        "manifest.json",
        *(f"shard-{i:05d}{end}" for i in range(2) for end in (".tar", ".idx.npz")),
    }


def test_tars_are_plain_ustar_and_match_the_manifest(rows: list[Row], tmp_path: Path) -> None:
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=11_000)
    assert [s.clips for s in manifest.shards] == [3, 2]
    for shard in manifest.shards:
        data = (tmp_path / "s" / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert data[257:265] == b"ustar\x0000"
        with tarfile.open(tmp_path / "s" / shard.name) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.uname) == (0, 0, "bat")
                assert member.isreg()
    assert manifest.bytes == sum(s.bytes for s in manifest.shards)
    assert manifest.vocabulary == ["x", "y"]
    assert Manifest.load(tmp_path / "s") == manifest


def test_keys_are_escaped_and_stay_apart(rows: list[Row], tmp_path: Path) -> None:
    write_shards([*rows, replace(rows[0], path=rows[1].path)], tmp_path / "s")
    index = open_index(tmp_path / "s")
    keys = [index.key(i) for i in range(len(index))]
    assert len(set(keys)) == 6
    assert keys[0] == "a"
    assert keys[1].startswith("song_v3-")
    assert all(key == escape_key(key) for key in keys)
    assert escape_key("../../etc/x").startswith("______etc_x-")
    assert len(escape_key("k" * 300)) == 80


def test_unreadable_files_are_left_out_and_listed(rows: list[Row], tmp_path: Path) -> None:
    rows[1].path.write_bytes(b"no audio at all")
    flac = wave_file(tmp_path / "in/cut.flac", frames=16_000, codec="flac")
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size // 2])
    bad = [
        *rows,
        replace(rows[0], path=flac, key="cut"),
        replace(rows[0], path=Path("no"), key="n"),
    ]
    (tmp_path / "in/empty.wav").touch()
    bad.append(replace(rows[0], path=tmp_path / "in/empty.wav", key="empty"))
    manifest = write_shards(bad, tmp_path / "s")
    assert manifest.clips == 4
    assert open_index(tmp_path / "s").labels_per_clip.sum() == sum(manifest.label_counts)
    why = {entry["key"]: entry["reason"].split(":")[0] for entry in manifest.left_out}
    assert why == {
        "song.v3": "corrupt",
        "cut": "corrupt",
        "n": "unreadable",
        "empty": "empty",
    }
    assert str(tmp_path) not in (tmp_path / "s/manifest.json").read_text()


def test_nothing_readable_is_an_error_and_leaves_nothing(rows: list[Row], tmp_path: Path) -> None:
    for row in rows:
        row.path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 5 clips can be read \(the first: 0.wav"):
        write_shards(rows, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("codec", ["flac", "wav", "ogg"])
def test_encoding_and_resampling(tmp_path: Path, codec: str) -> None:
    row = Row(wave_file(tmp_path / "a.wav", frames=44_100, rate=44_100), "a", ())
    write_shards([row], tmp_path / "s", codec=codec, sample_rate=16_000)  # type: ignore[arg-type]
    index = open_index(tmp_path / "s")
    info = probe(index.read(0).data)
    assert (info.codec, info.sample_rate, info.channels) == (codec, 16_000, 1)
    assert (index.frames[0], index.rate[0], index.read(0).codec) == (info.frames, 16_000, codec)
    assert info.frames == 16_000
    assert index.classes == 0


def test_keep_at_another_rate_becomes_flac_and_at_its_own_stays(tmp_path: Path) -> None:
    rows = [
        Row(wave_file(tmp_path / "a.wav", frames=8_000, rate=8_000), "a", ()),
        Row(wave_file(tmp_path / "b.wav", frames=16_000), "b", ()),
    ]
    write_shards(rows, tmp_path / "s", sample_rate=16_000)
    index = open_index(tmp_path / "s")
    assert [index.read(i).codec for i in range(2)] == ["flac", "wav"]
    assert index.read(1).data == rows[1].path.read_bytes()
    assert index.frames.tolist() == [16_000, 16_000]


def test_labels_outside_the_vocabulary_and_wrong_options(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'y' is not among the 1 classes"):
        write_shards(rows, tmp_path / "s", vocabulary=["x"])
    with pytest.raises(UserError, match="codec 'mp3': one of keep, flac"):
        write_shards(rows, tmp_path / "s", codec="mp3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no clips"):
        write_shards([], tmp_path / "s")


def test_a_complete_set_is_not_written_again_nor_over(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    write_shards(rows, tmp_path / "s")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()} == before
    with pytest.raises(UserError, match="already holds a complete set of 5 clips from other"):
        write_shards(rows[:3], tmp_path / "s")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()} == before


def test_somebody_elses_shards_are_not_touched(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="did not write"):
        write_shards(rows, tmp_path / "theirs")
    assert contents(tmp_path / "theirs").keys() == {"shard-00000.tar"}


def test_a_full_disk_is_one_clear_error(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_shards(rows, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_index_written_is_the_index_scanned(rows: list[Row], tmp_path: Path) -> None:
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=11_000)
    written = open_index(tmp_path / "s")
    for path in (tmp_path / "s").glob("*.idx.npz"):
        path.unlink()
    rebuilt = open_index(tmp_path / "s")
    assert rebuilt.hash == written.hash
    assert np.array_equal(rebuilt.offset, written.offset)
    table = scan(tmp_path / "s/shard-00001.tar")
    assert len(table.clips) == manifest.shards[1].clips


def test_audio_without_a_decoder_is_left_out_by_that_name(tmp_path: Path) -> None:
    wave = encode(np.zeros(800) + 0.1, sample_rate=16_000, codec="wav")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(wave)
    (tmp_path / "in/b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    rows, names = load_task("folder").read(tmp_path / "in")
    assert [row.key for row in rows] == ["a", "b"]
    manifest = write_shards(rows, tmp_path / "out", vocabulary=names)
    why = "no decoder for m4a: convert it with ffmpeg"
    assert manifest.left_out == [{"key": "b", "file": "b.m4a", "reason": why}]
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for path in sorted((tmp_path / "in").iterdir()):
            tar.add(path, path.name)
    index = open_index(tmp_path / "foreign.tar")
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
"""Suffixes, and libsndfile's name of what such a file holds."""


def test_every_format_that_libsndfile_reads_is_packed_and_read_again(tmp_path: Path) -> None:
    wave = np.sin(np.arange(8000) * 0.05) * 0.5
    (tmp_path / "in").mkdir()
    for suffix, kind in FORMATS.items():
        with (tmp_path / f"in/{suffix}.{suffix.upper()}").open("wb") as file:
            soundfile.write(file, wave, 8000, format=kind)
    made = packed(tmp_path / "in", tmp_path / "made")
    assert Manifest.load(made).left_out == []  # type: ignore[union-attr]
    index = open_index(made)
    assert [index.key(i) for i in range(len(index))] == sorted(FORMATS)
    for i in range(len(index)):
        rate = int(index.rate[i])  # AVR, SVX and others store the rate as they can
        assert len(decode(index.read(i).data, sample_rate=rate)) >= 7990


def test_names_that_are_not_utf8_go_through(tmp_path: Path) -> None:
    for name in (b"caf\xe9/\xff.wav", b"tea/b.wav", b"tea/\xfe.m4a"):
        path = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))
        wave_file(path)
    made = packed(tmp_path / "in", tmp_path / "made")
    manifest = Manifest.load(made)
    assert manifest is not None
    assert manifest.vocabulary == [r"caf\xe9", "tea"]
    assert [entry["file"] for entry in manifest.left_out] == []  # an .m4a that is a WAV is read
    assert len(open_index(made)) == 3
    with tarfile.open(made / "shard-00000.tar") as file:
        texts = [file.extractfile(m).read() for m in file if m.name.endswith(".json")]  # type: ignore[union-attr]
    assert [json.loads(text)["id"] for text in texts] == [
        r"caf\xe9__\xff",
        "tea__b",
        r"tea__\xfe",
    ]
    long = Row(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/tea/\xfe.m4a")), "long", ())
    cut = write_shards([long], tmp_path / "cut", clip_seconds=0.01)  # by seeking in its path
    assert cut.clips == 5


def test_paths_of_the_same_key_are_numbered(tmp_path: Path) -> None:
    names = ("a/b.wav", "a__b.wav", "a/b/c.wav", "a__b/c.wav", "a/b__c.flac", "x.wav", "x.flac")
    for name in names:
        wave_file(tmp_path / "in" / name, codec=name.rpartition(".")[2])
    made = packed(tmp_path / "in", tmp_path / "made")
    index = open_index(made)
    assert len(index) == len(names)
    rows, _ = load_task("folder").read(tmp_path / "in")
    keys = {row.path.relative_to(tmp_path / "in").as_posix(): row.key for row in rows}
    assert keys == {
        "a/b.wav": "a__b.wav",
        "a__b.wav": "a__b.wav#2",
        "a/b/c.wav": "a__b__c.wav",
        "a/b__c.flac": "a__b__c.flac",
        "a__b/c.wav": "a__b__c.wav#2",
        "x.wav": "x.wav",
        "x.flac": "x.flac",
    }


def test_linked_folders_are_read_once_and_the_rest_is_listed(tmp_path: Path) -> None:
    for name in ("in/a/1.wav", "disk/b/2.wav", "disk/c/3.wav", "in/.git/4.wav", "in/._1.wav"):
        wave_file(tmp_path / name)
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
