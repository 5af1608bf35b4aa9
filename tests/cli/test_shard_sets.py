"""``bat-shard`` over whole sets: splits, folds, cutting, indexing in place, verify, info."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import encode, probe
from bat.cli.shard import main
from bat.data.index import open_index
from bat.data.manifest import Manifest

SPOKEN = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve clips of a second: six dogs, six cats."""
    for i in range(12):
        path = tmp_path / "in" / ("dog", "cat")[i % 2] / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.random.default_rng(i).uniform(-0.4, 0.4, 8_000)
        path.write_bytes(encode(wave, sample_rate=8_000, codec="wav"))
    return tmp_path / "in"


@pytest.fixture
def shards(folder: Path, tmp_path: Path, capsys: SPOKEN) -> Path:
    assert main([str(folder), str(tmp_path / "s"), "--jobs", "1"]) == 0
    capsys.readouterr()
    return tmp_path / "s"


def _line(capsys: SPOKEN, name: str) -> str:
    """What is printed after ``name``."""
    lines = capsys.readouterr().out.splitlines()
    return next(line[10:] for line in lines if line[:10].strip() == name)


def test_splits_and_folds_are_dealt_and_written_apart(
    folder: Path, tmp_path: Path, capsys: SPOKEN
) -> None:
    out = tmp_path / "out"
    call = [str(folder), str(out), "--splits", "train=0.5,test=0.5", "--folds", "2", "--jobs", "1"]
    assert main([*call, "--dry-run"]) == 0
    assert set(_line(capsys, "splits").split(", ")) == {"train 6", "test 6"}
    assert not out.exists()
    assert main(call) == 0
    assert _line(capsys, "next") == f"bat-pretrain recipe=esc10 task=folder data.shards={out}"
    assert sorted(p.name for p in out.iterdir()) == ["test", "train"]
    index = open_index(out)
    assert (len(index), index.splits, index.folds) == (12, ["test", "train"], [1, 2])
    for split in index.splits:
        labels = [index.labels(int(i)) for i in index.clips_in_split(split)]
        assert sorted(labels) == [(0,)] * 3 + [(1,)] * 3
    assert main([str(folder), str(out)]) == 2
    assert "holds shards in test/: give another folder" in capsys.readouterr().err


def test_splits_into_a_folder_of_shards_are_refused(
    folder: Path, shards: Path, capsys: SPOKEN
) -> None:
    assert main([str(folder), str(shards), "--splits", "a=0.5,b=0.5"]) == 2
    assert "holds shards without splits: give another folder" in capsys.readouterr().err


