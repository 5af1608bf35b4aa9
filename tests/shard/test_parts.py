"""Shards written and verified in parts: the same bytes for any division and after any kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bat import io
from bat.data.manifest import Manifest
from bat.data.parts import Part
from bat.data.sources import UNFINISHED
from bat.errors import UserError
from bat.shard.pack import Recipe
from bat.shard.plan import plan
from bat.shard.verify import verify
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.shard.files import contents, noise, recording

OPTIONS: dict[str, Any] = {"shard_bytes": 11_000}
"""Shards of two clips or three."""


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Fourteen clips; the fourth shard, and one of the first, cannot be read."""
    made = [recording(tmp_path / f"in/{i:02d}.wav", noise(i, 0.05), fold=i % 3) for i in range(14)]
    for i in (1, 9, 10, 11):
        made[i].path.write_bytes(b"no audio" * 200)
    return made


@pytest.fixture
def whole(rows: list[Row], tmp_path: Path) -> dict[str, str]:
    write_shards(rows, tmp_path / "whole", **OPTIONS)
    return contents(tmp_path / "whole")


def test_write_shards__shard_without_a_readable_clip_is_missing_by_number(
    rows: list[Row], whole: dict[str, str], tmp_path: Path
) -> None:
    begins = [place.row for place in plan(rows, Recipe(), **OPTIONS)]
    assert begins == [0, 3, 6, 9, 12, 14]
    manifest = Manifest.load(tmp_path / "whole")
    assert manifest is not None
    assert [(s.name[6:11], s.clips) for s in manifest.shards] == [
        *(("00000", 2), ("00001", 3), ("00002", 3), ("00004", 2)),
    ]
    assert [entry["key"] for entry in manifest.left_out] == ["01", "09", "10", "11"]


@pytest.mark.parametrize("count", [2, 5, 9])
def test_write_shards__any_division_gives_the_same_bytes(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, count: int
) -> None:
    out = tmp_path / "s"
    made = [write_shards(rows, out, part=Part(k, count), **OPTIONS) for k in range(count, 0, -1)]
    assert made[0] is None
    assert made[-1] == Manifest.load(out)
    assert contents(out) == whole
    write_shards(rows, out, part=Part(1, count), **OPTIONS)  # a retry of a scheduler
    assert contents(out) == whole


def killed(call: Any, *, at: int, before: bool) -> bool:
    """Returns True if ``call``, in a process of its own, was killed at its ``at``-th file."""
    child = os.fork()
    if not child:
        real, count = io.replace_durably, [0]

        def replace(temporary: Path, target: Path) -> None:
            count[0] += 1
            if count[0] == at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(temporary, target)
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

        io.replace_durably = replace
        try:
            call()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False])
def test_write_shards__part_killed_at_every_file_gives_the_same_bytes(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, before: bool
) -> None:
    out = tmp_path / "s"
    write_shards(rows, out, part=Part(1, 2), **OPTIONS)
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    kills = 0
    while killed(
        lambda: write_shards(rows, out, part=Part(2, 2), **OPTIONS), at=kills + 1, before=before
    ):
        kills += 1
        assert kills < 50
    assert kills >= 3
    assert write_shards(rows, out, **OPTIONS) is not None
    assert contents(out) == whole
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()


def test_write_shards__join_names_the_parts_that_are_missing(
    rows: list[Row], whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    write_shards(rows, out, part=Part(2, 5), **OPTIONS)
    with pytest.raises(UserError, match=r"4 of 5 shards are missing \(1/5, 3/5, 4/5, 5/5\)"):
        write_shards(rows, out, join_only=True, **OPTIONS)
    with pytest.raises(UserError, match="holds 1 finished shards of an interrupted run with other"):
        write_shards(rows, out, part=Part(1, 5), codec="flac", **OPTIONS)
    for k in (1, 3, 4, 5):
        write_shards(rows, out, part=Part(k, 5, joins=False), **OPTIONS)
    assert (out / UNFINISHED).is_dir()
    os.truncate(out / "shard-00001.tar", 100)
    with pytest.raises(UserError, match="shard-00001 is not as it was written"):
        write_shards(rows, out, join_only=True, **OPTIONS)
    write_shards(rows, out, part=Part(2, 5), **OPTIONS)
    assert contents(out) == whole


def test_verify__parts_find_what_one_process_finds(
    rows: list[Row], whole: dict[str, str], tmp_path: Path
) -> None:
    shards, state = tmp_path / "whole", tmp_path / "report.json.parts"
    with (shards / "shard-00001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"\xff" * 64)
    (shards / "shard-00002.tar").write_bytes((shards / "shard-00000.tar").read_bytes())
    report = verify(shards)
    assert report is not None
    assert not report.ok
    assert verify(shards, state=state, part=Part(1, 3)) is None
    assert verify(shards, state=state, part=Part(3, 3)) is None
    assert verify(shards, state=state, part=Part(2, 3)) == report
    assert not state.exists()


def test_part__is_parsed_and_covers_each_unit_once() -> None:
    for count in (1, 3, 64):
        units = [u for k in range(1, count + 1) for u in Part.parse(f"{k}/{count}").of(10)]
        assert units == list(range(10))
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match=f"--part {text}"):
            Part.parse(text)
