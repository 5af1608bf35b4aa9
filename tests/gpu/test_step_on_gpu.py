"""What only a GPU can show: kernels that fit, bf16 near float32, no surprise between devices."""

import pytest
import torch

from bat.audio.frontend import LogMel
from bat.backbones.bat import BAT
from bat.nn.attention import attend
from bat.nn.decoder import ViTDecoder
from bat.nn.masking import inverse_block_mask
from bat.objectives.masked_latent import MaskedLatent
from bat.shapes import Grid

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


@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn"])
def test_attention_backends_equal_float32_mathematics(backend: str) -> None:
    q, k, v = torch.randn(3, 4, 12, 513, 64, device="cuda").bfloat16().unbind(0)
    expected = attend(q.float(), k.float(), v.float(), "eager")
    got = attend(q, k, v, backend).float()
    assert float((got - expected).norm() / expected.norm()) < 1e-2


def test_masks_are_drawn_on_the_device_and_exact() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    views = inverse_block_mask(384, GRID, keep_ratio=1 - 0.8, generator=g)
    assert views.keep_ids.is_cuda
    assert bool(((~views.mask).sum(1) == 102).all())
    assert bool((views.keep_ids.diff(dim=1) > 0).all())


def test_bf16_step_is_near_the_float32_step_on_the_cpu() -> None:
    x, g = batch()
    views = inverse_block_mask(8, GRID, generator=g)
    expected = small()(x, views).total.item()
    model = small().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        on_gpu = type(views)(*(t.cuda() for t in views))
        losses = model(x.cuda(), on_gpu)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters())


def test_compiled_blocks_equal_the_plain_ones() -> None:
    x, g = batch()
    views = inverse_block_mask(8, GRID, generator=g)
    views = type(views)(*(t.cuda() for t in views))
    plain, compiled = small().cuda(), small().cuda()
    for module in compiled.modules():
        if type(module).__name__ == "Block":
            module.compile()
    a = plain(x.cuda(), views).total
    b = compiled(x.cuda(), views).total
    assert b.item() == pytest.approx(a.item(), rel=1e-4)
    assert set(plain.state_dict()) == set(compiled.state_dict())
