"""Loader workers are killed; the batches are what they would have been, and the run is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bat.data.index import Index
from bat.data.loader import OUTLIVED, Loader
from bat.data.module import eval_loader
from bat.data.sequential_data import SequentialData
from bat.errors import Interrupted, UserError
from tests.data.test_module import data


class Echo(Dataset[Any]):
    """Gives each batch of items back, having done ``act``."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def __getitems__(self, items: list[Any]) -> Any:
        self.act(items[0][0])
        return [number for number, _ in items]


class Numbers(torch.utils.data.Sampler[Any]):
    """Batches ``[(k, 0)]``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return ([(k, 0)] for k in range(self.count))


def echo(
    count: int = 12, *, workers: int = 2, act: Callable[[int], None] = lambda k: None, **more: Any
) -> Loader:
    return Loader(Echo(act), Numbers(count), workers=workers, **more)


def numbers(batches: Any) -> list[int]:
    return [number for got in batches for number in got]


def kill_one(before: set[Any]) -> int:
    """Kill one of the processes that are not among ``before``."""
    process = sorted(set(active_children()) - before, key=lambda p: p.pid or 0)[-1]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def kill_all(before: set[Any]) -> None:
    """Kill the processes that are not among ``before``: torch would wait for each of them."""
    for process in set(active_children()) - before:
        process.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_loader__worker_killed_no_batch_is_lost_or_repeated(toy_index: Index, workers: int) -> None:
    wanted = list(data(toy_index, batches=20).train_dataloader())
    stream, told = data(toy_index, batches=20, workers=workers), list[str]()
    stream.on_death = told.append
    before, got = set(active_children()), []
    for batch in stream.train_dataloader():
        got.append(batch)
        if len(got) == 5:
            kill_one(before)
    assert [b.positions.tolist() for b in got] == [b.positions.tolist() for b in wanted]
    assert all(a.waves.equal(b.waves) for a, b in zip(got, wanted, strict=True))
    (line,) = told
    assert f"worker {workers - 1} was killed by SIGKILL" in line
    assert "data.workers" in line


def test_loader__worker_killed_by_a_clip_names_the_clip(toy_index: Index, monkeypatch) -> None:
    clip, read, main = 3, toy_index.read, os.getpid()

    def deadly(i: int) -> Any:
        if i == clip and os.getpid() != main:
            os._exit(3)
        return read(i)

    monkeypatch.setattr(toy_index, "read", deadly)
    stream, told = data(toy_index, workers=1), list[str]()
    stream.on_death = told.append
    assert len(list(stream.train_dataloader())) == 4
    assert len(told) == 1
    assert "exit code 3" in told[0]
    assert f"{toy_index.shard_name(clip)}, clip {toy_index.key(clip)}" in told[0]


def test_eval_loader__worker_killed_ends_the_command(toy_index: Index) -> None:
    ids, before = np.arange(7), set(active_children())
    loader = eval_loader(toy_index, ids, batch=2, sample_rate=16_000, clip_seconds=0.5, workers=2)
    for _ in range(2):
        assert [k for b in loader for k in b.keys] == [toy_index.key(i) for i in range(7)]
    kill_one(before)  # between two passes: workers are kept for the next one
    with pytest.raises(Interrupted, match="SIGKILL"):
        list(loader)


def test_sequential__worker_killed_goes_on_in_the_main_process(toy_shards: Path) -> None:
    stream = SequentialData(
        [toy_shards], batch=2, sample_rate=16_000, clip_seconds=0.3, split="all", workers=1
    )
    told, before = list[str](), set(active_children())
    stream.on_death = told.append
    batches = iter(stream.train_dataloader())
    next(batches)
    kill_one(before)
    assert all(len(next(batches).keys) == 2 for _ in range(6))
    assert len(told) == 1


def test_loader__death_raises_nothing_between_two_batches() -> None:
    """torch's handler of SIGCHLD would raise in the midst of a step."""
    before, told = set(active_children()), list[str]()
    batches = iter(echo(on_death=told.append))
    assert numbers([next(batches)]) == [0]
    kill_one(before)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        sum(range(1000))
    assert told == []
    assert numbers(batches) == list(range(1, 12))
    assert len(told) == 1


def faulty(k: int) -> None:
    if k == 3:
        raise KeyError("a bug")


def refusing(k: int) -> None:
    if k == 3:
        raise UserError("label 'dog' is not in the vocabulary:\ngive one") from KeyError("dog")


@pytest.mark.parametrize("workers", [0, 2])
def test_loader__exception_of_a_worker_is_no_death(workers: int) -> None:
    before = set(active_children())
    batches = iter(echo(act=faulty, workers=workers))
    assert numbers(next(batches) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(KeyError, match="a bug"):
        next(batches)
    kill_all(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader__user_error_keeps_its_own_words(workers: int) -> None:
    before = set(active_children())
    batches = iter(echo(act=refusing, workers=workers))
    assert numbers(next(batches) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "label 'dog' is not in the vocabulary:\ngive one"
    kill_all(before)


def test_loader__workers_outlive_the_runs_signals() -> None:
    before = set(active_children())
    batches = iter(echo(20))
    assert numbers([next(batches)]) == [0]
    for process in set(active_children()) - before:
        for number in OUTLIVED:
            os.kill(process.pid or 0, number)
    assert numbers(batches) == list(range(1, 20))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(OUTLIVED)


STUCK = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from multiprocessing import active_children
from tests.data.test_loader import echo

def act(k):
    if k > 1:
        time.sleep(60)

batches = iter(echo(act=act))
next(batches)
print(*(process.pid for process in active_children()), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.modules["kept"] = batches
"""


@pytest.mark.parametrize("how", ["killed", "at its end"])
def test_loader__stuck_workers_end_with_their_parent(how: str) -> None:
    """multiprocessing would send a SIGTERM, which they ignore, and wait."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", STUCK, root, how]
    done = subprocess.run(command, timeout=120, check=False, stdout=subprocess.PIPE, text=True)
    assert done.returncode == (-9 if how == "killed" else 0)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


SHM = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from bat.data import heartbeat

def full(*_, **__):
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

torch.Tensor.share_memory_ = full
heartbeat.Heartbeat(1)
"""


def test_heartbeat__full_shared_memory_is_a_user_error() -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", SHM, root]
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert "--shm-size" in done.stderr
    assert "data.workers=0" in done.stderr
