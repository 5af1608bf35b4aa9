"""``bat-shard`` as a user meets it: what it prints, its exit codes, no tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bat
from bat.audio.decode import encode
from bat.cli.shard import main
from bat.data.index import open_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("dog/1.wav", "dog/2.wav", "cat/1.wav")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(np.arange(16_000) * 0.01 * (i + 1)) / 2
        path.write_bytes(encode(wave, sample_rate=16_000, codec="wav"))
    return tmp_path / "in"


def test_help_is_quick_and_complete() -> None:
    call, seconds = [sys.executable, "-m", "bat.cli.shard", "--help"], []
    for _ in range(3):  # the best of three: other work may run beside
        start = time.perf_counter()
        done = subprocess.run(call, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert done.returncode == 0
    flags = (
        "--task",
        "--codec",
        "--sample-rate",
        "--shard-mb",
        "--dry-run",
        "--debug",
        "--version",
    )
    assert all(flag in done.stdout for flag in flags)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert bat.__version__ in capsys.readouterr().out


def test_a_folder_becomes_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dog/bad.mp3").write_bytes(b"not audio")
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--codec", "flac"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "clips     3 (3.0 s)"
    assert printed[1].startswith("shards    1 (0.0")
    assert printed[2] == "labels    2 classes (dog 2, cat 1)"
    assert printed[3] == f"left out  1 (1 corrupt): listed in {out / 'manifest.json'}"
    assert printed[4] == f"next      bat-pretrain recipe=as2m data.shards={out}"
    index = open_index(out)
    assert (len(index), index.vocabulary) == (3, ["cat", "dog"])
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert [entry["key"] for entry in left_out] == ["dog__bad"]


def test_again_is_fine_and_other_content_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(folder), str(tmp_path / "out")]
    assert main(call) == 0
    assert main(call) == 0
    assert "was complete already: nothing written" in capsys.readouterr().out
    assert main([*call, "--sample-rate", "8000"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bat-shard: error: ")
    assert "already holds a complete set of 3 clips" in error


def test_dry_run_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "clips     3 (3 wav)" in printed
    assert "labels    2 classes (dog 2, cat 1)" in printed
    assert not (tmp_path / "out").exists()


def test_a_csv_and_a_task(folder: Path, tmp_path: Path) -> None:
    csv = folder / "clips.csv"
    csv.write_text("path,labels,fold\ndog/1.wav,a;b,1\ncat/1.wav,b,2\n")
    assert main([str(csv), str(tmp_path / "out"), "--shard-mb", "0.01"]) == 0
    index = open_index(tmp_path / "out")
    assert [index.labels(i) for i in range(2)] == [(0, 1), (1,)]
    assert (index.folds, len(index.paths)) == ([1, 2], 2)


def test_an_esc_folder_read_plainly_gets_a_note(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "meta.csv").write_text("filename,fold,category\n")
    assert main([str(folder), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "--task esc50 or esc10 reads labels from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (["nowhere", "out"], "nowhere does not exist"),
        ([".", "out"], "has no audio"),
        (["in", "out", "--task", "esc51"], "no task 'esc51': known are"),
        (["in", "out", "--task", "esc50"], "neither meta/esc50.csv nor meta.csv"),
        (["in", "out", "--shard-mb", "0"], "--shard-mb 0 must be positive"),
        (["in", "out", "--sample-rate", "16"], "--sample-rate 16: in Hz"),
        (["in", "in/dog/1.wav"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    if call[0] == ".":
        (folder.parent / "empty").mkdir()
        monkeypatch.chdir("empty")
    assert main(call) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("bat-shard: error: ")
    assert says in line
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback() -> None:
    call = [sys.executable, "-m", "bat.cli.shard", "nowhere", "out", "--debug"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
