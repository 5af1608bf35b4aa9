"""The probes that pool patches by attention: each equals its slow form, with every gradient."""

import pytest
import torch

from bat.errors import UserError
from bat.probes.base import Probe, build_probe
from bat.types import Features
from tests.reference import probes as slow

L, B, T, FREQ, D, C = 2, 3, 4, 3, 12, 5


def _probe(name: str, **head: object) -> Probe:
    torch.manual_seed(0)
    settings = {"attention_heads": 3, "pool_queries": 4, **head}
    probe = build_probe(name, classes=C, width=D, depth=L, has_cls=True, **settings)
    for parameter in probe.parameters():  # far from the start, where all scores are near 0
        torch.nn.init.normal_(parameter)
    return probe.double().eval()


def _pooled(name: str, probe: Probe, tokens: torch.Tensor) -> torch.Tensor:
    if name == "mhca":
        return slow.mhca(tokens, probe.query, probe.keys.weight, probe.values.weight, 3)
    if name == "ep":
        return slow.ep(tokens, probe.queries, probe.values.weight)
    if name == "simpool":
        return slow.simpool(tokens, probe.norm.weight, probe.norm.bias)
    layers = (probe.hidden, probe.score)
    return slow.abmilp(tokens, *(x for layer in layers for x in (layer.weight, layer.bias)))


@pytest.mark.parametrize("name", ["mhca", "ep", "simpool", "abmilp"])
def test_equals_the_slow_form_with_every_gradient(name):
    torch.manual_seed(1)
    patches = torch.randn(L, B, T, FREQ, D, dtype=torch.float64)
    probe, weight = _probe(name), torch.randn(B, C, dtype=torch.float64)
    pooled = torch.stack([_pooled(name, probe, clip.flatten(0, 1)) for clip in patches[-1]])
    wanted = pooled @ probe.fc.weight.T + (0 if probe.fc.bias is None else probe.fc.bias)
    logits = probe(Features(patches=patches, cls=None))
    torch.testing.assert_close(logits, wanted)
    grads = [
        torch.autograd.grad((out * weight).sum(), list(probe.parameters()))
        for out in (logits, wanted)
    ]
    for (own, _), got, right in zip(probe.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(got, right, atol=1e-10, rtol=1e-7, msg=own)
        assert right.abs().max() > 1e-3 or own == "score.bias"


def test_outputs_have_a_bias_where_the_definition_has_one():
    biased = {n: _probe(n).fc.bias is not None for n in ("mhca", "ep", "simpool", "abmilp")}
    assert biased == {"mhca": False, "ep": True, "simpool": True, "abmilp": False}


def test_heads_follow_the_width_and_must_divide_it():
    def heads(width, **head):
        return build_probe("mhca", classes=C, width=width, depth=1, has_cls=True, **head).heads

    assert [heads(w) for w in (768, 1024, 192, 64, 16)] == [12, 16, 3, 1, 1]
    with pytest.raises(UserError, match=r"5 attention heads do not divide .* width 64.*head\.atte"):
        heads(64, attention_heads=5)


def test_ep_rounds_its_values_up_to_whole_chunks():
    probe = build_probe("ep", classes=C, width=D, depth=L, has_cls=True, pool_queries=5)
    assert probe.values.weight.shape == (15, D)
    assert probe(Features(patches=torch.randn(L, B, T, FREQ, D), cls=None)).shape == (B, C)


@pytest.mark.parametrize("name", ["mhca", "ep", "simpool", "abmilp"])
def test_frame_level_is_an_error_that_lists_the_others(name):
    with pytest.raises(UserError, match=rf"probe {name} is not defined at frame level.*cgp.*mlp"):
        build_probe(name, classes=C, width=D, depth=L, has_cls=True, level="frame")
