"""Gated attention against the loop, timm's module and its own backends."""

import sys
import types

import pytest
import timm.layers
import torch
from torch.overrides import TorchFunctionMode

from bat.errors import UserError
from bat.nn import attention
from bat.nn.attention import Attention, Facts, attend
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


BF16, F32 = torch.bfloat16, torch.float32
OLD, FIT = attention.CUDNN - 1, attention.CUDNN
PACKAGE = "flash_attn 2.8.3"


@pytest.mark.parametrize(
    ("backend", "facts", "dtype", "head_width", "kernel"),
    [
        ("auto", Facts("cpu"), BF16, 64, "blocked"),
        ("auto", Facts("cpu"), F32, 64, "sdpa"),
        ("auto", Facts("mps"), BF16, 64, "sdpa"),
        ("auto", Facts("cpu", package=PACKAGE), F32, 64, "sdpa"),
        # Hopper and Blackwell: PyTorch's choice, which is cuDNN, where that is right
        ("auto", Facts("cuda", 9, FIT), BF16, 64, "sdpa"),
        ("auto", Facts("cuda", 9, FIT, PACKAGE), BF16, 64, "sdpa"),
        ("auto", Facts("cuda", 10, FIT, PACKAGE, "4.0.0b19"), BF16, 64, "sdpa"),
        ("auto", Facts("cuda", 9, OLD, PACKAGE), BF16, 64, "package"),
        ("auto", Facts("cuda", 9, OLD), BF16, 64, "not_cudnn"),
        ("auto", Facts("cuda", 10, 0), BF16, 64, "not_cudnn"),
        ("auto", Facts("cuda", 9, OLD, PACKAGE), F32, 64, "not_cudnn"),
        ("sdpa", Facts("cuda", 9, OLD, PACKAGE), BF16, 64, "not_cudnn"),
        # other GPUs: the package where it is installed and fits
        ("auto", Facts("cuda", 8, OLD), BF16, 64, "sdpa"),
        ("auto", Facts("cuda", 8, FIT, PACKAGE), BF16, 64, "package"),
        ("auto", Facts("cuda", 12, FIT, PACKAGE), BF16, 64, "package"),
        ("auto", Facts("cuda", 8, FIT, PACKAGE), F32, 64, "sdpa"),
        ("auto", Facts("cuda", 8, FIT, PACKAGE), BF16, 260, "sdpa"),
        ("auto", Facts("cuda", 8, FIT, PACKAGE), BF16, 36, "sdpa"),
        # explicit choices
        ("flash", Facts("cuda", 9, FIT, PACKAGE), BF16, 64, "package"),
        ("flash", Facts("cuda", 9, FIT), BF16, 64, "flash"),
        ("flash", Facts("cuda", 9, FIT, PACKAGE), F32, 64, "flash"),
        ("flash", Facts("cpu", package=PACKAGE), BF16, 64, "flash"),
        ("cudnn", Facts("cuda", 9, FIT), BF16, 64, "cudnn"),
        ("cudnn", Facts("cuda", 8, OLD), BF16, 64, "cudnn"),
        ("sdpa", Facts("cuda", 9, FIT, PACKAGE), BF16, 64, "sdpa"),
        ("eager", Facts("cuda", 9, OLD, PACKAGE), BF16, 64, "eager"),
        ("flash4", Facts("cuda", 9, OLD, flash4="4.0.0b19"), BF16, 64, "flash4"),
        ("flash4", Facts("cuda", 10, FIT, flash4="4.0.0b8"), torch.float16, 128, "flash4"),
    ],
)
def test_choose__takes_what_fits_the_facts(backend, facts, dtype, head_width, kernel) -> None:
    assert attention.choose(backend, facts, dtype, head_width) == kernel


@pytest.mark.parametrize(
    ("backend", "facts", "dtype", "head_width", "named"),
    [
        ("cudnn", Facts("cuda", 9, OLD), BF16, 64, ["cudnn", "9.15.0", "9.15.1", "auto"]),
        ("cudnn", Facts("cuda", 10, 8902), BF16, 64, ["cudnn", "8.9.2", "auto"]),
        ("flash4", Facts("cpu"), F32, 64, ["not cpu", "pip install flash-attn-4==", "float32"]),
        ("flash4", Facts("cuda", 8, FIT, flash4="4.0.0b19"), BF16, 64, ["9 or 10, not cuda 8"]),
        ("flash4", Facts("cuda", 9, FIT, flash4="4.0.0b20"), BF16, 64, ["4.0.0b20", "==4.0.0b19"]),
        ("flash4", Facts("cuda", 9, FIT, flash4="4.0.0"), BF16, 64, ["4.0.0 ", "==4.0.0b19"]),
        ("flash4", Facts("cuda", 9, FIT, flash4="4.0.0b19"), BF16, 192, ["192", "model.heads"]),
        ("flash4", Facts("cuda", 9, FIT, flash4="4.0.0b19"), BF16, 36, ["36", "model.heads"]),
    ],
)
def test_choose__what_would_be_wrong_is_refused(backend, facts, dtype, head_width, named) -> None:
    with pytest.raises(UserError, match=f"attention={backend}") as raised:
        attention.choose(backend, facts, dtype, head_width)
    assert [word for word in named if word not in str(raised.value)] == []


def test_describe__names_kernel_and_versions() -> None:
    words = attention.describe("auto", Facts("cuda", 9, 91900), BF16, 64)
    assert "scaled_dot_product_attention; torch" in words
    assert "cuDNN 9.19.0, no flash_attn package" in words
    words = attention.describe("auto", Facts("cuda", 8, FIT, PACKAGE), BF16, 64)
    assert "(flash_attn 2.8.3)" in words
    assert "no flash_attn" not in words
    words = attention.describe("flash4", Facts("cuda", 9, OLD, flash4="4.0.0b19"), BF16, 64)
    assert "4.0.0b19" in words
    assert "cuDNN 9.15.0" in words
    assert "few heads" in attention.describe("auto", Facts("cpu"), BF16, 64)


def test_attend__without_cudnn_gives_the_same_inside_one_graph(monkeypatch) -> None:
    monkeypatch.setattr(attention, "facts_of", lambda device: Facts("cuda", 9, OLD))
    inputs = torch.randn(3, 2, 3, 5, 8)
    whole = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*inputs), attend_eager(*inputs))
    allowed = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                kernels = torch.backends.cuda
                allowed.append([kernels.cudnn_sdp_enabled(), kernels.flash_sdp_enabled()])
            return func(*args, **(kwargs or {}))

    with Watch():
        attend(*inputs)
    assert allowed == [[False, True]]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before


def test_attend__the_package_is_taken_where_it_is_installed_and_fits(monkeypatch) -> None:
    module = types.ModuleType("flash_attn")
    seen = []

    def flash_attn_func(q, k, v):  # (B, n, H, d), as FlashAttention has it
        seen.append(q.shape)
        return attend_eager(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    module.flash_attn_func, module.__version__ = flash_attn_func, "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("placeholder"))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    function, name = attention.find_flash()
    assert (function, name) == (flash_attn_func, PACKAGE)  # the empty placeholder is passed by
    monkeypatch.setattr(attention, "FLASH", function)
    monkeypatch.setattr(attention, "facts_of", lambda device: Facts("cuda", 8, FIT, name))
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float16)
    torch.testing.assert_close(attend(q, k, v), attend_eager(q, k, v), atol=2e-3, rtol=1e-2)
    assert seen == [(2, 5, 3, 8)]


def attend_eager(q, k, v):
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
