"""``gpu_learn.py`` on the CPU: batches made on the device, accuracies, a run of seconds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from bat import load_encoder
from bat.eval.splits import Split

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TINY = [
    *("model.width=48", "model.depth=2", "model.heads=4", "objective.decoder_depth=1"),
    *("objective.decoder_width=48", "objective.mask.views=2", "objective.mask.ratio=0.5"),
    *("data.batch=6", "frontend.frames=48", "data.clip_seconds=0.4"),
]


@pytest.fixture
def gpu_learn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("gpu_learn")
    monkeypatch.setattr(module, "WARM_UP", 1)
    monkeypatch.setattr(module, "TIMED", 1)
    monkeypatch.setitem(module.SETS, "fsdd", ["recipe=esc10", "data.csv={}/labels.csv"])
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A set like FSDD: 24 tones of two pitches in three folds, 0.2 to 0.4 s at 8 kHz."""
    folder = tmp_path / "data" / "fsdd"
    folder.mkdir(parents=True)
    lines, rng = ["path,label,fold"], np.random.default_rng(0)
    for i in range(24):
        time = np.arange(1600 + 60 * i) / 8000
        wave = np.sin(2 * np.pi * (300, 1500)[i % 2] * time) + 0.1 * rng.normal(size=len(time))
        soundfile.write(folder / f"{i}.wav", 0.2 * wave, 8000)
        lines.append(f"{i}.wav,{'ab'[i % 2]},{1 + i % 3}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder.parent


def test_rolled__each_wave_within_its_length(gpu_learn: ModuleType) -> None:
    waves = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    rolled = gpu_learn.rolled(waves, torch.tensor([5, 3]), torch.tensor([2, 1]))
    assert rolled.tolist() == [[4, 5, 1, 2, 3], [3, 1, 2, 0, 0]]


def test_accuracies__are_of_held_out_clips(gpu_learn: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    ids = np.arange(120)
    splits = [Split(str(k), ids[ids % 4 != k], ids[ids % 4 == k]) for k in range(4)]
    noise = torch.randn(120, 8, generator=g)
    told = noise + 8 * torch.eye(8)[labels]
    row = gpu_learn.accuracies(told, labels, splits, 3)
    assert row["knn"] == row["linear"] == 1.0
    assert row["knn_std"] == 0.0
    row = gpu_learn.accuracies(noise, labels, splits, 3)
    assert max(row["knn"], row["linear"]) < 0.5  # 1/3 by chance; of the training clips it is more


def test_learn__writes_curve_picture_and_encoders(
    gpu_learn: ModuleType, data: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    words = [f"--data={data}", f"--out={out}", "--sets=fsdd,esc10", "--seeds=1"]
    words += ["--every=0.01", "--minutes=30", *TINY, "train.steps=3", "fsdd:optim.warmup_steps=1"]
    assert gpu_learn.main(words) == 1
    report = json.loads((out / "learn.json").read_text())
    (run,) = report["runs"]
    assert not report["complete"]
    assert "esc10" in report["failed"]["esc10, seed 0"]  # is not there, and costs only itself
    assert run["complete"]
    assert run["clips"] == 24
    assert run["chance"] == 0.5
    rows = run["evaluations"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("knn", "linear"))
    assert all(row["loss"] > 0 for row in rows[1:])
    assert not any(str(tmp_path) in word for word in run["words"])
    assert (out / "learn-fsdd.png").is_file()
    encoder = load_encoder(out / "fsdd-0")
    assert (encoder.width, encoder.depth) == (48, 2)
    assert "fsdd, seed 0, step 3: knn" in capsys.readouterr().out


def test_learner__starts_again_where_it_started(
    gpu_learn: ModuleType, data: Path, tmp_path: Path
) -> None:
    args = gpu_learn.argparse.Namespace(
        data=data, out=tmp_path, words=TINY, minutes=1.0, every=1.0, seeds=1, sets=["fsdd"]
    )
    study = gpu_learn.Study(args, torch.device("cpu"))
    config = gpu_learn.compose(gpu_learn.Pretrain, "pretrain", study.words("fsdd", 0))
    bank = gpu_learn.Bank(config, torch.device("cpu"))
    learner = gpu_learn.Learner(config, bank, torch.device("cpu"))

    def two_steps() -> float:
        for step in range(2):
            learner.step(step)
        return learner.means()["loss"]

    ema = config.objective.ema.steps / config.train.steps
    gpu_learn.stretch(config, 1000)
    assert config.objective.ema.steps == round(1000 * ema)
    assert learner.module.objective.ema.steps == config.objective.ema.steps
    first = two_steps()
    assert two_steps() != first
    learner.restart()
    assert two_steps() == pytest.approx(first, rel=1e-6)
