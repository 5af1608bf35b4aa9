"""Loader workers are killed in every way; the stream is what it would have been."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bat.data.index import Index
from bat.data.loader import LastingLoader, Replay, Restarts
from bat.data.module import AudioData, eval_loader
from bat.data.sequential_data import SequentialData
from bat.data.workers import OUTLIVED, Workers, kill_workers, worker_init
from bat.errors import UserError
from bat.types import WaveBatch
from tests.data.test_board import until
from tests.data.test_module import Recorder, Seen, data, fit


class Echo(Dataset[Any]):
    """Gives each batch of items back, with ``ballast`` bytes, having done ``act``."""

    def __init__(
        self, *, ballast: int = 0, act: Callable[[list[Any]], None] = lambda items: None
    ) -> None:
        self.ballast, self.act = ballast, act

    def __getitems__(self, items: list[Any]) -> Any:
        self.act(items)
        return [number for number, _ in items], b"x" * self.ballast


class Numbers(torch.utils.data.Sampler[Any]):
    """Batches ``[(k, 0)]``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return ([(k, 0)] for k in range(self.count))


def echo(
    count: int = 12, *, workers: int = 2, limit: int = 10, pin: bool = False, **more: Any
) -> LastingLoader:
    how: dict[str, Any] = {"workers": workers, "restarts": Restarts(limit), "pin_memory": pin}
    return LastingLoader(Echo(**more), Numbers(count), **how)


def numbers(batches: Any) -> list[int]:
    return [number for got, _ in batches for number in got]


def processes(batches: Any) -> list[Any]:
    assert isinstance(batches.batches, Workers)
    return list(batches.batches._workers)


def kill(batches: Any, worker: int = 0) -> None:
    """Kill one worker and wait until it is noticed."""
    os.kill(processes(batches)[worker].pid, signal.SIGKILL)
    assert batches.batches.watch.found.wait(20)


# ---- the stream goes on


def test_replay_begins_with_what_never_arrived() -> None:
    replay = Replay(Numbers(6))
    first = iter(replay)
    drawn = [next(first) for _ in range(4)]
    replay.arrived()
    second = iter(replay)
    assert [next(second), next(second)] == drawn[1:3]
    replay.arrived()
    third = iter(replay)  # broken again before all was handed out anew
    assert [batch[0][0] for batch in third] == [2, 3, 4, 5]
    replay.begin()
    assert len(list(replay)) == len(replay) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_no_batch_is_lost_or_repeated(
    toy_index: Index, workers: int
) -> None:
    wanted = list(data(toy_index, batches=30).train_dataloader())
    stream = data(toy_index, batches=30, workers=workers)
    rng, got = np.random.default_rng(0), list[WaveBatch]()
    batches: Any = iter(stream.train_dataloader())
    for batch in batches:
        got.append(batch)
        if len(got) in (1, 8, 15, 22):  # more apart than what is under way
            for process in rng.permutation(processes(batches))[: 1 + len(got) % 2]:
                os.kill(process.pid, signal.SIGKILL)
    assert [b.positions.tolist() for b in got] == [b.positions.tolist() for b in wanted]
    assert [b.keys for b in got] == [b.keys for b in wanted]
    assert all(a.waves.equal(b.waves) for a, b in zip(got, wanted, strict=True))
    assert stream.restarts == 4


def test_under_lightning_with_epochs(toy_index: Index) -> None:
    """Killed in a step, and in the last one of an epoch: workers are kept for the next one."""

    class Killing(Recorder):
        def training_step(self, batch: WaveBatch, batch_idx: int) -> torch.Tensor:
            loader = self.trainer.train_dataloader
            if len(self.seen) in (2, 7):
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
                assert loader._iterator.watch.found.wait(20)
            return super().training_step(batch, batch_idx)

    def run(model: Recorder, workers: int) -> tuple[Seen, AudioData]:
        module = data(toy_index, workers=workers)  # epochs of 4
        fit(model, module, steps=11)
        return model.seen, module

    wanted, _ = run(Recorder(), 0)
    seen, module = run(Killing(), 2)
    assert seen == wanted
    assert module.restarts == 2


def test_between_two_passes(toy_index: Index) -> None:
    ids = np.arange(7)
    loader = eval_loader(toy_index, ids, batch=2, sample_rate=16_000, clip_seconds=0.5, workers=2)
    for _ in range(3):
        batches: Any = iter(loader)
        assert [k for b in batches for k in b.keys] == [toy_index.key(i) for i in range(7)]
        kill(batches)
    assert loader.restarts.count == 2


