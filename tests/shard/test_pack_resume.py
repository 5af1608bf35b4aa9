"""The same bytes with any number of processes, after any kill; and who may write where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.errors import UserError
from bat.shard import pack as pack_module
from bat.shard import write as shards_module
from bat.shard.write import MARKER, write_shards
from bat.tasks.base import Row, load_task
from tests.shard.test_write import contents

OPTIONS = {"codec": "flac", "clip_seconds": 0.1, "shard_bytes": 20_000}
RUN = (
    "import os, sys\n"
    "from pathlib import Path\n"
    "from bat.shard import journal, write as shards\n"
    "from bat.tasks.base import load_task\n"
    "if __name__ == '__main__':\n"
    "    real = journal.Journal.{hook}\n"
    "    calls = []\n"
    "    def hook(*a, **k):\n"
    "        calls.append(0)\n"
    "        if len(calls) > {after}: os.kill(os.getpid(), 9)\n"
    "        return real(*a, **k)\n"
    "    journal.Journal.{hook} = hook\n"
    "    rows, names = load_task('folder').read(sys.argv[1])\n"
    "    shards.write_shards(rows, Path(sys.argv[2]), jobs=int(sys.argv[3]), **{options})\n"
)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Files of 0.05 to 0.65 s, one of them no audio."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"in/c{i % 2}/{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = rng.standard_normal(800 + 1600 * (i * 5 % 8)) * 0.1
        path.write_bytes(encode(wave, sample_rate=16_000, codec="wav"))
    (tmp_path / "in/c0/2.wav").write_bytes(b"no audio")
    forged = bytearray(encode(rng.standard_normal(4000) * 0.1, sample_rate=16_000, codec="flac"))
    forged[22:26] = (2_000_000).to_bytes(4, "big")  # 125 s are claimed, 0.25 s are there
    (tmp_path / "in/c0/5.flac").write_bytes(forged)
    return load_task("folder").read(tmp_path / "in")[0]


@pytest.fixture
def whole(rows: list[Row], tmp_path: Path) -> dict[str, str]:
    """What an undisturbed run writes."""
    manifest = write_shards(rows, tmp_path / "whole", **OPTIONS)
    assert len(manifest.shards) >= 4
    lost = [entry["key"].split("_00")[0] for entry in manifest.left_out]
    assert (lost.count("c0__2"), lost.count("c0__5")) == (1, 1)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("jobs", [2, 3])
def test_as_many_processes_as_you_like(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, jobs: int
) -> None:
    write_shards(rows, tmp_path / "s", jobs=jobs, **OPTIONS)
    assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize(
    ("jobs", "after", "hook"), [(1, 2, "add"), (1, 3, "_append"), (2, 2, "add")]
)
def test_killed_then_run_again(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, jobs: int, after: int, hook: str
) -> None:
    """``add``: killed with the shard on disk and not in the journal."""
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(RUN.format(after=after, hook=hook, options=OPTIONS))
    call = [sys.executable, str(script), str(tmp_path / "in"), str(out), str(jobs)]
    assert subprocess.run(call, timeout=60).returncode == -9
    assert (out / MARKER).exists()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        open_index(out)
    kept = [out / f"shard-0000{i}.tar" for i in range(2)]
    stamps = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(UserError, match="holds 2 finished shards of an interrupted run with other"):
        write_shards(rows[:3], out, **OPTIONS)
    write_shards(rows, out, jobs=3 - jobs, **OPTIONS)
    assert contents(out) == whole
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # kept, not written again


def test_new_audio_of_the_same_length_is_not_mixed_with_the_old(
    rows: list[Row], tmp_path: Path
) -> None:
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(RUN.format(after=2, hook="add", options=OPTIONS))
    call = [sys.executable, str(script), str(tmp_path / "in"), str(out), "1"]
    assert subprocess.run(call, timeout=60).returncode == -9
    path = rows[-1].path
    then = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(then, then + 1_000_000))
    with pytest.raises(UserError, match="holds 2 finished shards of an interrupted run with other"):
        write_shards(rows, out, **OPTIONS)


def test_stopped_at_every_clip_then_run_again(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after each clip in turn, all in one folder."""
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 0.3)
    real, room = shards_module.ShardFile.add, [0]

    def add(self: shards_module.ShardFile, *args: object) -> None:
        if room[0] == 0:
            raise KeyboardInterrupt
        room[0] -= 1
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_module.ShardFile, "add", add)
    stops, out = 0, tmp_path / "s"
    while not (out / "manifest.json").exists():
        stops += 1
        room[0] = 1 + stops % 8  # a shard holds about 4
        try:
            write_shards(rows, out, **OPTIONS)
        except KeyboardInterrupt:
            assert not list(out.glob(".shard-*"))
            assert stops < 99
    assert stops > 5
    assert contents(out) == whole


