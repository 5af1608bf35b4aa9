"""``proto``: class-bound prototypes, their weights and the orthogonality loss."""

import pytest
import torch
from torch import nn

from bat.probes.base import build_probe
from bat.probes.proto import Proto
from bat.types import Features
from tests.reference import probes as slow

B, T, FREQ, D, C = 2, 4, 2, 16, 5


def _features() -> Features:
    g = torch.Generator().manual_seed(0)
    return Features(patches=torch.randn(1, B, T, FREQ, D, generator=g), cls=None)


def _probe(*, level: str = "clip", **head: object) -> Proto:
    torch.manual_seed(0)
    words = {"classes": C, "width": D, "depth": 3, "has_cls": True, "level": level}
    probe = build_probe("proto", **words, per_class=3, **head)
    assert isinstance(probe, Proto)
    return probe


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_class_bound_prototypes_equal_the_slow_form_with_every_gradient(level):
    features, probe = _features(), _probe(level=level).eval()
    nn.init.normal_(probe.raw_weights)
    nn.init.normal_(probe.bias)
    weights = (probe.prototypes, probe.class_weights, probe.bias)
    wanted = slow.proto(features.patches, *weights, level)
    logits = probe(features)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    scale = torch.randn_like(wanted)
    grads = [torch.autograd.grad((x * scale).sum(), probe.parameters()) for x in (logits, wanted)]
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
        assert right.abs().max() > 1e-3


def test_a_class_of_proto_sees_its_own_prototypes_with_weights_that_cannot_be_negative():
    probe = _probe(dropout=0.0)
    assert probe.prototypes.shape == (3 * C, D)
    assert probe.class_weights.tolist() == [[pytest.approx(1)] * 3] * C
    logits = probe(_features())
    own = torch.autograd.grad(logits[:, 1].sum(), probe.prototypes)[0].abs().sum(1) > 0
    assert own.nonzero().flatten().tolist() == [3, 4, 5]
    with torch.no_grad():
        probe.raw_weights.fill_(-30.0)
    assert (probe.class_weights >= 0).all()
    assert torch.autograd.grad(probe(_features()).sum(), probe.raw_weights)[0].any()  # not stuck


def test_orthogonality_joins_the_loss_of_proto_and_is_zero_of_orthogonal_prototypes():
    probe = _probe(orthogonality=0.5)
    wanted = slow.orthogonality(probe.prototypes, C)
    torch.testing.assert_close(probe.penalty(), wanted, atol=1e-5, rtol=1e-5)
    assert wanted > 0.01

    def zero(logits, targets):
        return (logits - targets).sum()

    nothing = torch.zeros(B, C)
    value = probe.training_loss(zero, nothing, nothing)
    torch.testing.assert_close(value, 0.5 * wanted)
    value.backward()
    assert probe.prototypes.grad.abs().max() > 1e-3
    with torch.no_grad():
        probe.prototypes.copy_(7 * torch.eye(D)[:3].repeat(C, 1))
    assert probe.penalty().item() == pytest.approx(0, abs=1e-6)
