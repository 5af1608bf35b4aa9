"""The same bytes with any number of processes and after any interruption; who may write where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat import io
from bat.audio.encode import encode
from bat.data.index import open_index
from bat.data.sources import UNFINISHED
from bat.errors import UserError
from bat.lock import hold
from bat.shard import pack, write
from bat.shard.write import write_shards
from bat.tasks.base import Row, load_task
from tests.shard.files import contents

OPTIONS: dict[str, Any] = {"codec": "flac", "clip_seconds": 0.1, "shard_bytes": 20_000}
KILLED = """
import os, sys
from pathlib import Path
from bat.shard import write
from bat.tasks.base import load_task
if __name__ == "__main__":
    saved = []
    real = write.scan
    def scan(*args):  # a shard is on disk and not in the journal
        if len(saved) == 2: os.kill(os.getpid(), 9)
        saved.append(1)
        return real(*args)
    write.scan = scan
    rows, names = load_task("folder").read(sys.argv[1])
    write.write_shards(rows, Path(sys.argv[2]), jobs=int(sys.argv[3]), **{options})
"""


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Files of 0.05 to 0.65 s; one is no audio, one shorter than its header claims."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"in/c{i % 2}/{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = rng.standard_normal(800 + 1600 * (i * 5 % 8)) * 0.1
        path.write_bytes(encode(wave, sample_rate=16_000, codec="wav"))
    (tmp_path / "in/c0/2.wav").write_bytes(b"no audio")
    forged = bytearray(encode(rng.standard_normal(4000) * 0.1, sample_rate=16_000, codec="flac"))
    forged[22:26] = (16_000).to_bytes(4, "big")
    (tmp_path / "in/c0/5.flac").write_bytes(forged)
    return load_task("folder").read(tmp_path / "in")[0]


@pytest.fixture
def whole(rows: list[Row], tmp_path: Path) -> dict[str, str]:
    """The files of an undisturbed run."""
    manifest = write_shards(rows, tmp_path / "whole", **OPTIONS)
    assert len(manifest.shards) >= 4
    lost = [entry["key"].split("_00")[0] for entry in manifest.left_out]
    assert (lost.count("c0__2"), lost.count("c0__5")) == (1, 8)
    return contents(tmp_path / "whole")


def stopped(rows: list[Row], out: Path, *, shards: int) -> None:
    """Writes ``rows`` until so many shards are finished, then stops as by a Ctrl-C."""
    real = write.scan
    done: list[int] = []

    def scan(*args: Any) -> Any:
        if len(done) == shards:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "scan", scan)
        with pytest.raises(KeyboardInterrupt):
            write_shards(rows, out, **OPTIONS)


def test_write_shards__number_of_processes_does_not_matter(
    rows: list[Row], whole: dict[str, str], tmp_path: Path
) -> None:
    write_shards(rows, tmp_path / "s", jobs=3, **OPTIONS)
    assert contents(tmp_path / "s") == whole


def test_write_shards__killed_then_run_again_gives_the_same_bytes(
    rows: list[Row], whole: dict[str, str], tmp_path: Path
) -> None:
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(KILLED.replace("{options}", repr(OPTIONS)))
    call = [sys.executable, str(script), str(tmp_path / "in"), str(out), "2"]
    assert subprocess.run(call, timeout=120).returncode == -9
    assert (out / UNFINISHED).exists()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        open_index(out)
    kept = [out / f"shard-0000{i}.tar" for i in range(2)]
    stamps = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(UserError, match="holds 2 finished shards of an interrupted run with other"):
        write_shards(rows[:3], out, **OPTIONS)
    write_shards(rows, out, **OPTIONS)
    assert contents(out) == whole
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # kept, not written again


def test_write_shards__stopped_at_every_clip_gives_the_same_bytes(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "CHUNK_SECONDS", 0.3)
    write_shards(rows, tmp_path / "cut_finely", **OPTIONS)
    whole = contents(tmp_path / "cut_finely")
    real, room = write.escape_key, [0]

    def escape_key(name: str) -> str:
        if room[0] == 0:
            raise KeyboardInterrupt
        room[0] -= 1
        return real(name)

    monkeypatch.setattr(write, "escape_key", escape_key)
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


@pytest.mark.parametrize("harm", ["tar", "idx", "swapped", "record", "older"])
def test_write_shards__damaged_leftovers_are_written_again(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, harm: str
) -> None:
    out = tmp_path / "s"
    stopped(rows, out, shards=3)
    if harm == "tar":
        with (out / "shard-00001.tar").open("ab") as file:
            file.truncate(5_000)
    elif harm == "idx":
        (out / "shard-00001.idx.npz").write_bytes(b"")
    elif harm == "swapped":
        for end in (".tar", ".idx.npz"):
            shutil.copy(out / f"shard-00000{end}", out / f"shard-00001{end}")
    elif harm == "record":
        next((out / UNFINISHED).glob("shard-00001-*.json")).write_bytes(b"\xff\n[]\n")
    else:  # as a bat that kept a file left it
        shutil.rmtree(out / UNFINISHED)
        (out / UNFINISHED).write_bytes(b"{}\n")
    write_shards(rows, out, **OPTIONS)
    assert contents(out) == whole


def test_write_shards__full_disk_keeps_the_finished_shards(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            write_shards(rows, tmp_path / "s", **OPTIONS)
    assert not (tmp_path / "s").exists()
    real = io.replace_durably

    def replace(temporary: Path, target: Path) -> None:
        if target.name == "shard-00001.tar":
            full()
        real(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(io, "replace_durably", replace)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            write_shards(rows, tmp_path / "s", **OPTIONS)
    left = {path.name for path in (tmp_path / "s").iterdir()}
    assert left == {UNFINISHED, "shard-00000.tar", "shard-00000.idx.npz"}
    write_shards(rows, tmp_path / "s", **OPTIONS)
    assert contents(tmp_path / "s") == whole


def test_write_shards__first_shard_without_its_table_is_unfinished_and_continued(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: object) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write.ShardTable, "to_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            write_shards(rows, tmp_path / "s", **OPTIONS)
    with pytest.raises(UserError, match="unfinished"):
        open_index([str(tmp_path / "s")])
    write_shards(rows, tmp_path / "s", **OPTIONS)
    assert contents(tmp_path / "s") == whole


def test_write_shards__folder_in_use_is_refused(rows: list[Row], tmp_path: Path) -> None:
    with hold(tmp_path / "s"), pytest.raises(UserError, match="in use"):
        write_shards(rows, tmp_path / "s", **OPTIONS)


def test_write_shards__same_key_twice_stays_apart_after_a_stop(
    tmp_path: Path, rows: list[Row]
) -> None:
    twice = [rows[0], rows[0], rows[2]]
    for out, shards in ((tmp_path / "whole", 3), (tmp_path / "s", 1)):
        if shards < 3:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(OPTIONS, "shard_bytes", 1)
                patch.delitem(OPTIONS, "clip_seconds")
                patch.delitem(OPTIONS, "codec")
                stopped(twice, out, shards=shards)
        manifest = write_shards(twice, out, shard_bytes=1)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert [s.clips for s in manifest.shards] == [1, 1, 1]
    assert len({open_index(tmp_path / "s").key(i) for i in range(3)}) == 3


def test_write_shards__options_are_part_of_the_set(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "s", **OPTIONS)
    others = {"channels": "mono", "clip_seconds": 0.2, "min_seconds": 0.01, "sample_rate": 8000}
    for name, value in others.items():
        with pytest.raises(UserError, match="already holds a complete set"):
            write_shards(rows, tmp_path / "s", **{**OPTIONS, name: value})
    source = json.loads((tmp_path / "s/manifest.json").read_text())["source"]
    assert len(source) == 64
