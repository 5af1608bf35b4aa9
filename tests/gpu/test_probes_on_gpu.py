"""Probes where only a GPU can show it: bf16, compiled by Inductor, memory."""

import pytest
import torch
import torch.nn.functional as F

from bat.probes.base import build_probe
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import mix_normalised
from bat.types import Features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(out: torch.Tensor, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    up = _random(*out.shape, seed=9).to(out)
    return torch.autograd.grad(out, given, up)


@pytest.mark.parametrize(("G", "M"), [(3, 512), (5, 130), (40, 8)])
def test_float32_pooling_equals_the_cpu(G: int, M: int) -> None:
    given = [x.requires_grad_() for x in (_random(G, M, 96), _random(300, 96, seed=1),
                                          _random(G, 96, seed=2))]  # fmt: skip
    there = [x.detach().cuda().requires_grad_() for x in given]
    for low, signs in ((True, False), (False, True)):
        words = (low, signs, torch.float32)
        expected = pool_prototypes(*given, low=low, signs=signs)
        got = pool_prototypes(*there, low=low, signs=signs)
        torch.testing.assert_close(got.cpu(), expected, atol=2e-5, rtol=1e-4)

        # near ties may pick another token: each pick attains its value, and gradients are
        # compared at the GPU's own picks
        _, picks = torch.ops.bat.pool_prototypes(*there, *words)
        p = torch.where(given[1] >= 0, 1.0, -1.0) if signs else given[1]
        exact = given[0].double() @ F.normalize(p.double(), dim=-1).T  # (G, M, K)
        for e, column in enumerate([0, -1] if low else [-1]):
            at = picks[:, e].cpu().T.long()  # (G, K)
            attained = exact.gather(1, at[:, None]).squeeze(1)
            torch.testing.assert_close(
                attained.float(), expected[..., column], atol=2e-5, rtol=1e-4
            )
        up = _random(*got.shape, seed=9)
        on_cpu = torch.ops.bat.pool_prototypes_backward(
            up, *(x.detach() for x in given), picks.cpu(), *words[1:], [True] * 3
        )
        for a, b in zip(_gradients(got, there), on_cpu, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=2e-4, rtol=1e-3)


def test_bf16_pooling_is_near_float32() -> None:
    tokens = F.normalize(_random(4, 512, 768), dim=-1).cuda()
    prototypes = _random(1000, 768, seed=1).cuda()
    exact = pool_prototypes(tokens, prototypes)
    with torch.autocast("cuda", torch.bfloat16):
        rough = pool_prototypes(tokens, prototypes)
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) < 2e-3
    assert not torch.equal(rough, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_equals_the_cpu(dtype: torch.dtype) -> None:
    layers = _random(12, 3, 16, 8, 768).to(dtype)
    gate = torch.rand(12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    on_gpu = gate.detach().cuda().requires_grad_()
    expected = mix_normalised(layers, gate)
    got = mix_normalised(layers.cuda(), on_gpu)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)
    (a,), (b,) = _gradients(got, [on_gpu]), _gradients(expected, [gate])
    torch.testing.assert_close(a.cpu(), b, atol=1e-3, rtol=1e-3)


def test_strided_input_pools_as_contiguous() -> None:
    tokens = _random(3, 130, 192).cuda()[..., :96]
    prototypes = _random(96, 300, seed=1).cuda().T
    expected = pool_prototypes(tokens.contiguous(), prototypes.contiguous())
    got = pool_prototypes(tokens, prototypes)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_backward_never_waits_for_the_gpu() -> None:
    given = [x.cuda().requires_grad_() for x in (_random(3, 130, 96), _random(300, 96, seed=1),
                                                 _random(3, 96, seed=2))]  # fmt: skip
    out = pool_prototypes(*given)
    up = _random(*out.shape, seed=9).cuda()
    torch.autograd.grad(out, given, up, retain_graph=True)  # libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(out, given, up)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _probe() -> tuple[torch.nn.Module, Features]:
    torch.manual_seed(0)
    probe = build_probe(
        "cgp", classes=50, width=768, depth=12, has_cls=True, prototypes=2000, dropout=0.0,
    )  # fmt: skip
    patches = _random(12, 4, 64, 8, 768).bfloat16()
    features = Features(patches=patches.cuda(), cls=_random(12, 4, 768, seed=1).bfloat16().cuda())
    return probe.cuda(), features


def test_compiled_cgp_equals_itself_and_repeats_bit_for_bit() -> None:
    probe, features = _probe()
    compiled = torch.compile(probe, fullgraph=True)
    results = []
    for call in (probe, probe, compiled):
        probe.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = call(features)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(p.grad.clone() for p in probe.parameters())])
    for first, again, whole in zip(*results, strict=True):
        assert torch.equal(first, again)
        assert float((whole - first).norm()) <= 0.03 * float(first.norm())


def test_no_similarity_tensor_in_gpu_memory() -> None:
    G, M, D, K = 32, 512, 768, 10_000
    given = [_random(G, M, D), _random(K, D, seed=1)]
    there = [x.cuda().requires_grad_() for x in given]

    def call() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = pool_prototypes(*there)
        _gradients(out, there)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    similarities = 2 * G * M * K  # bytes in bf16: 328 MB
    assert peak - 4 * (G * M * D + K * D) < similarities  # both gradients aside