def test_segments_without_a_file_are_listed_in_the_folder_of_their_split(
    folder: Path, tmp_path: Path, capsys: SPOKEN
) -> None:
    classes = "index,mid,display_name\n0,/m/0,Dog\n1,/m/1,Cat\n"
    (folder / "class_labels_indices.csv").write_text(classes)
    lines = (
        '0, 0.0, 1.0, "/m/0"\ngone, 0.0, 1.0, "/m/1"\n',
        '1, 0.0, 1.0, "/m/1"\nlost, 0, 1, /m/0\n',
    )
    for name, text in zip(("balanced_train", "eval"), lines, strict=True):
        (folder / f"{name}_segments.csv").write_text(text)
    out = tmp_path / "o"
    assert main([str(folder), str(out), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"left out  2 (2 no file): listed in manifest.json of {out}/*\n" in printed
    advice = next(line for line in printed.splitlines() if line.startswith("next "))
    assert "data.split=train-balanced" in advice
    assert f"data.shards={out}" in advice
    for split, key in (("train-balanced", "Ygone"), ("test", "Ylost")):
        manifest = Manifest.load(out / split)
        assert manifest is not None
        assert manifest.left_out == [{"key": key, "file": key, "reason": "no file"}]
        assert manifest.clips == 1
    one = tmp_path / "one"
    assert main([str(folder), str(one), "--split", "test", "--jobs", "1"]) == 0
    assert _line(capsys, "left out").startswith("1 (1 no file)")
    dealt = tmp_path / "dealt"  # the first folder lists what has no split of these
    call = [str(folder), str(dealt), "--splits", "a=0.5,b=0.5", "--jobs", "1"]
    assert main(call) == 0
    assert _line(capsys, "left out").startswith("2 (2 no file)")


def test_splits_of_a_csv_one_of_them_and_clips_without(folder: Path, tmp_path: Path) -> None:
    csv = folder / "clips.csv"
    csv.write_text("path,label,split\ndog/0.wav,dog,train\ncat/1.wav,cat,eval\ndog/2.wav,dog,\n")
    assert main([str(csv), str(tmp_path / "all"), "--jobs", "1"]) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["eval", "train", "unsplit"]
    assert len(open_index(tmp_path / "all/unsplit")) == 1
    assert main([str(csv), str(tmp_path / "one"), "--split", "eval", "--jobs", "1"]) == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["eval"]
    manifest = Manifest.load(tmp_path / "one/eval")
    assert manifest is not None
    assert (manifest.clips, manifest.vocabulary) == (1, ["cat", "dog"])  # that of the whole


def test_folds_of_the_source_that_are_dealt_anew_are_told(
    folder: Path, tmp_path: Path, capsys: SPOKEN
) -> None:
    csv = folder / "clips.csv"
    csv.write_text("path,label,fold\ndog/0.wav,dog,7\ndog/2.wav,dog,8\n")
    assert main([str(csv), str(tmp_path / "o"), "--folds", "2", "--jobs", "1"]) == 0
    assert "note: --folds deals the clips anew: the folds of" in capsys.readouterr().err
    assert open_index(tmp_path / "o").folds == [1, 2]


@pytest.mark.parametrize("codec", ["flac", "ogg", "opus", "wav"])
def test_every_codec_rate_and_cutting(folder: Path, tmp_path: Path, codec: str) -> None:
    out = tmp_path / "out"
    call = [str(folder), str(out), "--codec", codec, "--sample-rate", "16000", "--jobs", "1"]
    assert main([*call, "--clip-seconds", "0.4", "--min-seconds", "0.3", "--shard-mb", "0.05"]) == 0
    index = open_index(out)
    assert len(index) == 24
    assert len(index.paths) > 1
    assert set(index.rate.tolist()) == {16_000}
    assert (index.frames / 16_000).tolist() == [0.4] * 24
    assert probe(index.read(0).data).codec == codec
    assert index.key(1).endswith("_00001")
    assert main(["verify", str(out), "--jobs", "1"]) == 0


@pytest.mark.parametrize(("flags", "channels"), [([], 1), (["--channels", "keep"], 2)])
def test_channels(tmp_path: Path, flags: list[str], channels: int) -> None:
    wave = np.random.default_rng(0).uniform(-0.4, 0.4, (8_000, 2))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(encode(wave, sample_rate=8_000, codec="wav"))
    call = [str(tmp_path / "in"), str(tmp_path / "o"), "--codec", "flac", "--jobs", "1", *flags]
    assert main(call) == 0
    assert probe(open_index(tmp_path / "o").read(0).data).channels == channels


def test_labels_of_a_file(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\nemu\ndog\n")
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--labels", str(names), "--jobs", "1"]) == 0
    assert open_index(out).vocabulary == ["cat", "emu", "dog"]


def test_shards_are_indexed_in_place_or_written_anew_on_demand(
    shards: Path, tmp_path: Path, capsys: SPOKEN
) -> None:
    for path in [*shards.glob("*.npz"), shards / "manifest.json"]:
        path.unlink()
    tar = (shards / "shard-00000.tar").read_bytes()
    assert main([str(shards), "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert [p.name for p in shards.iterdir()] == ["shard-00000.tar"]
    assert main([str(shards), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "clips     12 (12.0 s)" in printed
    assert "indexed   1 shards\n" in printed
    assert f"manifest  {shards / 'manifest.json'}\n" in printed
    assert main([str(shards), "--jobs", "1"]) == 0
    assert "indexed   0 shards, 1 were indexed already" in capsys.readouterr().out
    assert (shards / "shard-00000.tar").read_bytes() == tar
    assert main([str(shards), str(tmp_path / "o")]) == 2
    assert f"`bat-shard {shards}` indexes them in place" in capsys.readouterr().err
    call = [str(shards), str(tmp_path / "o"), "--codec", "flac", "--jobs", "1"]
    assert main(call) == 0
    old, new = open_index(shards), open_index(tmp_path / "o")
    assert [old.key(i) for i in range(12)] == [new.key(i) for i in range(12)]
    assert old.label_ids.tolist() == new.label_ids.tolist()
    assert new.read(0).codec == "flac"


def test_damaged_clips_in_place_are_told(shards: Path, capsys: SPOKEN) -> None:
    for path in [*shards.glob("*.npz"), shards / "manifest.json"]:
        path.unlink()
    tar = shards / "shard-00000.tar"
    data = bytearray(tar.read_bytes().replace(b"num_samples", b"num_simples"))
    data[data.index(b"RIFF") : data.index(b"RIFF") + 4] = b"JUNK"
    tar.write_bytes(bytes(data))
    assert main([str(shards), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "damaged   1 (1 corrupt; the first: shard-00000.tar/cat__1)" in printed
    assert "1 of unknown length" in printed


def test_an_index_dir_leaves_the_shards_alone(shards: Path, tmp_path: Path, capsys: SPOKEN) -> None:
    for path in [*shards.glob("*.npz"), shards / "manifest.json"]:
        path.unlink()
    there = tmp_path / "tables"
    assert main([str(shards), "--index-dir", str(there), "--jobs", "1"]) == 0
    assert [p.name for p in shards.iterdir()] == ["shard-00000.tar"]
    assert f"data.shards={shards} data.cache={there}" in capsys.readouterr().out
    assert len(open_index(shards, cache=there)) == 12
    assert [p.name for p in shards.iterdir()] == ["shard-00000.tar"]


def test_verify_says_what_is_wrong_and_exits_1(
    shards: Path, tmp_path: Path, capsys: SPOKEN
) -> None:
    told = tmp_path / "v.json"
    call = ["verify", str(shards), "--jobs", "1", "--json", str(told)]
    assert main(call) == 0
    assert "verdict   fit for training" in capsys.readouterr().out
    assert json.loads(told.read_text())["problems"] == []
    tar = shards / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"RIFF") : data.index(b"RIFF") + 4] = b"JUNK"
    tar.write_bytes(bytes(data))
    assert main(call) == 1
    printed = capsys.readouterr().out
    assert "shard     1: shards not as their manifest or table says" in printed
    assert "shard-00000.tar/cat__1: corrupt: not a readable audio file" in printed
    assert "verdict   not fit: see above" in printed
    found = json.loads(told.read_text())
    assert found["ok"] is False
    assert found["counts"]["corrupt"] == 1
    assert [p["key"] for p in found["problems"] if p["kind"] == "corrupt"] == ["cat__1"]


def test_info_prints_and_draws(shards: Path, tmp_path: Path, capsys: SPOKEN) -> None:
    assert main(["info", str(shards)]) == 0
    printed = capsys.readouterr().out
    assert "labels    2 classes, 1 a clip, 0 without" in printed
    assert "  cat  ############################## 6" in printed
    assert (shards / "info.png").read_bytes()[:4] == b"\x89PNG"
    (shards / "info.png").unlink()
    assert main(["info", str(shards), "--plot", str(tmp_path / "a/x.png")]) == 0
    assert (tmp_path / "a/x.png").stat().st_size > 10_000
    assert not (shards / "info.png").exists()
    (tmp_path / "b").touch()
    assert main(["info", str(shards), "--plot", str(tmp_path / "b/x.png")]) == 2
    assert "give another file or folder" in capsys.readouterr().err


def test_folders_named_like_the_sub_commands(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: SPOKEN
) -> None:
    shutil.move(shards, shards.parent / "verify")
    monkeypatch.chdir(shards.parent)
    assert main(["./verify", "--jobs", "1"]) == 0
    assert "indexed   0 shards, 1 were indexed already" in capsys.readouterr().out
    assert main(["verify", "verify", "--jobs", "1"]) == 0
