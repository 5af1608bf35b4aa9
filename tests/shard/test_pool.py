"""``ordered_map``: order, how far ahead it goes, errors, and the end of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bat.errors import UserError
from bat.shard.pool import AHEAD, cores, ordered_map
from tests.processes import alive, until


def slow_square(x: int, *, fail: int = -1) -> tuple[int, int]:
    time.sleep(0.02 if x % 2 else 0.0)  # the even ones overtake
    if x == fail:
        raise KeyError(f"at {x}")
    return x * x, os.getpid()


def die(x: int) -> bytes:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(300_000)


def interrupted(x: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)  # as a Ctrl-C in the terminal reaches every process
    return x


@pytest.mark.parametrize("jobs", [1, 2])
def test_ordered_map__results_in_order_and_few_items_ahead(jobs: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for x in range(20):
            taken.append(x)
            yield x

    found, processes = [], set()
    for count, (square, process) in enumerate(ordered_map(slow_square, items(), jobs=jobs), 1):
        assert len(taken) <= count + (AHEAD * jobs if jobs > 1 else 0)
        found.append(square)
        processes.add(process)
    assert found == [x * x for x in range(20)]
    assert (os.getpid() in processes) == (jobs == 1)
    assert len(processes) <= jobs


@pytest.mark.parametrize("jobs", [1, 2])
def test_ordered_map__exception_arrives_at_its_place(jobs: int) -> None:
    results = ordered_map(partial(slow_square, fail=3), range(10), jobs=jobs)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 4]
    with pytest.raises(KeyError, match="at 3"):
        next(results)


def test_ordered_map__dead_process_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"worker process died .* fewer jobs"):
        list(ordered_map(die, range(10), jobs=2))
    with pytest.raises(UserError, match="jobs=0"):
        list(ordered_map(die, range(10), jobs=0))


def test_ordered_map__ctrl_c_is_left_to_the_caller() -> None:
    try:
        assert list(ordered_map(interrupted, range(4), jobs=2)) == [0, 1, 2, 3]
    except KeyboardInterrupt:
        pytest.fail("a process took the Ctrl-C for its own")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_ordered_map__processes_end_with_a_killed_caller(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_pool import slow_square\n"
        "from bat.shard.pool import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    results = ordered_map(slow_square, range(10**6), jobs=2)\n"
        "    seen = set()\n"
        "    while len(seen) < 2: seen.add(next(results)[1])\n"
        "    print(*seen, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    call = [sys.executable, str(script), str(Path(__file__).parent)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -9
    children = [int(word) for word in done.stdout.split()]
    assert len(children) == 2
    until(lambda: not any(map(alive, children)))


def test_cores__are_those_of_this_process() -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert cores() == len(mine)
