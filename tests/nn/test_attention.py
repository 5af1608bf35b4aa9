"""Gated attention against the loop, timm's module and its own backends."""

import pytest
import timm.layers
import torch

from bat.nn.attention import Attention, attend
from tests.reference.attention import gated_attention


@pytest.mark.parametrize("gate", [True, False])
def test_equals_the_loop_in_float64(gate: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, gate=gate).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = gated_attention(x, dict(layer.state_dict()), heads=3)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_equals_timms_gated_attention() -> None:
    torch.manual_seed(0)
    ours = Attention(32, 4)
    timms = timm.layers.Attention(32, num_heads=4, qkv_bias=True, gated=True)
    assert set(timms.state_dict()) == set(ours.state_dict())
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(ours(x), timms(x), atol=1e-6, rtol=1e-5)


def test_eager_equals_fused_forward_and_backward() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("auto", "eager"):
        for x in inputs:
            x.grad = None
        out = attend(*inputs, backend)
        out.square().sum().backward()
        results.append([out.detach(), *[x.grad.clone() for x in inputs]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cudnn attention may fit a GPU")
def test_explicit_backend_that_does_not_fit_raises() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(RuntimeError):
        attend(q, q, q, "cudnn")


def test_unknown_backend_and_bad_width_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'.*flash"):
        Attention(8, 2, backend="fast")
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=4"):
        Attention(10, 4)
