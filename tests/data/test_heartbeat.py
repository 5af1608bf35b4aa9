"""The heartbeat: each process writes its own row, any reads all of them."""

from __future__ import annotations

import os
import pickle
import re
import time
from multiprocessing import active_children
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import get_worker_info

from bat.data.heartbeat import Heartbeat
from bat.data.index import Index
from bat.data.module import AudioData
from bat.data.sequential_data import SequentialData
from bat.types import Clip
from tests.data.test_loader import kill_all


def test_a_reader_stands_where_it_began_last_and_nowhere_when_it_rests() -> None:
    heartbeat = Heartbeat(2)
    assert heartbeat.readings() == []
    heartbeat.reads(7)
    time.sleep(0.02)
    ((reader, what, seconds),) = heartbeat.readings()
    assert (reader, what) == ("the training process", 7)
    assert 0.02 <= seconds < 5
    heartbeat.reads(0)
    assert heartbeat.readings()[0].what == 0
    assert heartbeat.readings()[0].seconds < seconds
    heartbeat.rests()
    assert heartbeat.readings() == []


def test_what_another_process_writes_is_seen_here() -> None:
    """By a fork, and through the pickle that torch gives to a process it spawns."""
    heartbeat = Heartbeat(1)
    for other in (heartbeat, pickle.loads(bytes(ForkingPickler.dumps(heartbeat)))):
        pid = os.fork()
        if pid == 0:
            other.reads(41)
            os._exit(0)
        os.waitpid(pid, 0)
        assert [reading.what for reading in heartbeat.readings()] == [41]
        heartbeat.clear()
        assert heartbeat.readings() == []


def until(what: Any, seconds: float = 20.0) -> Any:
    """The first true value of ``what()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def stream(index: Index, **more: Any) -> AudioData:
    how: dict[str, Any] = {"batch": 2, "batches": 20, "sample_rate": 16_000, "clip_seconds": 0.3}
    return AudioData(index=index, **(how | more))


@pytest.fixture
def stuck(toy_index: Index, monkeypatch: pytest.MonkeyPatch) -> tuple[Index, int]:
    """An index one clip of which is never read to its end, in worker 1 alone."""
    clip, read = 3, toy_index.read

    def slow(i: int) -> Clip:
        worker = get_worker_info()
        if i == clip and worker is not None and worker.id == 1:
            time.sleep(60)
        return read(i)

    monkeypatch.setattr(toy_index, "read", slow)
    return toy_index, clip


def test_a_stuck_worker_is_named_with_its_clip_and_shard(stuck: tuple[Index, int]) -> None:
    index, clip = stuck
    data = stream(index, workers=2)
    before = set(active_children())
    batches = iter(data.train_dataloader())
    name = re.escape(f"worker 1: {index.shard_name(clip)}, clip {index.key(clip)}, for ")
    until(lambda: [bool(re.fullmatch(name + r"\d+ s", s)) for s in data.sitting_on()] == [True])
    kill_all(before)
    del batches


def test_the_training_process_and_idle_workers(toy_index: Index, monkeypatch) -> None:
    data, seen, read = stream(toy_index), list[str](), toy_index.read

    def told(i: int) -> Clip:
        seen.extend(data.sitting_on())
        return read(i)

    monkeypatch.setattr(toy_index, "read", told)
    next(iter(data.train_dataloader()))
    clips = data.plan.clips(np.arange(2))
    assert seen == [f"the training process: {data.named(int(i))}, for 0 s" for i in clips]
    assert data.sitting_on() == []


def test_reading_front_to_end_names_the_shard(tmp_path: Path, toy_shards: Path) -> None:
    """The second shard is a pipe that nobody writes to: the first clip behind it never comes."""
    name = sorted(path.name for path in toy_shards.glob("*.tar"))[0]
    shards = [tmp_path / name, tmp_path / "zz.tar"]
    for shard in shards:
        shard.write_bytes((toy_shards / name).read_bytes())
    data = SequentialData(shards, batch=2, sample_rate=16_000, clip_seconds=0.3, workers=2)
    shards[1].unlink()
    os.mkfifo(shards[1])
    before = set(active_children())
    batches = iter(data.train_dataloader())
    lines = until(lambda: [line for line in data.sitting_on() if "zz.tar, for " in line])
    assert all(re.fullmatch(r"worker [01]: zz.tar, for \d+ s", line) for line in lines)
    kill_all(before)
    del batches
