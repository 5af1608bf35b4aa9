"""The plain step computes what ours computes: a benchmark that compares unlike things says nothing.

float32, tiny sizes: same spectrogram, same masks given -> same losses, gradients and weights.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.nn.masking import inverse_block_mask
from bat.train.pretrain import Pretraining
from bat.types import Grid, WaveBatch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WORDS = [
    "recipe=as2m",
    "hardware=cpu",
    "model.width=48",
    "model.depth=3",
    "model.heads=2",
    "frontend.frames=208",
    "data.clip_seconds=2.0",
    "data.batch=3",
    "objective.mask.views=2",
    "objective.decoder_depth=2",
]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("benchmarks.plain_step")


def settings(*more: str) -> Pretrain:
    return compose(Pretrain, "pretrain", [*WORDS, *more])


def pair(plain: ModuleType, *more: str):
    """Ours and plain of the same weights; norms, biases and tokens are not left at 0 and 1."""
    config = settings(*more)
    torch.manual_seed(0)
    ours = Pretraining(config)
    with torch.no_grad():
        for p in ours.objective.student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    student = ours.objective.student.state_dict()
    other = plain.PlainStep(
        config,
        student=student,
        teacher=ours.objective.teacher.encoder.state_dict(),
        device=torch.device("cpu"),
        compiled=False,
    )
    return config, ours, other


def waves(clips: int = 3, samples: int = 32_000) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(clips, samples, generator=g)


def batch_of(x: torch.Tensor) -> WaveBatch:
    B, S = x.shape
    return WaveBatch(
        waves=x,
        lengths=torch.full((B,), S),
        targets=torch.zeros(B, 0),
        keys=[str(i) for i in range(B)],
        positions=torch.arange(B),
        skipped=[],
    )


def test_the_spectrogram_is_ours(plain: ModuleType) -> None:
    _, ours, other = pair(plain)
    x = waves() * torch.tensor([1.0, 1e-3, 0.0])[:, None]  # each clip has its own floor; silence
    expected = ours.objective.spectrogram(batch_of(x))
    got = other.frontend(x, 208)
    assert got.shape == expected.shape == (3, 1, 208, 128)
    assert float((got - expected).abs().max()) < 2e-5
    assert float(got.std()) > 0.05


@pytest.mark.parametrize("decoder", ["vit12h", "vit6h"])
def test_losses_gradients_and_weights_are_ours(plain: ModuleType, decoder: str) -> None:
    config, ours, other = pair(plain, f"objective.decoder={decoder}")
    optimizer = ours.configure_optimizers()
    batch = batch_of(waves())
    for step in range(2):
        views = ours.objective.draw_views(3 * step + torch.arange(3))
        losses = ours.objective.losses(ours.objective.spectrogram(batch), views)
        total, local, global_ = other.losses(batch.waves, views.mask.float())
        for theirs, mine in zip((total, local, global_), losses[:3], strict=True):
            assert theirs.item() == pytest.approx(mine.item(), rel=1e-5)
        if step == 0:
            losses.total.backward()
            total.backward()
            got, expected = _grads(other.student), _grads(ours.objective.student)
            assert set(got) == {n for n, _ in other.student.named_parameters()} == set(expected)
            for name, grad in expected.items():
                gap = float((got[name] - grad).norm() / (grad.norm() + 1e-6))
                assert gap < 1e-4, f"{name}: {gap}"
            other.optimizer.zero_grad()
        else:
            losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.objective.update_teacher(0.9)
        numbers = other(batch.waves, decay=0.9, views=views)
        assert numbers["loss"] == pytest.approx(losses.total.item(), rel=1e-5)
    for mine, its in (
        (ours.objective.student, other.student),
        (ours.objective.teacher.encoder, other.teacher.encoder),
    ):
        expected, got = mine.state_dict(), its.state_dict()
        assert set(got) == set(expected)
        for name, weight in expected.items():
            if "qkv.bias" in name:  # keys: no gradient but rounding, which Adam blows up to lr
                third = weight.shape[0] // 3
                weight = torch.cat([weight[:third], weight[2 * third :]])
                got[name] = torch.cat([got[name][:third], got[name][2 * third :]])
            # Adam's first steps are lr * sign(gradient): where that is nearly 0, they may differ
            far = (got[name] - weight).abs() > 1e-5
            assert float(far.float().mean()) < 2e-3, f"{name}: {float(far.float().mean())}"
    assert config.optim.lr > 1e-5  # else the last check sees nothing


def _grads(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_weights_load_back_into_ours(plain: ModuleType) -> None:
    _, ours, other = pair(plain)
    other(waves(), decay=0.5)  # with its own masks
    ours.objective.student.load_state_dict(other.student.state_dict())
    ours.objective.teacher.encoder.load_state_dict(other.teacher.encoder.state_dict())
    views = ours.objective.draw_views(torch.arange(3))
    losses = ours.objective.losses(ours.objective.spectrogram(batch_of(waves())), views)
    total, _, _ = other.losses(waves(), views.mask.float())
    assert total.item() == pytest.approx(losses.total.item(), rel=1e-5)


def test_plain_masks_are_of_the_same_kind(plain: ModuleType) -> None:
    grid, rows = Grid(64, 8), 2000
    torch.manual_seed(0)
    removed = plain.plain_masks(rows, grid, keep_ratio=1 - 0.8)
    assert removed.shape == (rows, 512)
    assert set(removed.unique().tolist()) == {0.0, 1.0}
    assert bool((removed.sum(1) == 410).all())
    g = torch.Generator().manual_seed(0)
    ours = (~inverse_block_mask(rows, grid, keep_ratio=1 - 0.8, generator=g).mask).float()
    kept = 1 - removed
    # how often each patch is kept, and how often its right neighbour in time is kept with it
    assert float((kept.mean(0) - ours.mean(0)).abs().max()) < 0.07  # 4 deviations of the two
    pairs = [
        float((m.view(-1, 64, 8)[:, 1:] * m.view(-1, 64, 8)[:, :-1]).mean()) for m in (kept, ours)
    ]
    assert pairs[0] == pytest.approx(pairs[1], rel=0.02)
    assert pairs[0] > 2 * 0.2**2  # blocks, not single patches


def test_ids_are_ascending_and_restore(plain: ModuleType) -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    keep, restore = plain.plain_ids(mask, 2)
    assert keep.tolist() == [[1, 3], [0, 1]]
    assert restore.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]