@pytest.mark.parametrize("harm", ["tar", "idx", "swapped", "journal", "line"])
def test_what_was_harmed_meanwhile_is_written_again(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, harm: str
) -> None:
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(RUN.format(after=3, hook="add", options=OPTIONS))
    call = [sys.executable, str(script), str(tmp_path / "in"), str(out), "1"]
    assert subprocess.run(call, timeout=60).returncode == -9
    if harm == "tar":
        with (out / "shard-00001.tar").open("ab") as file:
            file.truncate(5_000)
    elif harm == "idx":
        (out / "shard-00001.idx.npz").write_bytes(b"")
    elif harm == "swapped":
        for end in (".tar", ".idx.npz"):
            shutil.copy(out / f"shard-00000{end}", out / f"shard-00001{end}")
    elif harm == "journal":
        (out / MARKER).write_bytes(b"\xff\n[]\n")
    else:
        lines = (out / MARKER).read_bytes()
        (out / MARKER).write_bytes(lines[: lines.rindex(b"{") + 9])
    write_shards(rows, out, **OPTIONS)
    assert contents(out) == whole


def test_a_full_disk_keeps_what_is_finished(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.fsync, [0]

    def full(file: int) -> None:
        count[0] += 1
        if count[0] > 5:  # the journal's head, then tar, index, journal for each shard
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_shards(rows, tmp_path / "s", **OPTIONS)
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert left == {MARKER, "shard-00000.tar", "shard-00000.idx.npz"}
    monkeypatch.setattr(os, "fsync", real)
    write_shards(rows, tmp_path / "s", **OPTIONS)
    assert contents(tmp_path / "s") == whole


def test_two_at_once_write_one_set(rows: list[Row], whole: dict[str, str], tmp_path: Path) -> None:
    script, out = tmp_path / "run.py", tmp_path / "s"
    script.write_text(RUN.format(after=10**6, hook="add", options=OPTIONS))
    call = [sys.executable, str(script), str(tmp_path / "in"), str(out), "1"]
    both = [subprocess.Popen(call) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert contents(out) == whole


def test_the_same_key_twice_stays_apart_after_a_stop(tmp_path: Path, rows: list[Row]) -> None:
    twice = [rows[0], rows[0], rows[2]]
    write_shards(twice, tmp_path / "whole", shard_bytes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module._Writer, "_finish", _only_once(shards_module._Writer._finish))
        with pytest.raises(KeyboardInterrupt):
            write_shards(twice, tmp_path / "s", shard_bytes=1)
    write_shards(twice, tmp_path / "s", shard_bytes=1)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    manifest = Manifest.load(tmp_path / "s")
    assert manifest is not None
    assert [s.clips for s in manifest.shards] == [1, 1, 1]
    keys = {open_index(tmp_path / "s").key(i) for i in range(3)}
    assert len(keys) == 3


def _only_once(real: object) -> object:
    calls: list[int] = []

    def finish(self: object, place: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, place)  # type: ignore[operator]

    return finish


def test_options_are_part_of_the_set(rows: list[Row], tmp_path: Path) -> None:
    """Other options are another set: none is taken for done by mistake."""
    write_shards(rows, tmp_path / "s", **OPTIONS)
    others = {"channels": "mono", "clip_seconds": 0.2, "min_seconds": 0.01, "sample_rate": 8000}
    for name, value in others.items():
        with pytest.raises(UserError, match="already holds a complete set"):
            write_shards(rows, tmp_path / "s", **{**OPTIONS, name: value})
    source = json.loads((tmp_path / "s/manifest.json").read_text())["source"]
    assert len(source) == 64
