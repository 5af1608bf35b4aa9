"""Two gloo processes on the CPU share one run: one export, one log, one line a step."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bat.data.toy import make_toy

TINY = [
    "recipe=toy",
    "model.width=48",
    "model.depth=1",
    "model.heads=2",
    "objective.decoder_depth=1",
    "objective.mask.views=2",
    "train.steps=2",
    "train.log_every=1",
    "online.every=2",
    "online.steps=1",
    "log.progress=false",
]


@pytest.mark.slow
def test_two_ranks_leave_one_run(tmp_path: Path) -> None:
    make_toy(tmp_path / "shards" / "toy")
    words = [*TINY, f"data.cache={tmp_path / 'shards'}", f"out={tmp_path / 'run'}", "data.batch=2"]
    words += ["hardware.devices=2", "hardware.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "bat.cli.pretrain", *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert "4 clips a step: 2 a micro-batch x 1 accumulated x 2 device(s)" in done.stderr
    assert done.stderr.count("done. Where everything is:") + done.stdout.count("done. Where") == 1
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2]
    assert [r["step"] for r in rows if "online/cgp/accuracy" in r] == [0, 2]


@pytest.mark.slow
def test_a_signal_to_the_first_of_two_ends_both_and_is_told_once(tmp_path: Path) -> None:
    make_toy(tmp_path / "shards" / "toy")
    words = dict(w.split("=") for w in TINY) | {"train.steps": "5000", "online.every": "0"}
    words |= {"data.cache": str(tmp_path / "shards"), "out": str(tmp_path / "run")}
    words |= {"hardware.devices": "2", "hardware.strategy": "ddp", "data.batch": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bat.cli.pretrain", *(f"{k}={v}" for k, v in words.items())],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("loss_local") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said[-2000:]
    assert said.count("ended by SIGTERM after step") == 1
    (saved,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))[-1:]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert int(saved.stem[5:]) == max(r["step"] for r in rows)
