"""One process a run folder: who is refused, and what a killed holder leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bat.errors import UserError
from bat.lock import LOCK, hold

HOLDER = """
import sys, time
from pathlib import Path
from bat.lock import hold
with hold(Path(sys.argv[1])):
    if "fork" in sys.argv:  # a loader worker inherits the open file
        import os
        if os.fork() == 0:
            time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *words: str) -> subprocess.Popen:
    made = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert made.stdout is not None
    assert made.stdout.readline() == "held\n"
    return made


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_hold__second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    first = holder(tmp_path)
    try:
        with (
            pytest.raises(UserError, match=rf"in use by process {first.pid} on .* another out="),
            hold(tmp_path),
        ):
            pass
    finally:
        end(first)


def test_hold__lock_of_a_killed_holder_is_free_though_its_child_lives_on(tmp_path: Path) -> None:
    first = holder(tmp_path, "fork")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    try:
        assert (tmp_path / LOCK).exists()
        with hold(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        end(first)
    assert not (tmp_path / LOCK).exists()


def test_hold__same_process_cannot_hold_a_folder_twice_but_again(tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(UserError, match="in use by this very process"), hold(tmp_path):
            pass
        other = subprocess.run(
            [sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True
        )
        assert "is in use by process" in other.stderr  # the refusal did not give the lock up
    with pytest.raises(RuntimeError, match="on the way"), hold(tmp_path):
        raise RuntimeError("on the way")
    with hold(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_hold__of_many_at_once_one_holds_at_a_time(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from bat.errors import UserError
from bat.lock import hold
folder = Path(sys.argv[1])
done = 0
until = time.monotonic() + 20
while done < 30 and time.monotonic() < until:
    try:
        with hold(folder):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            done += 1
    except UserError:
        pass
sys.exit(0 if done == 30 else 1)
"""
    several = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    until = time.monotonic() + 60
    assert [p.wait(timeout=max(1, until - time.monotonic())) for p in several] == [0, 0, 0]
