"""The plain probes of the benchmark do the same work as ours; no time is judged."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bat.eval.hardware import has_fast_bfloat16

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CPU = torch.device("cpu")


@pytest.fixture
def cgp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("benchmarks.cgp")


@pytest.mark.parametrize(("name", "level"), [("cgp", "clip"), ("protobin", "frame")])
def test_plain__same_loss_gradients_and_weights_after_three_steps(cgp, name, level) -> None:
    sizes = cgp.TINY
    features = cgp.make_features(sizes, torch.float32, CPU)
    shape = (sizes.clips, *([sizes.time] if level == "frame" else []), sizes.classes)
    targets = torch.rand(shape, generator=torch.Generator().manual_seed(1)).round()
    ours, plain = (
        cgp.Step(cgp.build(name, way, sizes, level=level), features, targets, fused=way == "ours")
        for way in ("ours", "plain")
    )
    losses = [[float(step()) for _ in range(3)] for step in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][2]  # it does train, with dropout
    theirs = dict(plain.probe.named_parameters())
    for key, parameter in ours.probe.named_parameters():
        other = theirs.pop(key)
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-3, msg=key)
        torch.testing.assert_close(parameter, other, atol=1e-4, rtol=1e-3, msg=key)
    assert not theirs


def test_plain__pooling_and_mixing_are_the_same(cgp) -> None:
    plain = importlib.import_module("benchmarks.plain_probes")
    patches = cgp.make_features(cgp.TINY, torch.float32, CPU).patches
    gate = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(cgp.mix_normalised(patches, gate), plain.mix(patches, gate))
    tokens, prototypes = patches[0].flatten(1, 2), torch.randn(7, cgp.TINY.width)
    middle = tokens.mean(1)
    torch.testing.assert_close(
        cgp.pool_prototypes(tokens, prototypes, middle), plain.pool(tokens, prototypes, middle)
    )


def test_cgp__writes_its_numbers(cgp, tmp_path: Path, monkeypatch) -> None:
    if not has_fast_bfloat16("cpu"):  # a hundred times slower there
        made = cgp.cases(gpu=False, quick=True)
        kept = [
            c._replace(kind="float32") for c in made if c.kind == "float32" or c.level == "frame"
        ]
        monkeypatch.setattr(cgp, "cases", lambda **_: kept)
    rows = json.loads(json.dumps(list(cgp.run(repeats=1, quick=True))))
    cases = [row["case"] for row in rows]
    assert len(set(cases)) == len(cases)
    for start in ("cgp clip", "cgp frame", "protobin clip", "mixing alone", "pooling alone"):
        assert any(case.startswith(start) for case in cases), start
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert row["ours_peak_mb"] >= 0
        assert row["plain_peak_mb"] > 0
        if "loss" in row:
            bound = 1e-5 if row["case"].endswith("float32") else 2e-2
            assert row["loss_difference"] < bound * row["loss"]


def test_cgp__extra_memory_subtracts_no_gradient_that_is_not_there(cgp, monkeypatch) -> None:
    """All are there at the backward's peak only."""
    step = cgp.Step(
        cgp.build("cgp", "ours", cgp.TINY, level="clip"),
        cgp.make_features(cgp.TINY, torch.float32, CPU),
        torch.zeros(cgp.TINY.clips, cgp.TINY.classes),
        fused=True,
    )
    step()
    gradients = sum(4 * p.numel() for p in step.probe.parameters()) / 1e6
    for peaks, extra in (([5, 4, 1], 5), ([2, 4, 1], 4 - gradients), ([2, 4, 7], 7)):
        answers = iter(peaks)
        monkeypatch.setattr(cgp, "peak_mb", lambda call, device, a=answers: (call(), next(a))[1])
        assert step.extra_mb() == pytest.approx(extra)
