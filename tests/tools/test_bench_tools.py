"""What the benchmark's parts stand on: memory, timing, FLOP counts; and the parts at tiny sizes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Pretrain

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Path:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return TOOLS


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def test_peak_is_the_worst_moment_above_what_was_there(tools: Path) -> None:
    peak_mb = load("memory").peak_mb
    there = torch.ones(1_000_000)

    def call() -> torch.Tensor:
        a = torch.empty(250_000)  # 1 MB
        b = torch.empty(500_000)  # 3 MB
        del a  # 2 MB
        c = torch.empty(125_000)  # 2.5 MB
        del b
        return c

    assert peak_mb(call, "cpu") == 3.0
    assert peak_mb(lambda: there.mul_(2), "cpu") < 0.01
    assert peak_mb(lambda: there * 2, "cpu") == pytest.approx(4.0, abs=0.01)


def test_peak_sees_the_backward_pass(tools: Path) -> None:
    x = torch.ones(250_000, requires_grad=True)  # 1 MB
    # sin keeps its input, which is its own here: y lives until the backward pass has used it
    peak = load("memory").peak_mb(lambda: (x * 2).sin().sum().backward(), "cpu")
    assert 3.0 <= peak < 4.1  # y, the gradient through the sum's expansion and sin, x.grad


def test_medians_take_turns_after_a_warm_up(tools: Path) -> None:
    calls: list[str] = []
    ways = {name: (lambda n=name: calls.append(n)) for name in "ab"}
    taken = load("timing").medians(ways, repeats=2, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert set(taken) == {"a", "b"}
    assert all(seconds >= 0 for seconds in taken.values())


@pytest.mark.parametrize(
    ("words", "tflop"), [([], 3.526), (["model=S"], 0.947), (["objective.decoder=vit6h"], 2.830)]
)
def test_the_hand_count_is_what_pytorch_counts(tools: Path, words: list[str], tflop: float) -> None:
    flops = load("flops")
    config = compose(Pretrain, "pretrain", ["recipe=as2m", *words])
    hand, plain = flops.hand_tflop(config), flops.counted_tflop(config, "plain")
    assert hand == pytest.approx(tflop, rel=1e-3)
    assert plain == pytest.approx(hand, rel=0.03)
    assert 0.85 * plain < flops.counted_tflop(config, "ours") < plain  # it leaves work out


def test_step_masks_and_frontend_write_their_figures(tools: Path, tmp_path: Path, capsys) -> None:
    bench = importlib.import_module("bench")
    out = tmp_path / "out.json"
    words = ["--quick", "--repeats", "1", "--json", str(out)]
    assert bench.main(["step", "masks", "frontend", *words]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["part"] for row in rows] == ["step", "masks", "frontend", "frontend"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert row["ours_peak_mb"] > 0
        assert row["plain_peak_mb"] > 0
    step = rows[0]
    assert step["loss_difference"] < 2e-3  # bf16
    assert step["tflops"] == pytest.approx(step["tflop_per_clip"] * step["clips_per_second"])
    assert step["mfu"] == pytest.approx(step["tflops"] / step["matmul_tflops"])
    assert step["clips_per_second"] == pytest.approx(2e3 / step["ours_ms"])
    both = (step["frontend_ms"] + step["masks_ms"]) / step["ours_ms"]
    assert step["outside_share"] == pytest.approx(both)
    assert all(row["difference"] < 1e-4 for row in rows[2:])
    printed = capsys.readouterr().out
    assert "loss_difference" in printed
    assert "8 rows of 64 x 8" in printed


def test_variants_start_from_the_same_weights_and_masks(tools: Path) -> None:
    step = load("step")
    words = [*step.QUICK, "mask.views=2", "data.batch=2"]
    sizes = {"device": torch.device("cpu"), "repeats": 1, "matmul": 1.0}
    fused = step.alone("fused", words, **sizes)
    eager = step.alone("eager", [*words, "model.attention=eager"], **sizes)
    assert eager["first_loss"] == pytest.approx(fused["first_loss"], rel=2e-3)
    parameters = sum(
        p.numel() for p in step.OursStep(step.settings(words), sizes["device"]).module.parameters()
    )
    assert eager["held_mb"] > 4 * parameters / 1e6  # the weights, and AdamW's two moments


def test_long_tables_stand_upright(tools: Path) -> None:
    bench = importlib.import_module("bench")
    short = bench.table([{"part": "p", "case": "a", "ratio": 2.0}]).splitlines()
    assert [line.split() for line in short[::2]] == [["case", "ratio"], ["a", "2"]]
    long = bench.table([{"case": "a"} | {f"figure_number_{i}": float(i) for i in range(20)}])
    assert len(long.splitlines()) == 22
    assert long.splitlines()[-1].split() == ["figure_number_19", "19"]
