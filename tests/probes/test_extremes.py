"""The min / max operator against the stored similarities, and what it must not store."""

import pytest
import torch

from bat.probes import extremes
from bat.probes.extremes import highest, lowest_and_highest
from tests.reference.probes import extremes_stored


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 60, 2**22])
def test_values_and_gradients_equal_the_stored_similarities(monkeypatch, block):
    monkeypatch.setattr(extremes, "BLOCK_ELEMENTS", block)
    tokens, prototypes = _random(3, 10, 8).requires_grad_(), _random(7, 8, seed=1).requires_grad_()
    weights = _random(2, 3, 7, seed=2)
    grads = []
    for operator in (lowest_and_highest, extremes_stored):
        low, high = operator(tokens, prototypes)
        loss = (low * weights[0] + high * weights[1]).sum()
        grads.append(
            (low.detach(), high.detach(), *torch.autograd.grad(loss, (tokens, prototypes)))
        )
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-6)


def test_one_output_unused_has_no_gradient_from_it():
    tokens, prototypes = _random(2, 5, 4).requires_grad_(), _random(3, 4, seed=1)
    low, _ = lowest_and_highest(tokens, prototypes)
    (grad,) = torch.autograd.grad(low.sum(), tokens)
    low, _ = extremes_stored(tokens, prototypes)
    torch.testing.assert_close(grad, torch.autograd.grad(low.sum(), tokens)[0])


def test_highest_alone_equals_the_pair():
    tokens, prototypes = _random(2, 5, 4).requires_grad_(), _random(3, 4, seed=1).requires_grad_()
    alone = highest(tokens, prototypes)
    assert torch.equal(alone, lowest_and_highest(tokens, prototypes)[1])
    grads = torch.autograd.grad(alone.square().sum(), (tokens, prototypes))
    pair = lowest_and_highest(tokens, prototypes)[1].square().sum()
    for a, b in zip(grads, torch.autograd.grad(pair, (tokens, prototypes)), strict=True):
        assert torch.equal(a, b)


def test_exact_ties_give_the_first_token_the_gradient():
    tokens = torch.ones(1, 4, 2, requires_grad=True)
    low, high = lowest_and_highest(tokens, torch.ones(1, 2))
    (grad,) = torch.autograd.grad((low + 2 * high).sum(), tokens)
    assert grad[0, :, 0].tolist() == [3, 0, 0, 0]


def test_the_graph_keeps_indices_not_similarities():
    tokens, prototypes = _random(4, 64, 8), _random(32, 8, seed=1).requires_grad_()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (stored.append(t.numel()), t)[1], lambda t: t
    ):
        lowest_and_highest(tokens, prototypes)
    assert sorted(stored) == sorted([tokens.numel(), prototypes.numel(), 2 * 4 * 32])
    assert max(stored) < 4 * 64 * 32


def test_bf16_autocast_returns_float32_near_the_exact_values():
    tokens = torch.nn.functional.normalize(_random(2, 50, 64), dim=-1)
    prototypes = torch.nn.functional.normalize(_random(9, 64, seed=1), dim=-1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low, high = lowest_and_highest(tokens, prototypes)
    exact = lowest_and_highest(tokens, prototypes)
    assert low.dtype == high.dtype == torch.float32
    torch.testing.assert_close(low, exact[0], atol=5e-3, rtol=0)
    torch.testing.assert_close(high, exact[1], atol=5e-3, rtol=0)
    (low + high).sum().backward()
    assert prototypes.grad is not None
    assert prototypes.grad.dtype == torch.float32
