"""Attention received per token: against plain softmax, with a planted sink, in bounded memory."""

import pytest
import torch
from torch import Tensor

from bat.nn import sinks
from bat.nn.attention import Attention
from bat.nn.sinks import received, sink_share

B, N, D, H = 3, 11, 16, 4


def module(*, gate: bool = True) -> Attention:
    torch.manual_seed(0)
    return Attention(D, H, gate=gate)


def tokens() -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1))


def slow(attention: Attention, x: Tensor) -> Tensor:
    """One query, head and clip at a time."""
    found = torch.zeros(len(x), H, x.shape[1])
    d = D // H
    qkv = attention.qkv(x)  # (B, n, 3 D)
    for b in range(len(x)):
        for h in range(H):
            keys = qkv[b, :, D + h * d : D + (h + 1) * d]
            for query in qkv[b, :, h * d : (h + 1) * d]:
                found[b, h] += (keys @ query / d**0.5).softmax(0) / x.shape[1]
    return found


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("weights", [1, 3 * H * N, 2**22])
def test_received__is_the_mean_of_the_weights_however_few_exist_at_a_time(
    gate: bool, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "WEIGHTS", weights)
    attention, x = module(gate=gate), tokens()
    found = received(attention, x)
    assert found.shape == (B, H, N)
    assert not found.requires_grad
    torch.testing.assert_close(found, slow(attention, x).detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(B, H))
    assert torch.equal(sink_share(attention, x), found.amax(-1))


def test_sink_share__a_token_with_one_heads_key_is_that_heads_sink() -> None:
    attention, d = module(), D // H
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        attention.qkv.bias[2 * d : 3 * d] = 1.0  # all queries of head 2 are alike
        attention.qkv.weight[D + 2 * d : D + 3 * d, 0] = 10.0  # its keys: channel 0
    x = torch.zeros(1, N, D)
    x[0, 5, 0] = 1.0
    share = sink_share(attention, x)[0]
    assert share[2] == pytest.approx(1, abs=1e-4)
    assert received(attention, x)[0, 2].argmax() == 5
    torch.testing.assert_close(share[[0, 1, 3]], torch.full((3,), 1 / N))


def test_received__is_float32_under_autocast() -> None:
    attention, x = module(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        rough = received(attention, x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.sum(-1), torch.ones(B, H))
    torch.testing.assert_close(rough, received(attention, x), atol=5e-3, rtol=0.02)
