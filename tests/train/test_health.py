"""What watches over a run: each alarm at its limit, none without cause, the run left as it is."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from bat.config.running import Health
from bat.errors import RESUME_ME, UserError
from bat.io import read_jsonl
from bat.train import health, watchdog
from bat.train.health import LINES, HealthMonitor
from bat.train.run_pretrain import pretrain
from bat.train.watchdog import GRACE_SECONDS, FetchClock, Watchdog


class Time:
    """A clock that only tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Events(list):
    """Stands for ``Metrics``: what was said, and the attributes a monitor uses."""

    def __init__(self) -> None:
        super().__init__()
        self.clips_per_second: list[float] = []
        self.extra: dict[str, float] = {}
        self.every, self.since = 1, 0.0

    def event(self, kind: str, line: str, **facts) -> None:
        self.append((kind, line, facts))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self]


# --- waiting for batches


class Slow(torch.utils.data.Dataset):
    """Takes ten seconds a batch."""

    def __init__(self, time: Time) -> None:
        self.time = time

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        self.time.now += 10
        return torch.zeros(1)


class Fits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (batch + self.weight).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_only_waiting_for_the_loader_is_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, clock = Time(monkeypatch), FetchClock()

    class Busy(Callback):
        """Probing, saving: hundreds of seconds, none of them the loader's."""

        def on_train_start(self, trainer, pl_module):
            trainer.profiler = clock

        def on_train_batch_start(self, *args):
            assert clock.since is None
            time.now += 300

        def on_train_batch_end(self, *args):
            assert clock.since is None
            time.now += 700

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[Busy()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Fits(), torch.utils.data.DataLoader(Slow(time)))
    assert clock.total == 2 * 4 * 10
    assert clock.since is None


def guard(clock: FetchClock, **changes) -> tuple[Watchdog, Events, list[str], SimpleNamespace]:
    said, left, run = Events(), [], SimpleNamespace(wanted=False)
    dog = Watchdog(
        clock,
        **{"warn_seconds": 10, "stop_seconds": 25, **changes},
        say=said.event,
        sitting_on=lambda: ["worker 1: shard-000003.tar, clip dog-17, for 9 s"],
        wanted=lambda: run.wanted,
        leave=left.append,
    )
    dog._before = 0.0
    return dog, said, left, run


def watch(dog: Watchdog, start: float, end: float) -> float:
    """Look every second from ``start`` to ``end``, as long as there is something to watch."""
    at = start
    while at < end:
        at += 1.0
        if dog.look(at):
            break
    return at


def test_a_stall_is_named_again_and_again_then_the_process_leaves() -> None:
    clock = FetchClock()
    dog, said, left, _ = guard(clock)
    assert dog.tick == 1.0
    clock.since = 0.5
    assert watch(dog, 0, 9) == 9
    assert not said
    assert watch(dog, 9, 100) == 25
    assert said.kinds == ["stall", "stall"]
    assert said[0][1] == "no batch for 10 s: worker 1: shard-000003.tar, clip dog-17, for 9 s"
    assert [facts["seconds"] for _, _, facts in said] == [10, 20]
    assert left == ["no batch for 25 s (health.stall_stop_seconds=25)"]


def test_work_between_batches_is_no_stall_and_waits_do_not_add_up() -> None:
    clock = FetchClock()
    dog, said, left, _ = guard(clock)
    watch(dog, 0, 1000)  # nobody waits: a long probing
    for i in range(100):  # nine seconds for each batch
        clock.since = 1000.0 + 10 * i
        watch(dog, clock.since, clock.since + 9)
        clock.since = None
        watch(dog, 1009.0 + 10 * i, 1010.0 + 10 * i)
    assert not said
    assert not left


def test_a_batch_that_comes_after_all_is_told_once() -> None:
    clock = FetchClock()
    dog, said, left, _ = guard(clock)
    clock.since = 0.0
    watch(dog, 0, 15)
    clock.since = 15.5  # the next wait has begun between two looks
    watch(dog, 15, 20)
    clock.since = None
    watch(dog, 20, 40)
    assert said.kinds == ["stall", "recovered"]
    assert said[1][1] == "the loader goes on after 15 s"
    assert not left


def test_time_in_which_the_whole_process_was_stopped_does_not_count() -> None:
    clock = FetchClock()
    dog, said, left, _ = guard(clock)
    clock.since = 0.0
    watch(dog, 0, 3)
    dog.look(3600.0)  # SIGSTOP, an hour, SIGCONT
    watch(dog, 3600, 3604)
    assert not said
    assert not left


@pytest.mark.parametrize(
    ("changes", "kinds", "stops"),
    [
        ({"stop_seconds": 0}, ["stall"] * 10, False),
        ({"warn_seconds": 0}, [], True),
    ],
)
def test_zero_is_never(changes, kinds, stops) -> None:
    clock = FetchClock()
    dog, said, left, _ = guard(clock, **changes)
    clock.since = 0.0
    watch(dog, 0, 100)
    assert said.kinds == kinds
    assert bool(left) == stops


