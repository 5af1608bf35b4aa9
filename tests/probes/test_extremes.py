"""Prototype pooling against the stored similarities, as an operator, and what it must not store."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from bat.probes import extremes
from bat.probes.extremes import pool_prototypes
from tests.reference.probes import pooled

CASES = [  # middle, low, signs
    (True, True, False),
    (False, True, False),
    (False, False, True),
    (True, False, False),
]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _given(G: int, M: int, D: int, K: int, *, middle: bool) -> list[torch.Tensor | None]:
    shapes = [(G, M, D), (K, D), (G, D)]
    given = [_random(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    return given if middle else [*given[:2], None]


def _gradients(out: torch.Tensor, given: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    up = _random(*out.shape, seed=9).to(out.dtype)
    return torch.autograd.grad(out, [x for x in given if x is not None], up)


@pytest.mark.parametrize("block", [1, 200, 2**21])
@pytest.mark.parametrize("M", [5, 40])  # below and above DENSE_TOKENS
@pytest.mark.parametrize(("middle", "low", "signs"), CASES)
def test_values_and_gradients_equal_the_stored_similarities(
    monkeypatch, block, M, middle, low, signs
):
    monkeypatch.setattr(extremes, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(extremes, "CPU_ROWS", 4)
    assert (M <= extremes.DENSE_TOKENS) == (M == 5)
    given = _given(3, M, 8, 7, middle=middle)
    fast = pool_prototypes(*given, low=low, signs=signs)
    slow = pooled(*given, low=low, signs=signs)
    assert fast.shape == (3, 7, 1 + low + middle)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(_gradients(fast, given), _gradients(slow, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("M", [4, 33])
@pytest.mark.parametrize(("middle", "low"), [(True, True), (False, False)])
def test_gradcheck_in_float64(M, middle, low):
    given = [
        None if x is None else x.detach().double().requires_grad_()
        for x in _given(2, M, 5, 3, middle=middle)
    ]
    assert torch.autograd.gradcheck(lambda *x: pool_prototypes(*x, low=low), given)


@pytest.mark.parametrize("M", [6, 40])
def test_the_operator_keeps_pytorch_s_contract(M):
    tokens, prototypes, middle = _given(2, M, 8, 9, middle=True)
    for centre, low, signs in ((middle, True, False), (None, False, True)):
        words = (centre, low, signs, torch.float32)
        torch.library.opcheck(torch.ops.bat.pool_prototypes, (tokens, prototypes, *words))


@pytest.mark.parametrize(
    ("G", "M", "dtype", "centred", "wanted"),
    [  # of one group, grad's own layout is already the table's
        (1, 6, torch.float32, True, [True, True, True]),
        (2, 40, torch.float32, True, [False, True, False]),
        (1, 40, torch.bfloat16, True, [False, False, True]),
        (2, 6, torch.bfloat16, True, [True, False, False]),
        (1, 40, torch.float32, False, [True, True, False]),
        (2, 6, torch.float32, False, [True, False, False]),
    ],
)
def test_the_backward_operator_keeps_pytorch_s_contract(G, M, dtype, centred, wanted):
    tokens, prototypes, middle = (x.detach() for x in _given(G, M, 8, 9, middle=True))
    given = (tokens.to(dtype), prototypes, middle.to(dtype) if centred else None)
    words = (False, torch.float32)
    out, picks = torch.ops.bat.pool_prototypes(*given, True, *words)
    up = _random(*out.shape, seed=9)
    torch.library.opcheck(
        torch.ops.bat.pool_prototypes_backward, (up, *given, picks, *words, wanted)
    )


@pytest.mark.parametrize("M", [6, 40])
@pytest.mark.parametrize("G", [1, 3])
def test_backward_leaves_the_incoming_gradient_as_it_is(G, M):
    given = _given(G, M, 8, 9, middle=True)
    out = pool_prototypes(*given)
    up = _random(*out.shape, seed=9)
    kept = up.clone()
    first, second = (torch.autograd.grad(out, given, up, retain_graph=True) for _ in range(2))
    assert torch.equal(up, kept)
    theirs = torch.autograd.grad(pooled(*given), given, kept)
    for a, b, c in zip(first, second, theirs, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("M", [6, 40])
def test_backward_inside_autocast_equals_backward_outside(M):
    given = _given(2, M, 64, 9, middle=True)
    out = pool_prototypes(*given)
    up = _random(*out.shape, seed=9)
    outside = torch.autograd.grad(out, given, up, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, given, up)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("M", [6, 40])
def test_a_gradient_that_nobody_wants_is_not_made(M):
    tokens, prototypes, middle = _given(2, M, 8, 9, middle=True)
    whole = _gradients(pool_prototypes(tokens, prototypes, middle), [tokens, prototypes, middle])
    for wanted in range(3):
        given = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(
            (tokens, prototypes, middle))]  # fmt: skip
        (alone,) = _gradients(pool_prototypes(*given), [given[wanted]])
        assert torch.equal(alone, whole[wanted])


@pytest.mark.parametrize("M", [4, 40])
def test_exact_ties_give_the_first_token_the_gradient(M):
    tokens = torch.ones(1, M, 2, requires_grad=True)
    out = pool_prototypes(tokens, torch.tensor([[0.6, 0.8]]))  # (1, 1, 2)
    (grad,) = torch.autograd.grad((out[..., 0] + 2 * out[..., 1]).sum(), tokens)
    torch.testing.assert_close(grad[0, 0], torch.tensor([1.8, 2.4]))
    assert not grad[0, 1:].any()


def test_scale_of_a_prototype_does_not_matter_and_zero_is_harmless():
    tokens, prototypes = _random(2, 40, 8), _random(5, 8, seed=1)
    wanted = pool_prototypes(tokens, prototypes)
    torch.testing.assert_close(pool_prototypes(tokens, 1000 * prototypes), wanted)
    prototypes[2] = 0
    prototypes.requires_grad_()
    out = pool_prototypes(tokens, prototypes)
    assert not out[:, 2].any()
    out.sum().backward()
    assert prototypes.grad.isfinite().all()


def test_the_graph_keeps_indices_not_similarities():
    G, M, K = 4, 64, 32
    tokens, prototypes = _random(G, M, 8), _random(K, 8, seed=1).requires_grad_()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (stored.append(t.numel()), t)[1], lambda t: t
    ):
        pool_prototypes(tokens, prototypes)
    assert sorted(stored) == sorted([tokens.numel(), prototypes.numel(), 2 * G * K])


def _largest_and_peak(call) -> tuple[int, int]:
    """Bytes of the largest single allocation of ``call()`` and of its peak, on the CPU."""
    with profile(profile_memory=True) as seen:
        call()
    results = seen.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return max(e.nbytes() for e in events), peak


@pytest.mark.parametrize("M", [32, 128])  # dense and sparse sums
def test_no_similarity_tensor_ever_exists(monkeypatch, M):
    G, K, D = 512 // M, 2000, 32
    block = 2**14
    monkeypatch.setattr(extremes, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(extremes, "DENSE_TOKENS", 32)
    given = _given(G, M, D, K, middle=True)
    up = torch.ones(G, K, 3)

    def ours():
        return torch.autograd.grad(pool_prototypes(*given), given, up)

    def stored():
        return torch.autograd.grad(pooled(*given), given, up)

    whole = 4 * G * M * K  # bytes of all similarities
    largest, peak = _largest_and_peak(stored)
    assert largest >= whole
    ours_largest, ours_peak = _largest_and_peak(ours)
    assert ours_largest < whole / 4
    assert ours_peak < peak / 4


def test_bf16_autocast_returns_float32_near_the_exact_values():
    tokens = F.normalize(_random(2, 50, 64), dim=-1)
    prototypes = _random(9, 64, seed=1).requires_grad_()
    middle = tokens.mean(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = pool_prototypes(tokens, prototypes, middle)
    exact = pool_prototypes(tokens, prototypes, middle)
    assert out.dtype == torch.float32
    assert not torch.equal(out, exact)  # the product did run in bf16
    torch.testing.assert_close(out, exact, atol=5e-3, rtol=0)
    out.sum().backward()
    assert prototypes.grad.dtype == torch.float32


def test_float32_tokens_stay_float32_where_autocast_is_off_inside():
    tokens, prototypes = _random(2, 50, 64), _random(9, 64, seed=1)
    exact = torch.ops.bat.pool_prototypes(tokens, prototypes, None, True, False, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.ops.bat.pool_prototypes(
            tokens, prototypes, None, True, False, torch.float32
        )[0]
    assert torch.equal(inside, exact)
