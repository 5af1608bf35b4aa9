"""What the benchmark's parts stand on: memory, timing, FLOP counts; and the parts at tiny sizes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
    parts = ["step", "step", "masks", "masks", "frontend", "frontend"]
    assert [row["part"] for row in rows] == parts
    for row in rows[1:]:
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert row["ours_peak_mb"] > 0
        assert row["plain_peak_mb"] > 0
    alone, both = rows[:2]
    assert alone["case"] == f"{both['case']}, ours alone"
    for step in (alone, both):
        assert step["tflops"] == pytest.approx(step["tflop_per_clip"] * step["clips_per_second"])
        assert step["mfu"] == pytest.approx(step["tflops"] / step["matmul_tflops"])
        assert step["clips_per_second"] == pytest.approx(2e3 / step["ours_ms"])
    assert both["loss_difference"] < 2e-3  # bf16
    outside = (alone["frontend_ms"] + alone["masks_ms"]) / alone["ours_ms"]
    assert alone["outside_share"] == pytest.approx(outside)
    assert [row["case"].split(",")[0] for row in rows[2:4]] == ["mask", "mask and ids"]
    assert rows[2]["threads"] == rows[3]["threads"] == torch.get_num_threads()
    assert all(row["difference"] < 1e-4 for row in rows[4:])
    printed = capsys.readouterr().out
    assert "loss_difference" in printed
    assert "8 rows of 64 x 8" in printed


def compare(step: ModuleType, **words) -> Iterator[dict[str, Any]]:
    (case,) = step.CASES["quick"]
    return step.compare(case, device=torch.device("cpu"), repeats=1, matmul=1.0, **words)


def test_ours_is_there_before_plain_is_built(tools: Path, monkeypatch) -> None:
    step = load("step")
    built: list[int] = []

    class Plain(step.PlainStep):
        def __init__(self, *args: Any, **words: Any) -> None:
            built.append(1)
            super().__init__(*args, **words)

    monkeypatch.setattr(step, "PlainStep", Plain)
    rows = compare(step)
    first = next(rows)
    assert (first["case"], built) == ("tiny, 2 clips x 2 views, bf16, ours alone", [])
    assert first["ours_ms"] > 0
    second = next(rows)
    assert (second["case"], built) == ("tiny, 2 clips x 2 views, bf16", [1])
    assert second["loss_difference"] < 2e-3  # the weights of before ours' steps
    assert [*rows] == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_without_memory_is_said_and_both_run_at_half(
    tools: Path, monkeypatch, wrapped: bool
) -> None:
    step = load("step")
    calls: list[int] = []

    class Plain(step.PlainStep):
        def __call__(self, waves: torch.Tensor, **words: Any) -> dict[str, float]:
            calls.append(len(waves))
            if len(waves) > 1:
                full = torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
                if wrapped:  # as a compiler's errors come
                    raise RuntimeError("compiler") from full
                raise full
            return super().__call__(waves, **words)

    monkeypatch.setattr(step, "PlainStep", Plain)
    rows = [*compare(step)]
    whole, half = "tiny, 2 clips x 2 views, bf16", "tiny, 1 clip x 2 views, bf16"
    cases = [f"{whole}, ours alone", whole, f"{half}, ours alone", half]
    assert [row["case"] for row in rows] == cases
    assert set(rows[1]) == {"case", "note"}
    assert rows[1]["note"].endswith("compiler" if wrapped else "CUDA out of memory. Tried")
    assert calls == [2, 1, 1, 1]
    assert rows[3]["ratio"] > 0
    assert rows[2]["clips_per_second"] == pytest.approx(1e3 / rows[2]["ours_ms"])


def test_plain_that_fails_otherwise_is_an_error(tools: Path, monkeypatch) -> None:
    step = load("step")

    def broken(*args: Any, **words: Any) -> None:
        raise TypeError("wrong")

    monkeypatch.setattr(step.PlainStep, "losses", broken)
    first, second = compare(step)
    assert "ours_ms" in first
    assert second == {"case": "tiny, 2 clips x 2 views, bf16", "error": "TypeError: wrong"}


def test_a_failed_case_keeps_its_earlier_rows(tools: Path) -> None:
    def measure() -> Iterator[dict[str, Any]]:
        yield {"case": "a"}
        raise ValueError("b\nc")

    rows = [*load("timing").attempted("name", measure)]
    assert rows == [{"case": "a"}, {"case": "name", "error": "ValueError: b"}]


def test_what_stops_the_program_is_not_a_failed_case(tools: Path) -> None:
    def measure() -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(load("timing").attempted("name", measure))


def test_variants_start_from_the_same_weights_and_masks(tools: Path) -> None:
    step = load("step")
    words = [*step.QUICK, "objective.mask.views=2", "data.batch=2"]
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
    said = bench.table([{"case": "a", "ratio": 2.0}, {"case": "b", "note": "too large"}])
    assert said.splitlines()[-2].split() == ["b", "-"]
    assert said.splitlines()[-1] == "b: note: too large"
    long = bench.table([{"case": "a"} | {f"figure_number_{i}": float(i) for i in range(20)}])
    assert len(long.splitlines()) == 22
    assert long.splitlines()[-1].split() == ["figure_number_19", "19"]
