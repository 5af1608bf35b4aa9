"""What only a GPU can show: kernels that fit, bf16 near float32, no surprise between devices."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bat.audio.frontend import LogMel
from bat.encoders.bat import BAT
from bat.nn.decoder import ViTDecoder
from bat.nn.masking import inverse_block_mask
from bat.objectives.masked_latent import MaskedLatent
from bat.types import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRID = Grid(64, 8)


def small() -> MaskedLatent:
    torch.manual_seed(0)
    encoder = BAT(width=192, depth=3, heads=3, grid=GRID)
    return MaskedLatent(encoder, ViTDecoder(192, GRID, depth=2, heads=3))


def batch() -> tuple[torch.Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, 1, 1024, 128, generator=g), g


def test_front_end_equals_the_cpu() -> None:
    waves = torch.randn(3, 160_000, generator=torch.Generator().manual_seed(0)) * 0.1
    front = LogMel()
    expected = front(waves, frames=1024)
    got = front.cuda()(waves.cuda(), frames=1024).cpu()
    assert float((got - expected).abs().max()) < 1e-3


def test_masks_are_drawn_on_the_device_and_exact() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    views = inverse_block_mask(384, GRID, keep_ratio=1 - 0.8, generator=g)
    assert views.keep_ids.is_cuda
    assert bool(((~views.mask).sum(1) == 102).all())
    assert bool((views.keep_ids.diff(dim=1) > 0).all())


def test_bf16_step_is_near_the_float32_step_on_the_cpu() -> None:
    x, g = batch()
    views = inverse_block_mask(8, GRID, generator=g)
    expected = small().losses(x, views).total.item()
    model = small().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        on_gpu = type(views)(*(t.cuda() for t in views))
        losses = model.losses(x.cuda(), on_gpu)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters())


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's steps: ours and plain."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    return importlib.import_module("benchmarks.step")


WORDS = [
    "model.width=192",
    "model.depth=2",
    "model.heads=3",
    "objective.decoder_depth=2",
    "data.batch=2",
    "objective.mask.views=4",
]


def ours(step: ModuleType, *words: str):
    torch.compiler.reset()
    return step.OursStep(step.settings([*WORDS, *words]), torch.device("cuda"))


@pytest.mark.parametrize(
    ("precision", "tolerance", "compiled"),
    [("32-true", 1e-4, False), ("bf16-mixed", 1e-2, False), ("bf16-mixed", 1e-2, True)],
    ids=["fp32", "bf16", "bf16-compiled"],
)
def test_the_step_equals_the_plain_one(
    step: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    tolerance: float,
    compiled: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # plain's patch convolution
    words = [f"hardware.precision={precision}", *([step.COMPILE] if compiled else [])]
    mine = ours(step, *words)
    plain_step = importlib.import_module("benchmarks.plain_step")
    plain = plain_step.PlainStep(
        mine.config,
        **plain_step.plain_weights_of(mine.module.objective),
        device=torch.device("cuda"),
        compiled=compiled,
    )
    assert step.loss_difference(mine, plain) < tolerance
    for seed in range(2):  # the same masks: the same steps
        loss = mine.loss(seed)
        views = mine.module.objective.draw_views(mine.batch.positions)
        loss.backward()
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        mine.module.objective.update_teacher(0.9)
        got = plain(mine.batch.waves, decay=0.9, views=views)["loss"]
        assert got == pytest.approx(loss.item(), rel=tolerance)


@pytest.mark.parametrize("mode", ["blocks", "whole", "cudagraphs"])
def test_compiled_steps_equal_the_eager_one(step: ModuleType, mode: str) -> None:
    eager = ours(step)
    expected = [float(eager()) for _ in range(4)]
    compiled = ours(step, f"hardware.compile={mode}")
    got = [float(compiled()) for _ in range(4)]  # CUDA graphs: recorded, then replayed
    assert got == pytest.approx(expected, rel=1e-2)
    names = [set(s.module.objective.state_dict()) for s in (eager, compiled)]
    assert names[0] == names[1]


@pytest.mark.parametrize("mode", ["off", "whole"])
def test_the_step_never_waits_for_the_device(step: ModuleType, mode: str) -> None:
    mine = ours(step, f"hardware.compile={mode}")
    for _ in range(3):
        mine()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_activation_checkpointing_changes_memory_and_not_the_loss(step: ModuleType) -> None:
    peak_mb = importlib.import_module("benchmarks.memory").peak_mb
    losses, peaks = [], []
    for flag in ("false", "true"):
        mine = ours(step, f"hardware.activation_checkpointing={flag}", "data.batch=8")
        losses.append(float(mine()))
        peaks.append(peak_mb(mine, "cuda"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert peaks[1] < 0.8 * peaks[0]


def test_peak_memory_is_of_the_call_alone(step: ModuleType) -> None:
    peak_mb = importlib.import_module("benchmarks.memory").peak_mb
    there = torch.ones(5_000_000, device="cuda")
    assert peak_mb(lambda: (there + 1).sum(), "cuda") == pytest.approx(20.0, abs=1.0)
    assert peak_mb(lambda: there.mul_(2), "cuda") < 1.0
