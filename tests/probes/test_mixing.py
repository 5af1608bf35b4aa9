"""Mixing of normalised blocks against its equation; as an operator; what it must not store."""

import pytest
import torch
from torch.autograd.profiler import profile

from bat.probes import mixing
from bat.probes.mixing import mix_normalised
from tests.reference.probes import mixed

L, B, T, FREQ, D = 3, 2, 4, 3, 5


def _layers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _reference(layers: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    flat = layers.flatten(1, -2)
    rows = [mixed(flat[:, i], gate) for i in range(flat.shape[1])]
    return torch.stack(rows).view(layers.shape[1:])


@pytest.mark.parametrize("shape", [(L, B, T, FREQ, D), (L, B, D)])
@pytest.mark.parametrize("piece", [1, 5, 512])
def test_values_and_gradients_equal_the_equation(monkeypatch, shape, piece):
    monkeypatch.setattr(mixing, "CPU_ELEMENTS", piece * D)
    layers = _layers(*shape).requires_grad_()
    gate = torch.tensor([0.5, -0.2, 0.7], requires_grad=True)
    up = _layers(*shape[1:], seed=1)
    results = []
    for mix in (mix_normalised, _reference):
        out = mix(layers, gate)
        results.append((out, *torch.autograd.grad(out, (layers, gate), up)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (0, 1, 4, 2, 3), (1, 0, 4, 3, 2)])
def test_any_layout_in_memory_gives_the_same(order):
    layers = _layers(L, B, T, FREQ, D)
    strided = layers.permute(order).contiguous().permute([order.index(i) for i in range(5)])
    assert not strided.is_contiguous()
    gate = torch.tensor([0.5, 0.2, 0.3])
    torch.testing.assert_close(mix_normalised(strided, gate), mix_normalised(layers, gate))


def test_gradcheck_in_float64():
    layers = _layers(L, B, 2, 2, D).double().requires_grad_()
    gate = torch.tensor([0.5, -0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mix_normalised, (layers, gate))


def test_the_operator_keeps_pytorch_s_contract():
    gate = torch.rand(L, requires_grad=True)
    for rows in (_layers(L, B, 4, D), _layers(L, B, 4, D).requires_grad_()):
        torch.library.opcheck(torch.ops.bat.mix_normalised, (rows, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_operator_keeps_pytorch_s_contract(dtype):
    rows, gate, up = _layers(L, B, 4, D).to(dtype), torch.rand(L), _layers(B, 4, D, seed=1)
    _, norms = torch.ops.bat.mix_normalised(rows, gate)
    for wanted in (True, False):
        given = (up, rows, gate, norms, wanted)
        torch.library.opcheck(torch.ops.bat.mix_normalised_backward, given)


def test_backward_inside_autocast_equals_backward_outside():
    layers = _layers(L, B, T, FREQ, 64).requires_grad_()
    gate = torch.tensor([0.5, -0.2, 0.7], requires_grad=True)
    out = mix_normalised(layers, gate)
    up = _layers(*out.shape, seed=1)
    outside = torch.autograd.grad(out, (layers, gate), up, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, (layers, gate), up)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_bf16_blocks_are_summed_in_float32():
    layers = _layers(L, B, T, FREQ, 64).bfloat16()
    gate = torch.tensor([0.5, 0.2, 0.3], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = mix_normalised(layers, gate)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, mix_normalised(layers.float(), gate))
    out.sum().backward()
    assert gate.grad.dtype == torch.float32


def test_a_token_of_zeros_stays_zero():
    layers = _layers(L, B, T, FREQ, D)
    layers[:, 0, 0, 0] = 0
    gate = torch.full((L,), 1 / L, requires_grad=True)
    out = mix_normalised(layers, gate)
    assert not out[0, 0, 0].any()
    out.sum().backward()
    assert gate.grad.isfinite().all()


def test_no_stack_of_blocks_is_stored_or_made():
    layers = _layers(6, 4, 128, 2, 16).bfloat16()
    gate = torch.full((6,), 1 / 6, requires_grad=True)
    stored = set()
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (stored.add((t.data_ptr(), t.numel())), t)[1], lambda t: t
        ),
        profile(profile_memory=True) as seen,
    ):
        mix_normalised(layers, gate).sum().backward()
    own = layers.untyped_storage()
    inside = range(own.data_ptr(), own.data_ptr() + own.nbytes())
    assert sum(size for at, size in stored if at not in inside) < layers[0].numel()
    allocated = [e.nbytes() for e in seen.kineto_results.events() if e.name() == "[memory]"]
    assert 4 * layers[0].numel() <= max(allocated) < 2 * 4 * layers[0].numel()
