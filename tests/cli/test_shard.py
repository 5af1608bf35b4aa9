"""``bat-shard`` as a user meets it: what it prints and writes, its exit codes, no tracebacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bat
from bat.audio.decode import probe
from bat.audio.encode import encode
from bat.cli.shard import main
from bat.data.index import open_index
from bat.data.manifest import Manifest

Captured = pytest.CaptureFixture[str]


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
def shards(folder: Path, tmp_path: Path, capsys: Captured) -> Path:
    assert run(folder, tmp_path / "s") == 0
    capsys.readouterr()
    return tmp_path / "s"


@pytest.fixture
def bare(shards: Path) -> Path:
    """Shards without tables and manifest."""
    for path in [*shards.glob("*.npz"), shards / "manifest.json"]:
        path.unlink()
    return shards


def run(*words: object) -> int:
    return main([*map(str, words), *([] if "info" in words else ["--jobs", "1"])])


def line_of(capsys: Captured, name: str) -> str:
    """Returns the rest of the line that begins with ``name``."""
    lines = capsys.readouterr().out.splitlines()
    return next(line[10:] for line in lines if line[:10].strip() == name)


def test_help__is_quick_and_complete(capsys: Captured) -> None:
    call, seconds = [sys.executable, "-m", "bat.cli.shard", "--help"], []
    for _ in range(3):  # the best of three: other work may run beside
        start = time.perf_counter()
        done = subprocess.run(call, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert done.returncode == 0
    flags = "task labels split codec sample-rate channels clip-seconds min-seconds shard-mb folds "
    flags += "splits index-dir jobs dry-run debug version"
    assert all(f"--{flag} " in done.stdout for flag in flags.split())
    for command, flags in (("verify", "--json --index-dir --jobs"), ("info", "--plot --index-dir")):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: bat-shard {command} ")
        assert all(flag in printed for flag in flags.split())
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert bat.__version__ in capsys.readouterr().out


def test_main__only_writing_imports_torch(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--codec", "flac") == 0
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys
from bat.cli.shard import main
if __name__ == "__main__":
    out = {str(tmp_path / "out")!r}
    assert main([out]) == main(["verify", out, "--jobs", "1"]) == main(["info", out]) == 0
    heavy = {{"torch", "lightning", "omegaconf", "timm", "sklearn"}} & set(sys.modules)
    sys.exit(", ".join(sorted(heavy)) or 0)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_main__folder_becomes_shards(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    (folder / "dog/bad.mp3").write_bytes(b"not audio")
    (folder / "cat/11.wav").unlink()
    out = tmp_path / "out"
    assert run(folder, out, "--codec", "flac") == 0
    size = (out / "shard-00000.tar").stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines() == [
        "clips     11 (11.0 s)",
        f"shards    1 ({size:.2f} MB) in {out}",
        "length    1.00 s at the median, 1.00 to 1.00",
        "rates     8000 Hz 11",
        "codecs    flac 11",
        "splits    none",
        "folds     none",
        "labels    2 classes, 1 a clip, 0 without",
        "balance   5 clips in the smallest class, 5.5 at the median, 6 in the largest",
        "common    dog 6, cat 5",
        "rare      cat 5, dog 6",
        f"left out  1 (1 corrupt): listed in {out / 'manifest.json'}",
        f"next      bat-pretrain recipe=esc10 task=folder data.shards={out}",
    ]
    index = open_index(out)
    assert (len(index), index.vocabulary) == (11, ["cat", "dog"])
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert [entry["key"] for entry in left_out] == ["dog__bad"]


def test_main__again_is_fine_and_other_content_is_refused(
    folder: Path, shards: Path, capsys: Captured
) -> None:
    assert run(folder, shards) == 0
    assert "was complete already: nothing written" in capsys.readouterr().out
    assert run(folder, shards, "--sample-rate", "16000") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bat-shard: error: ")
    assert "already holds a complete set of 12 clips" in error
    assert run(folder, shards, "--splits", "a=0.5,b=0.5") == 2
    assert "holds shards without splits: give another folder" in capsys.readouterr().err


def test_dry_run__writes_nothing(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    (folder / "meta.csv").write_text("filename,fold,category\n")
    assert run(folder, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr()
    assert "clips     12 (12 wav)" in printed.out
    assert "labels    2 classes\n" in printed.out
    assert "balance   6 clips in the smallest class" in printed.out
    assert "--task esc50 or esc10 reads labels from it" in printed.err
    assert not (tmp_path / "out").exists()


def test_splits_and_folds__are_dealt_and_written_apart(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    call = [folder, out, "--splits", "train=0.5,test=0.5", "--folds", "2"]
    assert run(*call, "--dry-run") == 0
    assert set(line_of(capsys, "splits").split(", ")) == {"train 6", "test 6"}
    assert not out.exists()
    assert run(*call) == 0
    assert line_of(capsys, "next") == f"bat-pretrain recipe=esc10 task=folder data.shards={out}"
    assert sorted(p.name for p in out.iterdir()) == ["test", "train"]
    index = open_index(out)
    assert (len(index), index.splits, index.folds) == (12, ["test", "train"], [1, 2])
    for split in index.splits:
        labels = [index.labels(int(i)) for i in index.clips_in_split(split)]
        assert sorted(labels) == [(0,)] * 3 + [(1,)] * 3
    assert run(folder, out) == 2
    assert "holds shards in test/: give another folder" in capsys.readouterr().err


def test_csv__labels_splits_and_folds(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    csv = folder / "clips.csv"
    csv.write_text(
        "path,labels,split,fold\ndog/0.wav,a;b,train,7\ncat/1.wav,b,eval,8\ndog/2.wav,a,,7\n"
    )
    assert run(csv, tmp_path / "all", "--shard-mb", "0.01") == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["eval", "train", "unsplit"]
    index = open_index(tmp_path / "all")
    assert [index.labels(i) for i in range(3)] == [(1,), (0, 1), (0,)]
    assert index.folds == [7, 8]
    assert run(csv, tmp_path / "one", "--split", "eval", "--folds", "2") == 2  # one recording
    assert run(csv, tmp_path / "one", "--split", "eval") == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["eval"]
    manifest = Manifest.load(tmp_path / "one/eval")
    assert manifest is not None
    assert (manifest.clips, manifest.vocabulary) == (1, ["a", "b"])  # that of the whole
    capsys.readouterr()
    assert run(csv, tmp_path / "dealt", "--folds", "2") == 0
    assert "note: --folds deals the clips anew: the folds of" in capsys.readouterr().err
    assert open_index(tmp_path / "dealt").folds == [1, 2]


def test_audioset__segments_without_a_file_are_listed_in_the_folder_of_their_split(
    folder: Path, tmp_path: Path, capsys: Captured
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
    assert run(folder, out) == 0
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
    assert run(folder, tmp_path / "one", "--split", "test") == 0
    assert line_of(capsys, "left out").startswith("1 (1 no file)")
    # the first folder lists what has no split of these
    assert run(folder, tmp_path / "dealt", "--splits", "a=0.5,b=0.5") == 0
    assert line_of(capsys, "left out").startswith("2 (2 no file)")


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_main__codec_rate_cutting_and_channels(folder: Path, tmp_path: Path, codec: str) -> None:
    for path in folder.rglob("*.wav"):
        wave = np.random.default_rng(len(path.name)).uniform(-0.4, 0.4, (8_000, 2))
        path.write_bytes(encode(wave, sample_rate=8_000, codec="wav"))
    call = [folder, tmp_path / "out", "--codec", codec, "--sample-rate", "16000"]
    call += ["--clip-seconds", "0.4", "--min-seconds", "0.3", "--shard-mb", "0.05"]
    assert run(*call, "--channels", "keep") == 0
    index = open_index(tmp_path / "out")
    assert len(index.shard_bytes) > 1
    assert set(index.rate.tolist()) == {16_000}
    assert (index.frames / 16_000).tolist() == [0.4] * 24
    info = probe(index.read(0).data)
    assert (info.codec, info.channels) == (codec, 2)
    assert index.key(1).endswith("_00001")


def test_labels__file_gives_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\nemu\ndog\n")
    assert run(folder, tmp_path / "out", "--labels", names) == 0
    assert open_index(tmp_path / "out").vocabulary == ["cat", "emu", "dog"]


def test_main__shards_are_indexed_in_place_or_written_anew_on_demand(
    bare: Path, tmp_path: Path, capsys: Captured
) -> None:
    tar = (bare / "shard-00000.tar").read_bytes()
    assert run(bare, "--dry-run") == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert [p.name for p in bare.iterdir()] == ["shard-00000.tar"]
    assert run(bare) == 0
    printed = capsys.readouterr().out
    assert "clips     12 (12.0 s)" in printed
    assert "indexed   1 shards\n" in printed
    assert f"manifest  {bare / 'manifest.json'}\n" in printed
    assert run(bare) == 0
    assert "indexed   0 shards, 1 were indexed already" in capsys.readouterr().out
    assert (bare / "shard-00000.tar").read_bytes() == tar
    assert run(bare, tmp_path / "o") == 2
    assert f"`bat-shard {bare}` indexes them in place" in capsys.readouterr().err
    assert run(bare, tmp_path / "o", "--codec", "flac") == 0
    old, new = open_index(bare), open_index(tmp_path / "o")
    assert [old.key(i) for i in range(12)] == [new.key(i) for i in range(12)]
    assert old.label_ids.tolist() == new.label_ids.tolist()
    assert new.read(0).codec == "flac"


def test_main__damaged_clips_in_place_are_told(bare: Path, capsys: Captured) -> None:
    tar = bare / "shard-00000.tar"
    data = tar.read_bytes().replace(b"num_samples", b"num_simples")
    tar.write_bytes(data.replace(b"RIFF", b"JUNK", 1))
    assert run(bare) == 0
    printed = capsys.readouterr().out
    assert "damaged   1 (1 corrupt; the first: shard-00000.tar/cat__1)" in printed
    assert "1 of unknown length" in printed


def test_index_dir__leaves_the_shards_alone(bare: Path, tmp_path: Path, capsys: Captured) -> None:
    there = tmp_path / "tables"
    assert run(bare, "--index-dir", there) == 0
    assert f"data.shards={bare} data.cache={there}" in capsys.readouterr().out
    assert len(open_index(bare, cache=there)) == 12
    assert [p.name for p in bare.iterdir()] == ["shard-00000.tar"]


def test_verify__says_what_is_wrong_and_exits_1(
    shards: Path, tmp_path: Path, capsys: Captured
) -> None:
    written = tmp_path / "v.json"
    assert run("verify", shards, "--json", written) == 0
    assert "verdict   fit for training" in capsys.readouterr().out
    assert json.loads(written.read_text())["problems"] == []
    tar = shards / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"RIFF", b"JUNK", 1))
    assert run("verify", shards, "--json", written) == 1
    printed = capsys.readouterr().out
    assert "shard     1: shards not as their manifest or table says" in printed
    assert "shard-00000.tar/cat__1: corrupt: not a readable audio file" in printed
    assert "verdict   not fit: see above" in printed
    found = json.loads(written.read_text())
    assert (found["ok"], found["counts"]["corrupt"]) == (False, 1)
    assert [p["key"] for p in found["problems"] if p["kind"] == "corrupt"] == ["cat__1"]


def test_info__prints_and_draws(shards: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run("info", shards) == 0
    printed = capsys.readouterr().out
    assert "labels    2 classes, 1 a clip, 0 without" in printed
    assert (shards / "info.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "b").touch()
    assert run("info", shards, "--plot", tmp_path / "b/x.png") == 2
    assert "give another file or folder" in capsys.readouterr().err


def test_main__folders_named_like_the_sub_commands(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    shutil.move(shards, shards.parent / "verify")
    monkeypatch.chdir(shards.parent)
    assert run("./verify") == 0
    assert "indexed   0 shards, 1 were indexed already" in capsys.readouterr().out
    assert run("verify", "verify") == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("nowhere out", "nowhere does not exist"),
        (". out", "has no audio"),
        ("in out --task esc51", "unknown task=esc51 (did you mean 'esc50'?)"),
        ("in out --task esc50", "neither meta/esc50.csv nor meta.csv"),
        ("in out --shard-mb 0", "--shard-mb 0 and --jobs"),
        ("in out --jobs 0", "--jobs 0 must be positive"),
        ("in out --sample-rate 16", "sample_rate=16: in Hz, 1000 to 768000"),
        ("in out --clip-seconds -1", "clip_seconds=-1.0: 0.01 or more"),
        ("in out --codec opus --sample-rate 44100", "Opus has no 44100 Hz"),
        ("in out --split dev", "in has no split 'dev': it has no splits"),
        ("in out --splits train:0.9", "--splits 'train:0.9': write NAME=PART"),
        ("in out --splits a=0.5,a=0.5", "'a' is there twice"),
        ("in out --splits a=0.5,b=0.4", "sum to 0.9, not to 1"),
        ("in out --folds 1", "folds=1: 2 or more"),
        ("in out --index-dir x", "--index-dir is for indexing in place"),
        ("in", "give OUT, the folder for the shards: in holds no .tar"),
        ("in --codec flac", "give OUT, the folder for the shards: --codec needs it"),
        ("in --task esc50", "give OUT, the folder for the shards: --task needs it"),
        ("verify in", "in holds no .tar shards"),
        ("verify in --json no/x.json", "--json no/x.json: no is not a folder"),
        ("info in", "in holds no .tar shards"),
        ("info in/*.tar", "--plot FILE: say where the picture goes"),
        ("info in --plot x.jpg", "--plot x.jpg: a .png"),
        ("in in/dog/0.wav", "cannot write to out=in/dog/0.wav"),
    ],
)
def test_main__mistakes_are_one_line_and_exit_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, call: str, says: str
) -> None:
    monkeypatch.chdir(folder.parent)
    if call[0] == ".":
        (folder.parent / "empty").mkdir()
        monkeypatch.chdir("empty")
    assert main(call.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert re.match(r"bat-shard( verify| info)?: error: ", line)
    assert says in line
    assert "Traceback" not in captured.err


def test_debug__shows_the_traceback() -> None:
    call = [sys.executable, "-m", "bat.cli.shard", "nowhere", "out", "--debug"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
