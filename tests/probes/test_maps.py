"""Evidence maps: they add up to the logit, and a planted patch is where they say it is."""

from typing import Any

import pytest
import torch

from bat.errors import UserError
from bat.probes.base import Probe, build_probe
from bat.probes.maps import Evidence, evidence
from bat.types import Features

L, B, T, FREQ, D, C, K = 3, 4, 5, 2, 16, 3, 12
NAMES = ["cgp", "protobin", "protofloat", "proto"]


def features() -> Features:
    g = torch.Generator().manual_seed(0)
    return Features(
        patches=torch.randn(L, B, T, FREQ, D, generator=g),
        cls=torch.randn(L, B, D, generator=g),
    )


def probe_of(name: str, *, level: str = "clip", has_cls: bool = True) -> Probe:
    torch.manual_seed(1)
    size: dict[str, Any] = {"classes": C, "width": D, "depth": L}
    head = {"prototypes": K, "per_class": 4 if name == "proto" else None}
    probe = build_probe(name, **size, has_cls=has_cls, level=level, **head).eval()
    if name == "proto":
        torch.nn.init.normal_(probe.raw_weights)
        torch.nn.init.normal_(probe.bias)
    return probe


def elsewhere(probe: Probe, of: Features, class_id: int) -> torch.Tensor:
    """What the logit holds besides the patches' picks: (B,), or (B, T) at frame level."""
    if not hasattr(probe, "layer_logits"):
        bias = probe.bias if hasattr(probe, "bias") else probe.fc.bias
        return bias[class_id].expand(B)
    gate = probe.layer_logits.softmax(0)

    def mixed(layers: torch.Tensor) -> torch.Tensor:
        layers = torch.nn.functional.normalize(layers, dim=-1)
        return (gate.view(-1, *[1] * (layers.ndim - 1)) * layers).sum(0)

    if probe.level == "frame":
        middle = mixed(of.patches).mean((1, 2))
    elif probe.has_cls:
        middle = mixed(of.cls)
    else:
        middle = mixed(of.patches).mean((1, 2))
    similarity = middle @ torch.nn.functional.normalize(probe.prototypes, dim=-1).T  # (B, K)
    return similarity @ probe.fc.weight[class_id, 1::3] + probe.fc.bias[class_id]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("level", "has_cls"), [("clip", True), ("clip", False), ("frame", True)])
@torch.no_grad()
def test_all_prototypes_together_make_the_logit(name: str, level: str, has_cls: bool) -> None:
    probe, of = probe_of(name, level=level, has_cls=has_cls), features()
    logits = probe(of).mean(1) if level == "frame" else probe(of)
    for class_id in range(C):
        found = evidence(probe, of, class_id, top=1000)
        assert found.map.shape == (B, T, FREQ)
        total = found.map.sum((1, 2)) + elsewhere(probe, of, class_id)
        torch.testing.assert_close(total, logits[:, class_id], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.contribution.sum(1), found.map.sum((1, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_s_map_does_not_hang_on_its_companions(name: str) -> None:
    probe, of = probe_of(name), features()
    one = Features(of.patches[:, 2:3], of.cls[:, 2:3])
    together, alone = evidence(probe, of, 1, top=3), evidence(probe, one, 1, top=3)
    assert torch.equal(together.prototypes[2:3], alone.prototypes)
    assert torch.equal(together.patches[2:3], alone.patches)
    torch.testing.assert_close(together.map[2:3], alone.map)


def planted(name: str, *, level: str = "clip") -> tuple[Probe, Features]:
    """Clips whose patch (3, 1) is the direction of one prototype, which class 2 listens to; where
    the lowest counts, patch (1, 0) is the opposite of another one."""
    probe, of = probe_of(name, level=level), features()
    with torch.no_grad():
        one, other = (9, 8) if name == "proto" else (5, 7)  # of class 2 where they belong to one
        direction = probe.prototypes[one]
        if name == "protobin":
            direction = torch.where(direction >= 0, 1.0, -1.0)
        of.patches[:, :, 3, 1] = 40 * direction
        if name == "proto":
            probe.raw_weights.fill_(-8)
            probe.raw_weights[2, one - 8] = 5
        else:
            probe.fc.weight.fill_(0)
            probe.fc.weight[2, 3 * one + 2 if name == "cgp" else one] = 5
        if name == "cgp":
            of.patches[:, :, 1, 0] = -40 * probe.prototypes[other]
            probe.fc.weight[2, 3 * other] = -3
    return probe, of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_the_map_s_maximum_is_the_planted_patch(name: str, level: str) -> None:
    probe, of = planted(name, level=level)
    found = evidence(probe, of, 2, top=2)
    at = 3 * FREQ + 1
    assert found.map.flatten(1).argmax(1).tolist() == [at] * B
    first = {"proto": 9}.get(name, 5)
    assert found.prototypes[:, 0].tolist() == [first] * B
    assert (found.patches[:, 0, -1] == at).any(-1).all()
    if level == "clip":
        torch.testing.assert_close(found.map[:, 3, 1], torch.full((B,), 5.0), atol=0.05, rtol=0)
        if name == "cgp":  # -3 times a similarity of -1: it speaks for the class, too
            assert found.prototypes[:, 1].tolist() == [7] * B
            assert found.patches[:, 1, 0, 0].tolist() == [1 * FREQ + 0] * B
            torch.testing.assert_close(found.map[:, 1, 0], torch.full((B,), 3.0), atol=0.05, rtol=0)
    else:
        assert found.patches.shape == (B, 2, 2 if name == "cgp" else 1, T)
        torch.testing.assert_close(found.map[:, 3, 1], torch.full((B,), 5 / T), atol=0.05, rtol=0)


def test_the_strongest_prototypes_are_those_that_add_most() -> None:
    probe, of = probe_of("protofloat"), features()
    every: Evidence = evidence(probe, of, 0, top=K)
    some = evidence(probe, of, 0, top=4)
    assert every.contribution.diff(dim=1).max() <= 0
    assert torch.equal(some.prototypes, every.prototypes[:, :4])
    assert (every.contribution < 0).any()
    assert not torch.equal(some.map, every.map)


def test_a_probe_without_prototypes_is_named() -> None:
    with pytest.raises(UserError, match=r"Linear has no prototypes.*cgp, proto, protobin, protofl"):
        evidence(probe_of("linear"), features(), 0)
