"""Parts on Ray: killed workers, slow parts, a mistake of the user, Ray missing."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

from bat.cli import shard as cli
from bat.data import parts
from bat.data.parts import on_ray
from bat.errors import UserError
from bat.shard.write import write_shards
from bat.tasks.base import load_task
from tests.shard.files import contents, noise, recording

ROOT = Path(__file__).parents[2]
TASK = """
import os, signal
from pathlib import Path
from bat.cli.shard import _pack

def pack(options):
    mark = Path(options.marks) / f"{options.part}".replace("/", "-")
    if options.part.number in options.killed and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    _pack(options)
"""


def options(source: Path, out: Path, **more: object) -> argparse.Namespace:
    made = cli.build_parser().parse_args([str(source), str(out), "--shard-mb", "0.011"])
    return argparse.Namespace(**{**vars(made), "jobs": 1, "progress": False, **more})


def test_on_ray__parts_of_killed_workers_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is None:  # not imported here: that is for ``on_ray``, which sets it up
        pytest.skip("needs ray")
    (tmp_path / "ray_tasks.py").write_text(TASK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")  # of the workers
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for i in range(14):
        recording(tmp_path / f"in/c{i % 2}/{i:02d}.wav", noise(i, 0.05))
    (tmp_path / "in/c1/03.wav").write_bytes(b"no audio")
    rows, names = load_task("folder").read(tmp_path / "in")
    write_shards(rows, tmp_path / "whole", vocabulary=names, shard_bytes=11_000)
    given = options(tmp_path / "in", tmp_path / "s", marks=str(tmp_path), killed=[1, 3])
    on_ray("ray_tasks:pack", given, address="ray", count=4, cpus=1, gpu=False)
    assert {path.name for path in tmp_path.glob("*-4")} == {"1-4", "3-4"}
    assert not (tmp_path / "s/manifest.json").exists()
    call = [str(tmp_path / "in"), str(tmp_path / "s"), "--shard-mb", "0.011", "--join"]
    assert cli.main(call) == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


class FakeRay:
    """Ray whose part 2 never ends, but for its second copy."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause: Exception

    def __init__(self, mistake: str = "") -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.mistake = mistake

    def init(self, **how: object) -> None:
        pass

    shutdown = init

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, function: object) -> FakeRay:
        return self

    def options(self, **how: object) -> FakeRay:
        made = mock.Mock()
        made.remote = self.submit
        return made  # type: ignore[no-any-return]

    def submit(self, task: str, given: argparse.Namespace, folder: str) -> int:
        assert not given.part.joins
        self.begun.append(given.part.number)
        return len(self.begun) - 1

    def wait(self, running: list[int], timeout: float) -> tuple[list[int], list[int]]:
        done = [i for i in running if self.begun[i] != 2 or i > 3]
        return done[:1], []

    def get(self, done: int) -> float:
        if self.mistake:
            error = self.exceptions.RayTaskError()
            error.cause = UserError(self.mistake)
            raise error
        return 0.0

    def cancel(self, running: int, *, force: bool) -> None:
        self.cancelled.append(running)


def test_on_ray__part_that_takes_long_is_begun_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(parts, "SLOW_SECONDS", 0.0)
    given = options(tmp_path, tmp_path / "s")
    on_ray("x:y", given, address="ray", count=4, cpus=1, gpu=False)
    assert fake.begun == [1, 2, 3, 4, 2]
    assert fake.cancelled == [1]
    monkeypatch.setitem(sys.modules, "ray", FakeRay("clips.csv has no column path"))
    with pytest.raises(UserError, match=r"part 1/4: clips.csv has no column path"):
        on_ray("x:y", given, address="ray", count=4, cpus=1, gpu=False)


def test_on_ray__missing_ray_and_other_engines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tmp_path, tmp_path / "s")
    with pytest.raises(UserError, match="--on spark: ray"):
        on_ray("x:y", given, address="spark", count=1, cpus=1, gpu=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'bat-audio\[ray\]'"):
        on_ray("x:y", given, address="ray", count=1, cpus=1, gpu=False)
