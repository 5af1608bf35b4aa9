"""The benchmark runs and writes what it promises; its ways do the same work; no time is tested."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Pretrain

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def rows_of(bench: ModuleType, out: Path, *parts: str, code: int = 0) -> list[dict[str, Any]]:
    assert bench.main([*parts, "--quick", "--repeats", "1", "--json", str(out)]) == code
    written = json.loads(out.read_text())
    assert set(written) == {"device", "versions", "results"}
    assert written["versions"]["torch"].startswith("2.11")
    return written["results"]


# --- what the parts stand on


def test_peak_mb__is_the_worst_moment_above_what_was_there(bench: ModuleType) -> None:
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
    x = torch.ones(250_000, requires_grad=True)  # 1 MB
    # sin keeps its input, which is its own here: y lives until the backward pass has used it
    peak = peak_mb(lambda: (x * 2).sin().sum().backward(), "cpu")
    assert 3.0 <= peak < 4.1  # y, the gradient through the sum's expansion and sin, x.grad


def test_medians__take_turns_after_a_warm_up(bench: ModuleType) -> None:
    calls: list[str] = []
    ways = {name: (lambda n=name: calls.append(n)) for name in "ab"}
    taken = load("timing").medians(ways, repeats=2, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert set(taken) == {"a", "b"}


def test_flops__the_hand_count_is_what_pytorch_counts(bench: ModuleType) -> None:
    flops = load("flops")

    def settings(*words: str) -> Pretrain:
        return compose(Pretrain, "pretrain", ["recipe=as2m", *words])

    assert flops.hand_tflop(settings()) == pytest.approx(3.526, rel=1e-3)
    assert flops.hand_tflop(settings("model=S")) == pytest.approx(0.947, rel=1e-3)
    shallow = settings("model=S", "model.depth=2", "objective.decoder_depth=1")
    plain = flops.counted_tflop(shallow, "plain")
    assert plain == pytest.approx(flops.hand_tflop(shallow), rel=0.08)
    assert 0.8 * plain < flops.counted_tflop(shallow, "ours") < plain  # it leaves work out


def test_table__long_ones_stand_upright(bench: ModuleType) -> None:
    said = bench.table([{"case": "a", "ratio": 2.0}, {"case": "b", "note": "too large"}])
    assert said.splitlines()[-2].split() == ["b", "-"]
    assert said.splitlines()[-1] == "b: note: too large"
    long = bench.table([{"case": "a"} | {f"figure_number_{i}": float(i) for i in range(20)}])
    assert len(long.splitlines()) == 22
    assert long.splitlines()[-1].split() == ["figure_number_19", "19"]
    with pytest.raises(SystemExit):
        bench.main(["strem"])


def test_attempted__keeps_earlier_rows_and_lets_the_program_be_stopped(bench: ModuleType) -> None:
    def measure(error: BaseException) -> Iterator[dict[str, Any]]:
        yield {"case": "a"}
        raise error

    rows = [*load("timing").attempted("name", lambda: measure(ValueError("b\nc")))]
    assert rows == [{"case": "a"}, {"case": "name", "error": "ValueError: b"}]
    with pytest.raises(KeyboardInterrupt):
        list(load("timing").attempted("name", lambda: measure(KeyboardInterrupt())))


def test_parts__one_that_fails_costs_only_itself(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    out, written = tmp_path / "out.json", []  # rows in the file when the next one is measured
    for name in ("masks", "frontend"):
        part = load(name)

        def medians(*args, title: str, usual=part.medians, **words):
            written.append(len(json.loads(out.read_text())["results"]) if out.exists() else 0)
            if title.startswith(("mask,", "one pass")):
                raise RuntimeError("no kernel\nand more about it")
            return usual(*args, title=title, **words)

        monkeypatch.setattr(part, "medians", medians)
    rows = rows_of(bench, out, "masks", "frontend", code=1)
    assert written == [0, 1, 2, 3]  # every row was written before the next was measured
    assert [("error" in row) for row in rows] == [True, False, False, True]
    assert rows[0]["error"] == rows[3]["error"] == "RuntimeError: no kernel"
    said = capsys.readouterr()
    assert "mask, 8 rows of 64 x 8: error: RuntimeError: no kernel" in said.out
    assert "and more about it" in said.err  # the traceback
    assert "failed: mask, 8 rows of 64 x 8; one pass, 2 clips" in said.err
    monkeypatch.setattr(load("masks"), "here", lambda: 1 / 0)  # outside its cases
    rows = rows_of(bench, out, "masks", "frontend", code=1)
    assert [row["part"] for row in rows] == ["masks", "frontend", "frontend"]


# --- the stream


def test_stream__writes_its_numbers(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    stream = load("stream")
    cases = {
        name: case for name, case in stream.CASES.items() if name == "flac 16k mono, 2-s crops"
    }
    monkeypatch.setattr(stream, "CASES", cases)
    (row,) = rows_of(bench, tmp_path / "out.json", "stream")
    assert row["part"] == "stream"
    assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
    assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["ours_ms"])


def test_stream__ours_and_plain_read_the_same_waves(bench: ModuleType, tmp_path: Path) -> None:
    stream = load("stream")
    for codec, rate, channels in (("flac", 16_000, 1), ("ogg", 44_100, 2)):
        folder = tmp_path / codec
        folder.mkdir()
        paths = stream.make_clips(folder, codec=codec, rate=rate, channels=channels, count=2)
        shards = stream.make_shards(paths, folder / "shards")
        (batch,) = list(stream.ours_loader(shards, None, batch=2, batches=1, workers=0))
        ((plain, lengths),) = list(stream.plain_loader(paths, None, batch=2))
        assert batch.waves.shape == plain.shape == (2, 160_000)
        assert batch.lengths.tolist() == lengths.tolist() == [160_000] * 2
        spectra = [np.abs(np.fft.rfft(w.numpy())) for w in (batch.waves, plain)]  # roll: no matter
        a, b = (s[np.argsort(s[:, 1:100].sum(1))] for s in spectra)  # the order neither
        assert np.abs(a - b).max() < 1e-2 * np.abs(a).max()


# --- the step


def test_step__masks_and_frontend_write_their_numbers(bench: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(bench, tmp_path / "out.json", "step", "masks", "frontend")
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
    assert both["loss_difference"] < 1e-5
    outside = (alone["frontend_ms"] + alone["masks_ms"]) / alone["ours_ms"]
    assert alone["outside_share"] == pytest.approx(outside)
    assert [row["case"].split(",")[0] for row in rows[2:4]] == ["mask", "mask and ids"]
    assert all(row["difference"] < 1e-4 for row in rows[4:])


def compare(step: ModuleType) -> Iterator[dict[str, Any]]:
    (case,) = step.CASES["quick"]
    return step.compare(case, device=CPU, repeats=1, matmul=1.0)


def test_step__plain_without_memory_is_said_and_both_run_at_half(
    bench: ModuleType, monkeypatch
) -> None:
    step = load("step")
    calls: list[int] = []

    class Plain(step.PlainStep):
        def __call__(self, waves: torch.Tensor, **words: Any) -> dict[str, float]:
            calls.append(len(waves))
            if len(waves) > 1:  # as a compiler's errors come
                full = torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
                raise RuntimeError("compiler") from full
            return super().__call__(waves, **words)

    monkeypatch.setattr(step, "PlainStep", Plain)
    rows = [*compare(step)]
    whole, half = "tiny, 2 clips x 2 views, float32", "tiny, 1 clip x 2 views, float32"
    cases = [f"{whole}, ours alone", whole, f"{half}, ours alone", half]
    assert [row["case"] for row in rows] == cases
    assert set(rows[1]) == {"case", "note"}
    assert rows[1]["note"].endswith("compiler")
    assert calls == [2, 1, 1, 1]
    assert rows[3]["ratio"] > 0


def test_step__variants_start_from_the_same_weights_and_masks(bench: ModuleType) -> None:
    step = load("step")
    words = [*step.QUICK, "objective.mask.views=2", "data.batch=2"]
    sizes = {"device": CPU, "repeats": 1, "matmul": 1.0}
    fused = step.alone("fused", words, **sizes)
    eager = step.alone("eager", [*words, "model.attention=eager"], **sizes)
    assert eager["first_loss"] == pytest.approx(fused["first_loss"], rel=1e-5)
    module = step.OursStep(step.settings(words), CPU).module
    parameters = sum(p.numel() for p in module.parameters())
    assert eager["held_mb"] > 4 * parameters / 1e6  # the weights, and AdamW's two moments


def test_decoders__cheaper_ones_are_compared_with_the_papers(bench: ModuleType, tmp_path) -> None:
    rows = rows_of(bench, tmp_path / "out.json", "decoders")
    assert [row["case"] for row in rows] == list(load("decoders").WAYS)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
    flop = [row["tflop"] for row in rows]
    assert rows[0]["plain_tflop"] > flop[0] > flop[1] > flop[2] > flop[3]


# --- changes


def operators(call) -> list[str]:
    """Names of the operators that ``call`` runs, forward and backward."""
    with torch.profiler.profile() as profiled:
        call()
    return sorted(e.name for e in profiled.events() if e.name.startswith(("aten::", "bat::")))


def test_changes__each_acts_keeps_the_loss_and_is_taken_back(bench: ModuleType) -> None:
    changes = load("changes")
    words = [*changes.QUICK, "data.batch=2", "objective.mask.views=2"]
    step = changes.OursStep(changes.settings(words), CPU)
    step()
    usual = operators(step)
    for name, change in changes.CHANGES.items():
        before = step.loss(1).item()
        with suppress(torch.OutOfMemoryError), change(step):  # taken back where the step fails
            assert step.loss(1).item() == pytest.approx(before, rel=1e-5), name
            done = operators(step)
            raise torch.OutOfMemoryError
        if name != "attention by PyTorch's kernel (sdpa)":  # what auto is in float32
            assert done != usual, name
        assert operators(step) == usual, name
