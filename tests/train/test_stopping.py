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
import torch
from safetensors.torch import load_file

from bat.audio.encode import encode
from bat.cli import args, shard
from bat.config.schema import Pretrain
from bat.data.index import open_index
from bat.errors import Interrupted, UserError
from bat.io import read_jsonl
from bat.shutdown import listening, minding_signals
from bat.train.checkpointing import checkpoints
from bat.train.pretrain import Pretraining
from bat.train.run_pretrain import pretrain
from bat.train.stopping import Stopping


def at_batch(monkeypatch: pytest.MonkeyPatch, at: int, do) -> pytest.MonkeyPatch:
    """Run ``do()`` within the training step of micro-batch ``at``."""
    original = Pretraining.training_step

    def step(self, batch, batch_idx):
        if batch_idx == at:
            do()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", step)
    return monkeypatch


def end_and_resume(config: Pretrain, do, at: int) -> Interrupted:
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, at, do)
        with pytest.raises(Interrupted) as caught:
            pretrain(config)
    return caught.value


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(
    small, tmp_path: Path, name: str
) -> None:
    number, out = getattr(signal, name), tmp_path / "run"
    before = signal.getsignal(number)
    # within the first half of step 3: both halves are done before it ends
    config = small("train.accumulate=2", "data.batch=2", "train.save_every=100", out=out)
    why = end_and_resume(config, lambda: os.kill(os.getpid(), number), at=4)
    assert str(why) == f"{name} after step 3"
    assert signal.getsignal(number) is before
    assert [p.name for p in checkpoints(out)] == ["step-00000003.ckpt"]
    assert not (out / "export").exists()
    assert not (out / ".lock").exists()
    pretrain(config)
    if name == "SIGTERM":
        whole = tmp_path / "whole"
        pretrain(small("train.accumulate=2", "data.batch=2", out=whole))
        ours, theirs = (load_file(o / "export/model.safetensors") for o in (out, whole))
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
        lines = [
            [
                (r["step"], r["loss"], r["grad_norm"])
                for r in read_jsonl(o / "metrics.jsonl")
                if "loss" in r
            ]
            for o in (out, whole)
        ]
        assert lines[0] == lines[1]  # that of step 4 spans the end after step 3
    assert [r["step"] for r in read_jsonl(out / "metrics.jsonl") if "loss" in r] == [1, 2, 4, 6]