def test_a_worker_killed_inside_a_message_leaves_nobody_waiting() -> None:
    """A pipe holds 64 KiB: a worker stands in the middle of its message and holds the lock."""
    batches: Any = iter(echo(8, ballast=1 << 20))
    workers = processes(batches)
    os.kill(until(lambda: [w.pid for w in workers if writes(w.pid)])[0], signal.SIGKILL)
    assert numbers(batches) == list(range(8))
    assert batches.loader.restarts.count == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_with_the_thread_that_pins_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch has it where there is a GPU; here it is lent one in name."""
    accelerator = "torch.accelerator."
    monkeypatch.setattr(accelerator + "is_available", lambda: True)
    monkeypatch.setattr(accelerator + "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(accelerator + "current_device_index", lambda: 0)
    monkeypatch.setattr(accelerator + "set_device_index", lambda index: None)
    batches: Any = iter(echo(30, pin=True))
    assert numbers(itertools.islice(batches, 3)) == [0, 1, 2]
    thread = batches.batches._pin_memory_thread
    kill(batches)
    assert numbers(batches) == list(range(3, 30))
    assert batches.loader.restarts.count == 1
    thread.join(10)
    assert not thread.is_alive()


def writes(pid: int) -> bool:
    """Whether a thread of ``pid`` waits in a write to a pipe."""
    for path in glob.glob(f"/proc/{pid}/task/*/wchan"):
        with suppress(OSError):
            if "pipe_write" in Path(path).read_text():
                return True
    return False


@pytest.mark.parametrize("last", [False, True])
def test_a_lock_held_by_the_dead_keeps_nobody_waiting(last: bool) -> None:
    """The event by which torch ends its workers: one may be killed while it looks at it."""
    batches: Any = iter(echo())
    assert numbers(itertools.islice(batches, 2)) == [0, 1]
    held, done = threading.Event(), threading.Event()

    def hold(lock: Any) -> None:
        with lock:
            held.set()
            done.wait()

    lock = batches.batches._workers_done_event._cond
    thread = threading.Thread(target=hold, args=(lock,), daemon=True)
    thread.start()
    held.wait()
    if last:  # nobody asks for another batch: the loader is to end
        kill(batches)
        batches.batches._shutdown_workers()
    else:
        os.kill(processes(batches)[0].pid, signal.SIGKILL)
        assert numbers(batches) == list(range(2, 12))
    done.set()
    thread.join()


def test_a_death_is_no_signal_to_the_training_process() -> None:
    """torch's handler of SIGCHLD would raise in the midst of a step."""
    batches: Any = iter(echo())
    assert numbers([next(batches)]) == [0]
    os.kill(processes(batches)[0].pid, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        sum(range(1000))
    assert numbers(batches) == list(range(1, 12))


def test_front_to_end_goes_on_with_another_epoch_and_says_so(toy_shards: Path, caplog) -> None:
    stream = SequentialData(
        [toy_shards], batch=2, sample_rate=16_000, clip_seconds=0.3, split="all", workers=2
    )
    batches: Any = iter(stream.train_dataloader())
    next(batches)
    kill(batches, 1)
    with caplog.at_level(logging.WARNING, "bat"):
        epoch = batches.loader.dataset.clips.epoch
        assert all(len(next(batches).keys) == 2 for _ in range(4))
    assert batches.loader.dataset.clips.epoch == epoch + 1
    assert "not exactly resumable" in caplog.text
    assert stream.restarts == 1


# ---- who is told, and when it is too much


def test_a_replacement_is_told_with_the_clip(toy_index: Index, monkeypatch, caplog) -> None:
    """A clip that kills its reader, once."""
    clip, read, once = 3, toy_index.read, torch.zeros(1).share_memory_()

    def deadly(i: int) -> Any:
        if i == clip and not once:
            once.fill_(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return read(i)

    monkeypatch.setattr(toy_index, "read", deadly)
    stream, told = data(toy_index, workers=1), list[str]()
    with caplog.at_level(logging.WARNING, "bat"):
        assert len(list(stream.train_dataloader())) == 4
    line = (
        f"a loader was replaced: worker 0 was killed by SIGKILL at {toy_index.shard_name(clip)}, "
        f"clip {toy_index.key(clip)}; no batch is lost or repeated (replacement 1)"
    )
    assert [record.getMessage() for record in caplog.records] == [line]
    once.fill_(0)
    stream.on_restart = told.append
    caplog.clear()
    list(stream.train_dataloader())
    assert told == [line.replace("replacement 1", "replacement 2")]
    assert caplog.records == []
    assert stream.restarts == 2


def deadly(items: list[Any]) -> None:
    if items[0][0] == 5:
        os._exit(3)


def test_too_many_deaths_are_an_error_with_the_likely_causes() -> None:
    batches: Any = iter(echo(act=deadly, workers=1, limit=2))
    got: list[int] = []
    with pytest.raises(UserError) as error:  # it reads ahead: some batches may not be out by then
        got.extend(numbers([batch])[0] for batch in batches)
    assert got == list(range(len(got)))
    assert len(got) <= 5
    said = str(error.value)
    assert said.startswith(
        "loader workers died 3 times within 1000 micro-batches, the last time worker 0 ended with "
        "exit code 3: more than health.worker_restarts=2."
    )
    assert all(cause in said for cause in ("data.workers", "data.cache_waves_gb", "/dev/shm"))
    assert batches.loader.restarts.count == 2


def test_deaths_long_ago_are_forgiven() -> None:
    restarts = Restarts(1)
    restarts.died([(0, -9)])
    restarts.batches = 999
    with pytest.raises(UserError, match="died 2 times"):
        restarts.died([(0, -9)])
    restarts = Restarts(1)
    restarts.died([(0, -9)])
    restarts.batches = 1000
    restarts.died([(0, -9)])
    with pytest.raises(UserError, match="worker_restarts=-1"):
        Restarts(-1)


def faulty(items: list[Any]) -> None:
    if items[0][0] == 3:
        raise KeyError("a bug")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_a_worker_comes_through(workers: int) -> None:
    loader = echo(act=faulty, workers=workers)
    batches = iter(loader)
    assert numbers(itertools.islice(batches, 3)) == [0, 1, 2]
    with pytest.raises(KeyError, match="a bug"):
        next(batches)
    assert loader.restarts.count == 0
    kill_workers()  # torch would wait 10 s for them


# ---- how workers end


def test_workers_outlive_the_runs_signals() -> None:
    batches: Any = iter(echo(20))  # they may not have come to ``worker_init`` yet
    for number in OUTLIVED:
        for process in processes(batches):
            os.kill(process.pid, number)
    assert signal.SIGHUP in OUTLIVED
    assert numbers(batches) == list(range(20))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(OUTLIVED)
    assert batches.loader.restarts.count == 0


def gone(pids: list[int], seconds: float) -> bool:
    """Whether processes that are not our children end in time."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_workers_end_with_a_killed_parent_and_leave_no_shared_memory(toy_index: Index) -> None:
    """One of them stands in a write to a full pipe, where torch's own look at the parent never
    comes."""
    receive, send = os.pipe()
    parent = os.fork()
    if parent == 0:
        full, waves = iter(echo(50, ballast=1 << 20)), None
        waves = iter(data(toy_index, batches=100, workers=2).train_dataloader())
        next(waves)
        pids = [p.pid for batches in (full, waves) for p in processes(batches)]
        os.write(send, (" ".join(map(str, pids)) + "\n").encode())
        time.sleep(60)
        os._exit(0)
    with os.fdopen(receive) as pipe:
        pids = [int(pid) for pid in pipe.readline().split()]
    os.close(send)
    time.sleep(0.2)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert len(pids) == 4
    assert gone(pids, 10)
    assert [f for pid in [parent, *pids] for f in glob.glob(f"/dev/shm/torch_{pid}_*")] == []


def test_a_stuck_worker_is_ended_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for it and sends a SIGTERM, which it ignores."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    begun = torch.zeros(2).share_memory_()

    def sleepy(items: list[Any]) -> None:
        begun[items[0][0]] = 1
        time.sleep(100)

    for end in (lambda batches: batches.batches._shutdown_workers(), lambda _: kill_workers()):
        begun.fill_(0)
        batches: Any = iter(echo(act=sleepy))
        stuck = processes(batches)
        until(begun.all)
        end(batches)
        assert all(process.exitcode == -signal.SIGKILL for process in stuck)


def test_the_interpreter_ends_though_an_iterator_lives() -> None:
    """multiprocessing sends a SIGTERM to what lives at the end and waits."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.data.test_loader import echo\n"
        "batches = iter(echo()); next(batches); sys.modules['kept'] = batches\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code, root], timeout=120, check=False)
    assert done.returncode == 0


def test_a_forked_copy_of_a_loader_ends_nobodys_workers() -> None:
    batches: Any = iter(echo(20))
    next(batches)
    pid = os.fork()
    if pid == 0:
        batches.batches._shutdown_workers()
        kill_workers()
        os._exit(0)
    os.waitpid(pid, 0)
    assert numbers(batches) == list(range(1, 20))
    assert batches.loader.restarts.count == 0


def test_what_a_dead_worker_left_in_shared_memory_is_removed() -> None:
    batches: Any = iter(echo())
    next(batches)
    left = Path(f"/dev/shm/torch_{processes(batches)[0].pid}_1_2")
    left.write_bytes(b"half a batch")
    kill(batches)
    assert numbers(batches) == list(range(1, 12))
    assert not left.exists()


def test_worker_init_in_a_process_of_its_own() -> None:
    pid = os.fork()
    if pid == 0:
        worker_init(0)
        for number in OUTLIVED:
            os.kill(os.getpid(), number)
        time.sleep(1.2)  # its parent lives: so does it
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
