"""Loader workers are killed or stall: no batch is lost, and the run is told what they read."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset, get_worker_info

from bat.data.index import Index
from bat.data.loader import IDLE, OUTLIVED, Heartbeat, Loader
from bat.data.sequential import SequentialData
from bat.data.stream import eval_loader
from bat.errors import Interrupted, UserError
from bat.types import Clip
from tests.data.test_module import data
from tests.processes import alive, until


class Echo(Dataset[Any]):
    """Gives each batch of numbers back, having done ``act``."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def __getitems__(self, batch: list[int]) -> Any:
        self.act(batch[0])
        return batch


def echo(
    count: int = 12, *, workers: int = 2, act: Callable[[int], None] = lambda k: None, **more: Any
) -> Loader:
    batches: Any = [[k] for k in range(count)]
    return Loader(Echo(act), batches, workers=workers, **more)


def numbers(batches: Any) -> list[int]:
    return [number for got in batches for number in got]


def kill_one(before: set[Any]) -> None:
    """Kill one of the processes that are not among ``before``."""
    process = sorted(set(active_children()) - before, key=lambda p: p.pid or 0)[-1]
    os.kill(process.pid or 0, signal.SIGKILL)


def kill_all(before: set[Any]) -> None:
    """Kill the processes that are not among ``before``: torch would wait for each of them."""
    for process in set(active_children()) - before:
        process.kill()


# ---- workers that die


def test_loader__worker_that_dies_at_a_clip_costs_no_batch_and_the_clip_is_named(
    toy_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(data(toy_index, batches=20).train_dataloader())
    stream, told, got = data(toy_index, batches=20, workers=2), list[str](), list[Any]()
    stream.on_death = told.append
    clip, read, main = int(stream.plan.clips(np.array([9]))[0]), toy_index.read, os.getpid()

    def deadly(i: int) -> Any:
        if i == clip and os.getpid() != main:
            os._exit(3)
        return read(i)

    monkeypatch.setattr(toy_index, "read", deadly)
    for batch in stream.train_dataloader():
        got.append(batch)
        if len(got) == 1:
            time.sleep(0.2)  # it dies: torch's handler of SIGCHLD would raise here, within a step
            assert told == []
    assert [b.positions.tolist() for b in got] == [b.positions.tolist() for b in wanted]
    assert all(a.waves.equal(b.waves) for a, b in zip(got, wanted, strict=True))
    (line,) = told
    assert "ended with exit code 3" in line
    assert f"{toy_index.shard_name(clip)}, clip {toy_index.key(clip)}" in line
    assert "data.workers" in line


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (KeyError("a bug"), KeyError, "a bug"),
        (UserError("label 'dog' is unknown:\ngive one"), UserError, "^label .*:\ngive one$"),
        (RuntimeError("unable to write to file </torch_1_2>"), UserError, "--shm-size"),
    ],
)
def test_loader__exception_of_a_worker_is_no_death_and_keeps_its_words(
    workers: int, error: Exception, kind: type[Exception], says: str
) -> None:
    def act(k: int) -> None:
        if k == 3:
            raise error from KeyError("dog")

    before = set(active_children())
    batches = iter(echo(act=act, workers=workers))
    assert numbers(next(batches) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(kind, match=says):
        next(batches)
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
from bat.data.loader import Loader

class Slow:
    def __getitems__(self, batch):
        time.sleep(60 * (batch[0] > 1))
        return batch

def start():
    batches = iter(Loader(Slow(), [[k] for k in range(12)], workers=2))
    next(batches)
    print(*(process.pid for process in active_children()), flush=True)
    return batches

killed = os.fork()
if killed == 0:
    kept = start()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(killed, 0)
sys.modules["kept"] = start()
"""


def test_loader__stuck_workers_end_with_their_parent() -> None:
    """One is killed, the other ends: multiprocessing would send a SIGTERM, which the workers
    ignore, and wait."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", STUCK, root]
    done = subprocess.run(command, timeout=120, check=True, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    until(lambda: not any(alive(pid) for pid in pids))


# ---- what they read


def test_heartbeat__one_reads_what_another_process_writes() -> None:
    """By a fork, and through the pickle that torch gives to a process it spawns."""
    heartbeat = Heartbeat(2)
    assert heartbeat.readings() == []
    for other in (heartbeat, pickle.loads(bytes(ForkingPickler.dumps(heartbeat)))):
        pid = os.fork()
        if pid == 0:
            other.reads(41)
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.02)
        ((reader, what, seconds),) = heartbeat.readings()
        assert (reader, what) == ("the training process", 41)
        assert 0.02 <= seconds < 5
        heartbeat.reads(IDLE)
        assert heartbeat.readings() == []


def test_sitting_on__names_a_stuck_worker_its_clip_and_shard(
    toy_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, read = data(toy_index, batch=2, batches=20, workers=2), toy_index.read
    clip = int(stream.plan.clips(np.arange(2, 4))[0])  # of the second batch, worker 1's first

    def slow(i: int) -> Clip:
        worker = get_worker_info()
        if i == clip and worker is not None and worker.id == 1:
            time.sleep(60)
        return read(i)

    monkeypatch.setattr(toy_index, "read", slow)
    before = set(active_children())
    batches = iter(stream.train_dataloader())
    name = re.escape(f"worker 1: {stream.named(clip)}, for ")
    until(lambda: [bool(re.fullmatch(name + r"\d+ s", s)) for s in stream.sitting_on()] == [True])
    kill_all(before)
    del batches


def test_sitting_on__the_training_process_that_decodes(
    toy_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, seen, read = data(toy_index, batch=2), list[str](), toy_index.read

    def told(i: int) -> Clip:
        seen.extend(stream.sitting_on())
        return read(i)

    monkeypatch.setattr(toy_index, "read", told)
    next(iter(stream.train_dataloader()))
    clips = stream.plan.clips(np.arange(2))
    assert seen == [f"the training process: {stream.named(int(i))}, for 0 s" for i in clips]
    assert stream.sitting_on() == []


def test_sitting_on__names_the_shard_that_is_read_from_front_to_end(
    tmp_path: Path, toy_shards: Path
) -> None:
    """The second shard is a pipe that nobody writes to: the first clip behind it never comes."""
    name = sorted(path.name for path in toy_shards.glob("*.tar"))[0]
    shards = [tmp_path / name, tmp_path / "zz.tar"]
    for shard in shards:
        shard.write_bytes((toy_shards / name).read_bytes())
    stream = SequentialData(shards, batch=2, sample_rate=16_000, clip_seconds=0.3, workers=2)
    shards[1].unlink()
    os.mkfifo(shards[1])
    before = set(active_children())
    batches = iter(stream.train_dataloader())
    lines = until(lambda: [line for line in stream.sitting_on() if "zz.tar, for " in line])
    assert all(re.fullmatch(r"worker [01]: zz.tar, for \d+ s", line) for line in lines)
    kill_all(before)
    del batches