def test_a_run_that_was_asked_to_end_does_not_wait_for_ever() -> None:
    clock = FetchClock()
    dog, _, left, run = guard(clock, stop_seconds=0)
    clock.since = 0.0
    watch(dog, 0, 500)
    assert not left
    run.wanted = True  # SIGTERM, and no batch end at which to save
    assert watch(dog, 500, 1000) == 500 + GRACE_SECONDS
    assert left == [f"asked to end, and no batch for {500 + GRACE_SECONDS:.0f} s"]


def test_the_watch_goes_on_when_the_disk_is_full_and_ends_when_told(caplog) -> None:
    tried = []

    def say(*args, **facts):
        tried.append(args)
        raise OSError("no space left on device")

    clock = FetchClock()
    clock.since = 0.0
    dog = Watchdog(
        clock,
        warn_seconds=0.02,
        stop_seconds=0,
        say=say,
        sitting_on=list,
        wanted=lambda: False,
        leave=lambda why: None,
    )
    dog.start()
    for _ in range(500):
        if len(tried) > 1:
            break
        dog._end.wait(0.02)
    assert len(tried) > 1
    assert dog.is_alive()
    dog.stop()
    assert not dog.is_alive()


HANG = """
    import logging, sys, time
    from types import SimpleNamespace
    import torch, lightning.pytorch as pl
    from bat.config.running import Health
    from bat.train.callbacks import Metrics
    from bat.train.health import HealthMonitor
    from bat.train.stopping import Stopping
    from bat.train.trainer import JsonLines
    from pathlib import Path
    out = Path(sys.argv[1])

    class Reads(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            import os, signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (out / "worker").write_text(str(os.getpid()))
            if i == 1:
                open(out / "fifo").read()  # nobody will ever write
            return torch.zeros(1)

    class Fits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.clips = 1

        def training_step(self, batch, batch_idx):
            loss = (batch + self.weight).sum()
            self.figures = {"loss": loss.detach()}
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logging.getLogger("bat").addHandler(logging.FileHandler(out / "train.log"))
    data = SimpleNamespace(sitting_on=lambda: ["worker 0: shard-000003.tar, clip dog-17"])
    metrics = Metrics(every=1, progress=False)
    monitor = HealthMonitor(
        Health(stall_seconds=0.5, stall_stop_seconds=1.2),
        metrics=metrics, stopping=Stopping(), data=data, objective=None,
    )
    pl.Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", logger=[JsonLines(out / "metrics.jsonl")],
        callbacks=[monitor, metrics], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out,
    ).fit(Fits(), torch.utils.data.DataLoader(Reads(), num_workers=1))
"""


def gone(process: int) -> bool:
    """Whether it ended; its parent being gone, nobody may have asked for its exit code yet."""
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{process}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_hangs_in_a_read_ends_with_resume_me_and_takes_its_workers(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANG), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == RESUME_ME, done.stderr
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == [1]
    events = [r for r in rows if "event" in r]
    assert [r["event"] for r in events] == ["stall", "stall"]
    assert events[0]["message"].endswith("worker 0: shard-000003.tar, clip dog-17")
    assert "the same command continues" in (tmp_path / "train.log").read_text()
    assert gone(int((tmp_path / "worker").read_text()))


# --- throughput, memory


def monitor(events: Events, **settings) -> HealthMonitor:
    data = SimpleNamespace(sitting_on=list, on_death=None)
    return HealthMonitor(
        Health(**settings),
        metrics=events,  # type: ignore[arg-type]
        stopping=SimpleNamespace(wanted=False, ask=lambda *a: events.append(("ask", *a))),  # type: ignore[arg-type]
        data=data,  # type: ignore[arg-type]
        objective=None,
    )


def trainer(device: str = "cpu", rank: int = 0) -> pl.Trainer:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(  # type: ignore[return-value]
        is_global_zero=rank == 0, global_rank=rank, strategy=strategy, loggers=[]
    )


def lines(own: HealthMonitor, events: Events, *speeds: float, rank: int = 0) -> None:
    for speed in speeds:
        events.clips_per_second.append(speed)
        own.on_train_batch_start(trainer(rank=rank), None)  # type: ignore[arg-type]


def test_a_drop_in_throughput_is_told_once_and_its_end_too() -> None:
    events = Events()
    own = monitor(events, slowdown=0.5)
    lines(own, events, 100, 90, 110, 100, 100, 51)
    assert not events
    lines(own, events, 49)
    assert events.kinds == ["slow"]
    assert events[0][1] == "only 49 clips a second; the run's median is 100"
    lines(own, events, *[40] * 50)  # what is slow does not become what is usual
    assert events.kinds == ["slow"]
    lines(own, events, 70, 80, 30)
    assert events.kinds == ["slow", "recovered", "slow"]
    assert events[1][1] == "again 70 clips a second; the run's median is 100"


