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
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from bat.config.running import Health
from bat.errors import RESUME_ME, UserError
from bat.io import read_jsonl
from bat.train import health
from bat.train.callbacks import Metrics
from bat.train.cost import Cost, clip_flop
from bat.train.health import LINES, FetchClock, HealthMonitor, Watchdog
from bat.train.run_pretrain import pretrain
from tests.train.runs import weights


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


class Fits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.clips = 1

    def training_step(self, batch, batch_idx):
        loss = (batch + self.weight).sum()
        self.scalars = {"loss": loss.detach()}
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_fetch_clock__only_waiting_for_the_loader_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, clock = [1000.0], FetchClock()
    monkeypatch.setattr(health, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> torch.Tensor:
            now[0] += 10
            return torch.zeros(1)

    class Busy(Callback):
        """Probing, saving: hundreds of seconds, none of them the loader's."""

        def on_train_start(self, trainer, pl_module):
            trainer.profiler = clock

        def on_train_batch_start(self, *args):
            assert clock.since is None
            now[0] += 300

        def on_train_batch_end(self, *args):
            assert clock.since is None
            now[0] += 700

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
    trainer.fit(Fits(), torch.utils.data.DataLoader(Slow()))
    assert clock.total == 2 * 4 * 10
    assert clock.since is None


class Watched:
    """A watchdog that is asked every second from ``start`` to ``end``."""

    def __init__(self, warn: float = 10, stop: float = 25) -> None:
        self.clock, self.said, self.left = FetchClock(), Events(), []
        self.dog = Watchdog(
            self.clock,
            Health(stall_seconds=warn, stall_stop_seconds=stop),
            say=self.said.event,
            sitting_on=lambda: ["worker 1: shard-000003.tar, clip dog-17, for 9 s"],
            leave=self.left.append,
        )

    def watch(self, start: float, end: float) -> float:
        at = start
        while at < end and not self.left:
            at += 1.0
            self.dog.check(at)
        return at


def test_watchdog__stall_is_named_again_and_again_then_the_process_leaves() -> None:
    run = Watched()
    assert run.dog.tick == 1.0
    run.clock.since = 0.0
    assert run.watch(0, 9) == 9
    assert not run.said
    assert run.watch(9, 100) == 25
    assert run.said.kinds == ["stall", "stall"]
    assert run.said[0][1] == "no batch for 10 s: worker 1: shard-000003.tar, clip dog-17, for 9 s"
    assert [facts["seconds"] for _, _, facts in run.said] == [10, 20]
    assert run.left == ["no batch for 25 s (health.stall_stop_seconds=25)"]


def test_watchdog__work_between_batches_is_no_stall_and_waits_do_not_add_up() -> None:
    run = Watched()
    run.watch(0, 1000)  # nobody waits: a long probing
    for i in range(30):  # nine seconds for each batch
        run.clock.since = 1000.0 + 10 * i
        run.watch(run.clock.since, run.clock.since + 9)
        run.clock.since = None
        run.watch(1009.0 + 10 * i, 1010.0 + 10 * i)
    assert not run.said
    assert not run.left


@pytest.mark.parametrize(("warn", "stop", "stalls"), [(10, 0, 10), (0, 25, 0)])
def test_watchdog__zero_is_never(warn: float, stop: float, stalls: int) -> None:
    run = Watched(warn, stop)
    run.clock.since = 0.0
    run.watch(0, 100)
    assert run.said.kinds == ["stall"] * stalls
    assert bool(run.left) == bool(stop)


HANG = """
    import logging, os, signal, sys
    from pathlib import Path
    from types import SimpleNamespace
    import torch, lightning.pytorch as pl
    from bat.config.running import Health
    from bat.train.callbacks import Metrics
    from bat.train.health import HealthMonitor
    from bat.train.stopping import Stopping
    from bat.train.trainer import JsonLines
    from tests.train.test_health import Fits
    out = Path(sys.argv[1])

    class Reads(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (out / "worker").write_text(str(os.getpid()))
            if i == 1:
                open(out / "fifo").read()  # nobody will ever write
            return torch.zeros(1)

    logging.getLogger("bat").addHandler(logging.FileHandler(out / "train.log"))
    data = SimpleNamespace(sitting_on=lambda: ["worker 0: shard-000003.tar, clip dog-17"])
    metrics = Metrics(every=1, progress=False)
    say, tried = metrics.event, []

    def event(*args, **facts):
        tried.append(args)
        if len(tried) == 1:
            raise OSError("no space left on device")
        say(*args, **facts)

    metrics.event = event
    monitor = HealthMonitor(
        Health(stall_seconds=0.5, stall_stop_seconds=1.7),
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


def test_watchdog__hanging_process_ends_with_resume_me_and_takes_its_workers(
    tmp_path: Path,
) -> None:
    """The first warning meets a full disk: the watch continues."""
    os.mkfifo(tmp_path / "fifo")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANG), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
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


def lines(own: HealthMonitor, events: Events, *speeds: float, rank: int = 0) -> None:
    for speed in speeds:
        events.clips_per_second.append(speed)
        own.on_train_batch_start(SimpleNamespace(is_global_zero=rank == 0), None)  # type: ignore[arg-type]


def test_throughput__drop_is_told_once_and_its_end_too() -> None:
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


def test_throughput__few_lines_no_limit_or_another_rank_say_nothing() -> None:
    events = Events()
    lines(monitor(events), events, *[100] * (LINES - 1), 1)
    lines(monitor(events, slowdown=0), events, *[100] * LINES, 1)
    lines(monitor(events), events, *[100] * LINES, 1, rank=1)
    assert not events


def trainer_on(device: str) -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, is_global_zero=True, world_size=2)


def test_metrics__waiting_and_gpu_memory_are_those_of_the_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, reset = Events(), []
    own = monitor(events)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(health, "time", SimpleNamespace(perf_counter=lambda: 50.0))
    own.clock.total, events.since = 10.0, 0.0
    own._measure(trainer_on("cpu"), 1)
    assert events.extra == {"loader_wait": pytest.approx(0.2)}
    own.clock.total, events.since = 40.0, 10.0  # 30 more of 40 seconds
    own._measure(trainer_on("cuda:1"), 2)
    assert events.extra == {"loader_wait": pytest.approx(0.75), "gpu_memory_gb": 3}
    assert reset == [torch.device("cuda:1")]


# --- whole runs


def health_rows(out: Path) -> list[dict]:
    return [r for r in read_jsonl(out / "metrics.jsonl") if "health/teacher_rank" in r]


def test_health__watched_run_ends_with_the_weights_it_would_have_had(small, tmp_path: Path) -> None:
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    words = ["model.drop_path=0.3", "train.accumulate=2"]
    pretrain(small("health.collapse_every=2", *words, out=watched))
    off = ["health.collapse=off", "health.stall_seconds=0", "health.stall_stop_seconds=0"]
    pretrain(small(*off, *words, out=alone))
    left, right = weights(watched), weights(alone)
    assert all(torch.equal(left[n], right[n]) for n in left)

    rows = health_rows(watched)
    assert [r["step"] for r in rows] == [1, 2, 4, 6]
    names = {f"health/{who}_{what}" for who in ("teacher", "student") for what in ("rank", "std")}
    assert all(set(r) == {"step"} | names and all(r[n] > 0.2 for n in names) for r in rows)
    assert not health_rows(alone)
    every = read_jsonl(watched / "metrics.jsonl")
    waits = [r["loader_wait"] for r in every if "loss" in r]
    assert len(waits) == 4
    assert all(0 < w < 1 for w in waits)
    assert not [r for r in every if "event" in r]


WELL, LOW = {"rank": 30.0, "std": 0.9}, {"rank": 30.0, "std": 0.01}
FLAT, UNKNOWN = {"rank": 1.2, "std": 0.9}, {"rank": math.nan, "std": math.nan}


def teacher_of(values: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the checks find ``values`` in the teacher, one after the other; the student is well."""
    left, calls = iter(values), [0]

    def found(encoder, spectrogram):
        calls[0] += 1
        assert spectrogram.shape == (5, 1, 208, 128)
        return {"rank": 20.0, "std": 1.0} if calls[0] % 2 else next(left)  # the student is first

    monkeypatch.setattr(health, "representation", found)


def test_collapse__is_warned_of_once_until_it_is_over(
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


def test_collapse__that_stays_ends_the_run_where_asked(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_of([WELL, FLAT, WELL, LOW, LOW, WELL], monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 5: clips look alike.*lower optim\.lr"):
        pretrain(small("health.collapse_every=1", "health.collapse=stop", out=out))
    saved = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert not (out / "export").exists()
    states = torch.load(out / "checkpoints" / saved[-1], weights_only=True)["callbacks"]
    assert json.dumps(states["HealthMonitor"]) == '{"low": 1}'  # a resumed run counts on


def test_cost__hours_and_mfu_only_where_the_peak_is_known(small, tmp_path: Path) -> None:
    config = small("hardware.precision=bf16-mixed", "train.steps=40", out=tmp_path)
    flop = clip_flop(config)
    assert clip_flop(small("objective.mask.views=4", out=tmp_path)) > 1.3 * flop > 0
    state = torch.get_rng_state()
    cost = Cost(config, seconds=lambda: 1800.0)
    row = cost.row("NVIDIA A100-SXM4-80GB", devices=4, step=10, clips_per_second=100.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (row["gpu_hours"], row["gpu_hours_left"]) == (2.0, 6.0)
    assert row["mfu"] == pytest.approx(flop * 100 / (4 * 312e12))
    assert "mfu" not in cost.row("Quadro P400", devices=1, step=10, clips_per_second=1.0)
    whole = Cost(small("hardware.precision=32-true", out=tmp_path), seconds=lambda: 1.0)
    assert "mfu" not in whole.row("NVIDIA A100", devices=1, step=1, clips_per_second=1.0)


def test_metrics__bar_shows_memory_mfu_and_hours_of_gpus() -> None:
    said: list[str] = []
    metrics = Metrics(every=1, progress=True)
    metrics.bar = SimpleNamespace(update=id, set_postfix_str=said.append)  # type: ignore[assignment]
    group = SimpleNamespace(param_groups=[{"lr": 1.0}])
    trainer = SimpleNamespace(max_steps=9, optimizers=[group], loggers=[], is_global_zero=False)
    hours = {"gpu_hours": 2.0, "gpu_hours_left": 6.0}
    for extra in ({}, {"gpu_memory_gb": 21.23, "mfu": 0.414, **hours}):
        metrics.names, metrics.sums = ["loss"], torch.tensor([[2.0], [1.0]])
        metrics.extra = extra
        metrics.after_step(trainer, None, 5)  # type: ignore[arg-type]
    assert said[0].startswith("loss=2.000, clips=")
    assert "GPU" not in said[0]
    assert said[1].endswith("/s, 21.2 GiB, MFU=41%, GPU-hours=2.0+6.0")
