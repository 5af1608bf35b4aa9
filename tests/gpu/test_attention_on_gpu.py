"""Each attention kernel against plain mathematics in float32, forward and backward, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

from bat.errors import UserError
from bat.nn.attention import Attention, Backend, attend, choose, describe, facts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (103, 410, 512, 513)
"""Tokens of a masked view with its class token, masked patches, all patches, a whole clip."""
BACKENDS = [name for name in get_args(Backend) if name != "eager"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend that is to run on this GPU; the reason of a refusal is that of the skip."""
    try:
        choose(request.param, facts_of(torch.device("cuda")), torch.bfloat16, 64)
    except UserError as error:
        pytest.skip(str(error))
    yield request.param
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the relative distance of two tensors."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("n", LENGTHS)
def test_attend__equals_float32_forward_and_backward(backend: Backend, n: int) -> None:
    g = torch.Generator("cuda").manual_seed(n)
    shape = (4, 3, 12, n, 64)  # q, k, v and the gradient of the output
    q, k, v, up = torch.randn(shape, device="cuda", generator=g).bfloat16().unbind(0)
    results = []
    for name, dtype in (("eager", torch.float32), (backend, torch.bfloat16)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, name)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, up.to(dtype))])
    for name, expected, got in zip(("out", "q", "k", "v"), *results, strict=True):
        assert far(got, expected) < 2e-2, name


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("some", [False, True], ids=["all", "at"])
@pytest.mark.parametrize("n", LENGTHS)
def test_attention__equals_float32_with_and_without_gate_and_for_some_tokens(
    backend: Backend, n: int, some: bool, gate: bool
) -> None:
    torch.manual_seed(n)
    layer = Attention(768, 12, gate=gate, backend=backend).cuda()
    x = torch.randn(3, n, 768, device="cuda")
    at = torch.rand(3, n, device="cuda").argsort(1)[:, : n // 2] if some else None
    results = []
    for name in ("eager", backend):
        layer.backend = name
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=name != "eager"):
            out = layer(leaf, at)
        out.float().square().sum().backward()
        results.append([out.detach(), leaf.grad, layer.qkv.weight.grad.clone()])
    for name, expected, got in zip(("out", "x", "qkv"), *results, strict=True):
        assert far(got, expected) < 5e-2, name


def test_auto__on_hopper_is_cudnn_or_avoids_it() -> None:
    facts = facts_of(torch.device("cuda"))
    capability = torch.cuda.get_device_capability()
    if capability not in ((9, 0), (10, 0)):
        pytest.skip(f"compute capability {capability}: PyTorch prefers cuDNN on 9.0 and 10.0 only")
    assert f"torch {torch.__version__}" in describe("auto", facts, torch.bfloat16, 64)
    q = torch.randn(2, 12, 103, 64, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        attend(q, q, q)
        torch.cuda.synchronize()
    kernels = " ".join(event.key for event in profiled.key_averages())
    assert ("cudnn" in kernels.lower()) == (not facts.wrong_cudnn), kernels
