"""Gated attention against the loop, timm's module and its own backends."""

import sys
import types

import pytest
import timm.layers
import torch

from bat.errors import UserError
from bat.nn import attention
from bat.nn.attention import Attention, attend
from tests.reference.attention import gated_attention


@pytest.mark.parametrize("gate", [True, False])
def test_attention__equals_the_loop_in_float64(gate: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, gate=gate).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = gated_attention(x, dict(layer.state_dict()), heads=3)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_attention__equals_timms_gated_attention() -> None:
    torch.manual_seed(0)
    ours = Attention(32, 4)
    timms = timm.layers.Attention(32, num_heads=4, qkv_bias=True, gated=True)
    assert set(timms.state_dict()) == set(ours.state_dict())
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(ours(x), timms(x), atol=1e-6, rtol=1e-5)


def test_attend__eager_equals_fused_forward_and_backward() -> None:
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
def test_attend__explicit_backend_that_does_not_fit_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=r"attention=cudnn cannot run here: torch.float32 of 8"):
        attend(q, q, q, "cudnn")


def test_attention__unknown_backend_and_bad_width_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'.*flash"):
        Attention(8, 2, backend="fast")
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=4"):
        Attention(10, 4)


@pytest.mark.parametrize("gate", [True, False])
def test_attention__outputs_of_some_tokens_equal_those_rows_of_all(gate: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, gate=gate).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    at = torch.tensor([[0, 3], [4, 1]])
    rows = torch.stack([layer(x)[b, at[b]] for b in range(2)])
    torch.testing.assert_close(layer(x, at), rows, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.combine(layer.project(x)), layer(x), atol=0, rtol=0)


def test_choose__auto_takes_what_fits_the_device() -> None:
    bf16 = torch.bfloat16
    assert attention.choose("auto", "cpu", bf16, 64) == "blocked"
    assert attention.choose("auto", "cpu", torch.float32, 64) == "sdpa"
    assert attention.choose("auto", "cuda", bf16, 64) == "sdpa"
    assert attention.choose("flash", "cuda", bf16, 64) == "flash"
    for backend in ("cudnn", "sdpa", "eager"):
        assert attention.choose(backend, "cpu", bf16, 64) == backend
    assert "no flash_attn package" in attention.describe("auto", "cuda", bf16, 64)
    assert "few heads" in attention.describe("auto", "cpu", bf16, 64)


def test_choose__the_package_is_taken_where_it_is_installed_and_fits(monkeypatch) -> None:
    module = types.ModuleType("flash_attn")
    seen = []

    def flash_attn_func(q, k, v):  # (B, n, H, d), as FlashAttention has it
        seen.append(q.shape)
        return attend_eager(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("placeholder"))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    function, name = attention.find_flash()
    assert (function, name) == (flash_attn_func, "flash_attn")  # the empty placeholder is passed by
    monkeypatch.setattr(attention, "FLASH", function)
    monkeypatch.setattr(attention, "FLASH_NAME", name)
    for backend in ("auto", "flash"):
        assert attention.choose(backend, "cuda", torch.bfloat16, 64) == "package"
        assert attention.choose(backend, "cuda", torch.float32, 64) != "package"
        assert attention.choose(backend, "cuda", torch.bfloat16, 260) != "package"
        assert attention.choose(backend, "cpu", torch.bfloat16, 64) != "package"
    monkeypatch.setattr(attention, "choose", lambda *args: "package")
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    torch.testing.assert_close(attend(q, k, v), attend_eager(q, k, v))
    assert seen == [(2, 5, 3, 8)]


def attend_eager(q, k, v):
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
