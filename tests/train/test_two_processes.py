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


@pytest.mark.slow
def test_two_processes__signal_to_the_first_ends_both_and_the_same_command_continues(
    tmp_path: Path,
) -> None:
    """Started by Lightning's launcher: the first process starts the other."""
    make_toy(tmp_path / "shards" / "toy")
    words = "recipe=toy model.width=48 model.depth=1 model.heads=2 objective.decoder_depth=1 "
    words += "objective.mask.views=2 train.log_every=1 online.every=0 train.steps=24 "
    words += "log.progress=false data.batch=2 hardware.devices=2 hardware.strategy=ddp "
    command = [sys.executable, "-m", "bat.cli.pretrain", *words.split()]
    command += [f"data.cache={tmp_path / 'shards'}", f"out={tmp_path / 'run'}"]

    def start() -> subprocess.Popen:
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root)

    process = start()
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("loss_local") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said[-2000:]
    assert said.count("ended by SIGTERM after step") == 1
    assert "4 clips a step: 2 a micro-batch x 1 accumulated x 2 device(s)" in said
    (saved,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))[-1:]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert int(saved.stem[5:]) == max(r["step"] for r in rows) < 24
    process = start()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-2000:]
    assert said.count("continuing from") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [*range(1, 25)]
