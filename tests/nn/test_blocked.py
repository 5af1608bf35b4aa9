"""Attention a few heads at a time: the same numbers and gradients as the plain formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bat.nn.blocked as blocked
from bat.nn.attention import attend


def inputs(
    m: int, n: int, *, dtype: torch.dtype, heads: int = 3, width: int = 2
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((1, heads, m, width), (1, heads, n, width), (1, heads, n, width))
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("group", [1, 40, 2**20])
@pytest.mark.parametrize(("m", "n"), [(4, 4), (2, 5)])
def test_blocked__gradients_in_float64(group: int, m: int, n: int, monkeypatch) -> None:
    """One head at a time, two, all; as many queries as keys, fewer."""
    monkeypatch.setattr(blocked, "GROUP", group)
    q, k, v = inputs(m, n, dtype=torch.float64)
    expected = attend(q, k, v, "eager")
    torch.testing.assert_close(blocked.blocked_attention(q, k, v), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(blocked.blocked_attention, (q, k, v))


def test_blocked__bfloat16_is_as_near_to_the_truth_as_the_plain_formula() -> None:
    q, k, v = inputs(60, 60, dtype=torch.bfloat16, width=16)
    truth = attend(*(x.double() for x in (q, k, v)), "eager")
    errors = {}
    for name in ("auto", "eager"):
        got = attend(q, k, v, name).float()
        assert got.isfinite().all()
        gradient = torch.autograd.grad(got.square().sum(), (q, k, v))
        exact = torch.autograd.grad(truth.square().sum(), (q, k, v), retain_graph=True)
        errors[name] = [
            float((a.double() - b.double()).detach().norm() / b.detach().norm())
            for a, b in zip((got, *gradient), (truth, *exact), strict=True)
        ]
    for ours, plain in zip(errors["auto"], errors["eager"], strict=True):
        assert ours < 1.3 * plain
        assert ours < 0.02


def test_blocked__is_one_operator_for_torch_compile() -> None:
    q, k, v = inputs(5, 5, dtype=torch.float32)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # as a block has
    torch.library.opcheck(blocked.blocked_attention, tuple(swapped))
    compiled = torch.compile(blocked.blocked_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), blocked.blocked_attention(q, k, v))


def test_blocked__flops_are_counted() -> None:
    q, k, v = inputs(8, 8, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v).sum().backward()
    once = 2 * 3 * 8 * 8 * 2  # multiply-adds of one product of all heads, times two
    assert counter.get_total_flops() == (2 + 5) * once