def kill_worker() -> None:
    (worker,) = active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pretrain__killed_loader_worker_is_saved_and_resumes_bit_for_bit(
    small, tmp_path: Path, accumulate: int
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    words = [f"train.accumulate={accumulate}", "data.batch=2", "data.workers=1", "train.steps=9"]
    words += ["train.save_every=100", "model.drop_path=0.3"]
    why = end_and_resume(small(*words, out=out), kill_worker, at=2)
    assert "worker 0 was killed by SIGKILL" in str(why)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [r["event"] for r in rows if "event" in r] == ["worker"]
    (saved,) = checkpoints(out)
    pretrain(small(*words, out=out))
    pretrain(small(*words, out=whole))
    ours, theirs = (load_file(o / "export/model.safetensors") for o in (out, whole))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    rows, others = (
        [(r["step"], r["loss"]) for r in read_jsonl(o / "metrics.jsonl") if "loss" in r]
        for o in (out, whole)
    )
    assert rows == others
    assert 2 <= int(saved.stem.rpartition("-")[2]) < 9


def test_a_second_ctrl_c_ends_at_once(small, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 3, twice)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small(out=tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000002.ckpt"]


def test_a_signal_within_a_probing_cuts_it_off_and_it_is_made_up_for(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["online.every=2", "online.steps=4", "train.save_every=100"]
    from bat.eval import fit as probing

    original, calls = probing.warmup_cosine, []

    def warmup_cosine(step, **k):
        if calls[-1:] != [step]:  # once a step
            calls.append(step)
            if len(calls) == 2 * 4 + 6:  # the second fold of the probing at step 2
                os.kill(os.getpid(), signal.SIGTERM)
        return original(step, **k)

    with monkeypatch.context() as patch:
        patch.setattr(probing, "warmup_cosine", warmup_cosine)
        with pytest.raises(Interrupted, match="SIGTERM after step 2"):
            pretrain(small(*words, out=tmp_path / "parts"))
    assert len(calls) == 2 * 4 + 6
    pretrain(small(*words, out=tmp_path / "parts"))
    pretrain(small(*words, out=tmp_path / "whole"))
    ours, theirs = (
        [r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "online/cgp/accuracy" in r]
        for name in ("parts", "whole")
    )
    assert [r["step"] for r in theirs] == [0, 2, 4, 6]
    assert ours == theirs


def test_a_time_is_a_reason_to_save(small, tmp_path: Path, monkeypatch) -> None:
    from bat.train import checkpointing

    now = [0.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    original = Pretraining.training_step

    def step(self, batch, batch_idx):
        now[0] += 25.0
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", step)
    words = ["train.save_every=100", "train.save_minutes=1", "train.steps=10", "train.keep=9"]
    pretrain(small(*words, out=tmp_path / "run"))
    names = [p.name for p in checkpoints(tmp_path / "run")]
    assert names == [f"step-{n:08d}.ckpt" for n in (10, 9, 6, 3)]


def test_an_error_of_another_thread_ends_the_run_and_saves_nothing(small, tmp_path: Path) -> None:
    asked: list[Stopping] = []
    original = Stopping.setup

    def setup(self, *args, **keywords):
        asked.append(self)
        original(self, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopping, "setup", setup)
        at_batch(patch, 2, lambda: asked[0].ask("a test", UserError("the disk is on fire")))
        with pytest.raises(UserError, match="the disk is on fire"):
            pretrain(small("train.save_every=100", out=tmp_path / "run"))
    assert not checkpoints(tmp_path / "run")


def test_errors_outweigh_requests_and_the_first_of_each_counts() -> None:
    stopping = Stopping()
    assert not stopping.wanted
    stopping.ask("one")
    stopping.ask("two")
    assert stopping._why == "one"
    error = UserError("no")
    stopping.ask("three", error)
    stopping.ask("four", UserError("other"))
    assert stopping._error is error


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
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


def probing_signal(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM within the ``at``-th step of the probes."""
    from bat.eval import fit as probing

    original, calls = probing.warmup_cosine, []

    def warmup_cosine(step, **k):
        if calls[-1:] != [step]:  # once a step
            calls.append(step)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(step, **k)

    monkeypatch.setattr(probing, "warmup_cosine", warmup_cosine)


def accuracies(out: Path) -> list[tuple[int, float]]:
    rows = read_jsonl(out / "metrics.jsonl")
    return [(r["step"], r["online/cgp/accuracy"]) for r in rows if "online/cgp/accuracy" in r]


def test_a_signal_before_the_first_step_ends_the_run_with_nothing_to_save(
    small, tmp_path: Path
) -> None:
    config = small("online.every=3", "online.steps=4", out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        probing_signal(patch, at=3)
        with pytest.raises(Interrupted, match="SIGTERM before the first step"):
            pretrain(config)
    assert not checkpoints(tmp_path / "run")
    pretrain(config)
    assert [step for step, _ in accuracies(tmp_path / "run")] == [0, 3, 6]


def test_the_probing_after_the_last_step_is_not_cut_off(small, tmp_path: Path) -> None:
    config = small("online.every=6", "online.steps=4", out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        probing_signal(patch, at=2 * 4 + 3)
        pretrain(config)
    assert [step for step, _ in accuracies(tmp_path / "run")] == [0, 6]
    assert (tmp_path / "run" / "export").is_dir()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_exporting_says_resume_me_too(small, tmp_path: Path, name: str) -> None:
    from bat.train import run_pretrain

    config = small("train.steps=2", out=tmp_path / "run")

    def export(*args, **keywords):
        os.kill(os.getpid(), getattr(signal, name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_pretrain, "export", export)
        with (
            pytest.raises(Interrupted, match=f"{name}, with nothing to save"),
            minding_signals(),
        ):
            pretrain(config)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    pretrain(config)
    assert (tmp_path / "run" / "export").is_dir()


def kill_here(*args, **keywords):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize(
    ("command", "words", "during"),
    [
        ("pretrain", ["recipe=toy"], "bat.eval.run_folder.index_files"),
        ("pretrain", ["recipe=toy"], "bat.eval.run_folder.make_toy"),
        ("probe", ["recipe=toy", "checkpoint=random"], "bat.eval.run_folder.index_files"),
        ("finetune", ["recipe=toy", "checkpoint=random"], "bat.eval.run_folder.make_toy"),
        ("shard", ["in", "out"], "bat.shard.rows.open_rows"),
        ("shard", ["verify", "in"], "bat.shard.verify.verify"),
    ],
)
def test_sigterm_before_training_says_resume_me(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str], during: str
) -> None:
    main = importlib.import_module(f"bat.cli.{command}").main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(during, kill_here)
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.glob("runs/*-toy*"))


def test_a_ctrl_c_after_sigterm_is_the_first_one() -> None:
    heard: list[str] = []
    with listening(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert heard == ["SIGTERM", "SIGINT", "SIGUSR1"]


def test_sigterm_to_a_packing_and_its_processes_says_resume_me(tmp_path: Path) -> None:
    for i in range(200):
        wave = np.random.default_rng(i).uniform(-0.4, 0.4, 8_000)
        (tmp_path / "in").mkdir(exist_ok=True)
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
