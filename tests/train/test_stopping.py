"""Ends that can be resumed: signals, requests from anywhere, errors of another thread."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from bat.audio.encode import encode
from bat.cli import args, shard
from bat.data.index import open_index
from bat.errors import Interrupted, UserError
from bat.eval import fit as probing
from bat.io import read_jsonl
from bat.shutdown import listening, minding_signals
from bat.train import checkpointing, run_pretrain
from bat.train.checkpointing import checkpoints
from bat.train.processes import LAUNCHER, Ranks, leave_quietly
from bat.train.run_pretrain import pretrain
from bat.train.stopping import Stopping
from tests.train.runs import assert_same_run, at_batch


def signalled(name: str):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_pretrain__signal_finishes_the_step_saves_and_the_same_command_continues(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number, out = getattr(signal, name), tmp_path / "run"
    before = signal.getsignal(number)
    # within the first half of step 3: both halves are done before it ends
    config = small("train.accumulate=2", "data.batch=2", "train.save_every=100", out=out)
    with monkeypatch.context() as patch:
        at_batch(patch, 4, signalled(name))
        with pytest.raises(Interrupted, match=f"^{name} after step 3$"):
            pretrain(config)
    assert signal.getsignal(number) is before
    assert [p.name for p in checkpoints(out)] == ["step-00000003.ckpt"]
    assert not (out / "export").exists()
    assert not (out / ".lock").exists()
    if name == "SIGTERM":
        pretrain(config)
        pretrain(small("train.accumulate=2", "data.batch=2", out=tmp_path / "whole"))
        assert_same_run(out, tmp_path / "whole")  # the line of step 4 spans the end after step 3


def test_pretrain__killed_loader_worker_is_saved_and_resumes_bit_for_bit(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(active_children())

    def kill_worker() -> None:
        (worker,) = set(active_children()) - others
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    out, whole = tmp_path / "run", tmp_path / "whole"
    words = ["train.accumulate=2", "data.batch=2", "data.workers=1", "train.steps=9"]
    words += ["train.save_every=100", "model.drop_path=0.3"]
    with monkeypatch.context() as patch:
        at_batch(patch, 2, kill_worker)
        with pytest.raises(Interrupted, match="worker 0 was killed by SIGKILL"):
            pretrain(small(*words, out=out))
    rows = read_jsonl(out / "metrics.jsonl")
    assert [r["event"] for r in rows if "event" in r] == ["worker"]
    (saved,) = checkpoints(out)
    pretrain(small(*words, out=out))
    pretrain(small(*words, out=whole))
    assert_same_run(out, whole, events=False)
    assert 2 <= checkpointing.step_of(saved) < 9


def test_pretrain__second_ctrl_c_ends_at_once(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signalled("SIGINT")()
        signalled("SIGINT")()

    before = signal.getsignal(signal.SIGINT)
    at_batch(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small(out=tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000002.ckpt"]


def at_probe_step(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """SIGTERM within the ``at``-th step of the probes; the steps done."""
    original, calls = probing.warmup_cosine, []

    def warmup_cosine(step, **k):
        if calls[-1:] != [step]:  # once a step
            calls.append(step)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(step, **k)

    monkeypatch.setattr(probing, "warmup_cosine", warmup_cosine)
    return calls


def accuracies(out: Path) -> list[tuple[int, float]]:
    rows = read_jsonl(out / "metrics.jsonl")
    return [(r["step"], r["online/cgp/accuracy"]) for r in rows if "online/cgp/accuracy" in r]


def test_online__signal_within_a_probe_run_cuts_it_off_and_it_is_repeated(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["online.every=3", "online.steps=4", "train.save_every=100"]
    run = small(*words, out=tmp_path / "parts")
    with monkeypatch.context() as patch:
        at_probe_step(patch, at=3)
        with pytest.raises(Interrupted, match="SIGTERM before the first step"):
            pretrain(run)
    assert not checkpoints(tmp_path / "parts")
    with monkeypatch.context() as patch:
        calls = at_probe_step(patch, at=2 * 4 + 6)  # the second fold of the run at step 3
        with pytest.raises(Interrupted, match="SIGTERM after step 3"):
            pretrain(run)
        assert len(calls) == 2 * 4 + 6
    with monkeypatch.context() as patch:
        at_probe_step(patch, at=2 * 4 + 3)  # after the last step: not cut off
        pretrain(run)
    pretrain(small(*words, out=tmp_path / "whole"))
    assert [step for step, _ in accuracies(tmp_path / "whole")] == [0, 3, 6]
    assert accuracies(tmp_path / "parts") == accuracies(tmp_path / "whole")
    assert (tmp_path / "parts" / "export").is_dir()


def test_pretrain__signal_while_exporting_says_resume_me_too(small, tmp_path: Path) -> None:
    config = small("train.steps=2", out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_pretrain, "export", lambda *a, **k: signalled("SIGUSR1")())
        with pytest.raises(Interrupted, match="SIGUSR1, with nothing to save"), minding_signals():
            pretrain(config)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    pretrain(config)
    assert (tmp_path / "run" / "export").is_dir()


def test_checkpoints__are_also_saved_by_the_clock(small, tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    original = Stopping.on_train_batch_end

    def batch_end(self, *args):
        now[0] += 25.0
        original(self, *args)

    monkeypatch.setattr(Stopping, "on_train_batch_end", batch_end)
    words = ["train.save_every=100", "train.save_minutes=1", "train.steps=10", "train.keep=9"]
    pretrain(small(*words, out=tmp_path / "run"))
    assert [checkpointing.step_of(p) for p in checkpoints(tmp_path / "run")] == [10, 9, 6, 3]


def test_stopping__error_of_another_thread_ends_the_run_and_saves_nothing(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Stopping] = []
    original = Stopping.setup

    def setup(self, *args, **keywords):
        asked.append(self)
        original(self, *args, **keywords)

    def fail() -> None:
        asked[0].ask("one")
        asked[0].ask("a test", UserError("the disk is on fire"))
        asked[0].ask("another", UserError("and the first counts"))

    monkeypatch.setattr(Stopping, "setup", setup)
    at_batch(monkeypatch, 2, fail)
    with pytest.raises(UserError, match="the disk is on fire"):
        pretrain(small("train.save_every=100", out=tmp_path / "run"))
    assert not checkpoints(tmp_path / "run")


def test_ranks__one_process_agrees_with_itself_and_a_child_leaves_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    assert ranks.maximum([3, 1]) == [3, 1]
    assert ranks.total([0.5]) == [0.5]
    assert ranks.gather("x") == ["x"]
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))  # the launcher itself
    leave_quietly()
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    with pytest.raises(SystemExit) as left:
        leave_quietly()
    assert left.value.code == 0


def test_command__exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def code(error: BaseException) -> int:
        with args.Command(args.parser("x", "about", ""), []) as call:
            raise error
        return call.code

    assert code(Interrupted("SIGTERM after step 3")) == 75
    assert "the same command continues" in capsys.readouterr().err
    assert code(UserError("see https://me:secret@host/x")) == 2
    assert "secret" not in capsys.readouterr().err
    assert code(KeyboardInterrupt()) == 130
    assert code(OSError(errno.ENOSPC, "No space left")) == 2
    assert "the disk is full" in capsys.readouterr().err
    with pytest.raises(OSError, match="not ours"):
        code(OSError(errno.EIO, "not ours"))


@pytest.mark.parametrize(
    ("command", "words", "during"),
    [
        ("pretrain", ["recipe=toy"], "bat.eval.run_folder.index_files"),
        ("probe", ["recipe=toy", "checkpoint=random"], "bat.eval.run_folder.index_files"),
        ("finetune", ["recipe=toy", "checkpoint=random"], "bat.eval.run_folder.make_toy"),
        ("shard", ["in", "out"], "bat.shard.rows.open_rows"),
        ("shard", ["verify", "in"], "bat.shard.verify.verify"),
    ],
)
def test_command__sigterm_before_training_says_resume_me(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str], during: str
) -> None:
    main = importlib.import_module(f"bat.cli.{command}").main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(during, lambda *a, **k: signalled("SIGTERM")() or time.sleep(60))
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.glob("runs/*-toy*"))


def test_listening__ctrl_c_after_sigterm_is_the_first_one() -> None:
    heard: list[str] = []
    with listening(heard.append):
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signalled(name)()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert heard == ["SIGTERM", "SIGINT", "SIGUSR1"]


def test_shard__sigterm_to_it_and_its_processes_says_resume_me(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(200):
        wave = np.random.default_rng(i).uniform(-0.4, 0.4, 8_000)
        (tmp_path / "in" / f"{i}.wav").write_bytes(encode(wave, sample_rate=8_000, codec="wav"))
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--codec", "flac", "--jobs", "2"]
    command = [sys.executable, "-m", "bat.cli.shard", *words]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and process.poll() is None:  # its processes start now
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "the same command continues" in said
    assert shard.main(words) == 0
    assert len(open_index(tmp_path / "out")) == 200