def test_few_lines_no_share_or_another_rank_say_nothing() -> None:
    events = Events()
    lines(monitor(events), events, *[100] * (LINES - 1), 1)
    lines(monitor(events, slowdown=0), events, *[100] * LINES, 1)
    lines(monitor(events), events, *[100] * LINES, 1, rank=1)
    assert not events


def test_gpu_memory_is_the_peak_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    events, reset = Events(), []
    own = monitor(events)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    own._measure(trainer())
    assert set(events.extra) == {"loader_wait"}
    own._measure(trainer("cuda:1"))
    assert events.extra["gpu_memory_gb"] == 3
    assert reset == [torch.device("cuda:1")]


def test_the_share_of_waiting_is_that_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    own, now = monitor(events), SimpleNamespace(perf_counter=lambda: 50.0)
    monkeypatch.setattr(health, "time", now)
    own.clock.total, events.since = 10.0, 0.0
    own._measure(trainer())
    assert events.extra["loader_wait"] == pytest.approx(0.2)
    own.clock.total, events.since = 40.0, 10.0  # 30 more of 40 seconds
    own._measure(trainer())
    assert events.extra["loader_wait"] == pytest.approx(0.75)


# --- whole runs


def health_rows(out: Path) -> list[dict]:
    return [r for r in read_jsonl(out / "metrics.jsonl") if "health/teacher_rank" in r]


def test_a_run_tells_its_ranks_and_ends_with_the_weights_it_would_have_had(
    small, tmp_path: Path
) -> None:
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    words = ["model.drop_path=0.3", "train.accumulate=2"]
    pretrain(small("health.collapse_every=2", *words, out=watched))
    off = ["health.collapse=off", "health.stall_seconds=0", "health.stall_stop_seconds=0"]
    pretrain(small(*off, *words, out=alone))
    left, right = (load_file(p / "export" / "model.safetensors") for p in (watched, alone))
    assert all(torch.equal(left[n], right[n]) for n in left)

    rows = health_rows(watched)
    assert [r["step"] for r in rows] == [1, 2, 4, 6]
    names = {f"health/{who}_{what}" for who in ("teacher", "student") for what in ("rank", "std")}
    assert all(set(r) == {"step"} | names and all(r[n] > 0.2 for n in names) for r in rows)
    assert not health_rows(alone)
    waits = [r["loader_wait"] for r in read_jsonl(watched / "metrics.jsonl") if "loss" in r]
    assert len(waits) == 4
    assert all(0 < w < 1 for w in waits)
    collapsed = [r for r in read_jsonl(watched / "metrics.jsonl") if r.get("event") == "collapse"]
    assert not collapsed  # random weights have not collapsed, nor have they after six steps


def teacher_of(values: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the looks find ``values`` in the teacher, one after the other; the student is well."""
    left = iter(values)
    first = {"rank": 20.0, "std": 1.0}
    calls = [0]

    def found(encoder, spectrogram):
        calls[0] += 1
        assert spectrogram.shape == (5, 1, 208, 128)
        return first if calls[0] % 2 else next(left)  # the student's turn comes first

    monkeypatch.setattr(health, "representation", found)


WELL, LOW = {"rank": 30.0, "std": 0.9}, {"rank": 30.0, "std": 0.01}
FLAT, UNKNOWN = {"rank": 1.2, "std": 0.9}, {"rank": math.nan, "std": math.nan}


def test_a_collapse_is_warned_of_once_until_it_is_over(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_of([WELL, LOW, FLAT, UNKNOWN, LOW, WELL], monkeypatch)
    pretrain(small("health.collapse_every=1", "health.collapse=warn", out=tmp_path / "run"))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    events = [r for r in rows if r.get("event") == "collapse"]
    assert [r["step"] for r in events] == [2, 5]
    assert events[0]["message"] == (
        "step 2: clips look alike to the teacher (student effective rank 20.0, deviation between "
        "clips 1.000, teacher effective rank 30.0, deviation between clips 0.010)"
    )
    assert health_rows(tmp_path / "run")[3]["health/teacher_rank"] is None


def test_a_collapse_that_stays_ends_the_run_where_asked(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_of([WELL, FLAT, WELL, LOW, LOW, WELL], monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 5: clips look alike.*lower optim\.lr"):
        pretrain(small("health.collapse_every=1", "health.collapse=stop", out=out))
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == [
        "step-00000002.ckpt",
        "step-00000004.ckpt",
    ]
    assert not (out / "export").exists()


def test_what_the_last_look_found_is_in_the_checkpoint() -> None:
    before, after = monitor(Events()), monitor(Events())
    before._low = 1
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after._low == 1
