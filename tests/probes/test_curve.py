"""The layer curve: each block is trained as ``linear`` alone would be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bat.nn.losses import against, cross_entropy
from bat.nn.optim import adamw, param_groups
from bat.probes.base import Probe, build_probe, known_probes
from bat.probes.curve import LinearCurve
from bat.types import Features, Needs

L, B, T, FREQ, D, C = 3, 6, 4, 2, 16, 5
NAME = "bat.probes.curve.LinearCurve"


def features(seed: int = 0) -> Features:
    g = torch.Generator().manual_seed(seed)
    return Features(
        patches=torch.randn(L, B, T, FREQ, D, generator=g) + 1,
        cls=3 * torch.randn(L, B, D, generator=g),
    )


def only(block: int, whole: Features) -> Features:
    """An encoder that ends after ``block``."""
    assert whole.cls is not None
    return Features(whole.patches[: block + 1], whole.cls[: block + 1])


def clip_or_frame(logits: Tensor, targets: Tensor) -> Tensor:
    return against(cross_entropy, logits, targets)


def train(probe: Probe, see: Callable[[Features], Features], targets: Tensor) -> Tensor:
    """Five steps with weight decay and dropout; the logits after them, in eval mode."""
    groups = param_groups(
        probe, weight_decay=0.3, decay="matrices", no_decay=probe.no_weight_decay()
    )
    optimizer = adamw(groups, lr=1e-2)
    for step in range(5):
        torch.manual_seed(step)
        logits = probe.train()(see(features(step)))
        optimizer.zero_grad()
        probe.training_loss(clip_or_frame, logits, targets).backward()
        optimizer.step()
    with torch.no_grad():
        return probe.eval()(see(features(9)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("level", "has_cls"), [("clip", True), ("clip", False), ("frame", True)])
def test_each_block_is_trained_as_linear_alone(level: str, has_cls: bool, norm: bool) -> None:
    head = {"classes": C, "width": D, "depth": L, "has_cls": has_cls, "level": level, "norm": norm}
    targets = torch.eye(C)[torch.arange(B) % C]
    torch.manual_seed(3)
    curve = build_probe(NAME, **head)
    assert isinstance(curve, LinearCurve)
    start = {name: value.clone() for name, value in curve.state_dict().items()}
    names = {"scale": "norm.weight", "shift": "norm.bias", "weight": "fc.weight", "bias": "fc.bias"}
    needs = LinearCurve.needs(has_cls=has_cls, level=level)
    depth = needs.blocks(L)
    found = train(curve, lambda f: Features(f.patches[L - depth :], f.cls), targets)
    answers = curve.answers(found)
    assert list(answers) == ["@1", "@2", "@3"]
    for block in range(L):
        alone = build_probe("linear", **{**head, "depth": block + 1})
        alone.load_state_dict({names[n]: value[block] for n, value in start.items()})
        wanted = train(alone, lambda f, block=block: only(block, f), targets)
        assert wanted.shape == ((B, C) if level == "clip" else (B, T, C))
        torch.testing.assert_close(answers[f"@{block + 1}"], wanted, atol=2e-5, rtol=1e-4)
        for n, value in alone.state_dict().items():
            own = next(key for key, name in names.items() if name == n)
            torch.testing.assert_close(curve.state_dict()[own][block], value, atol=2e-5, rtol=1e-4)


def test_class_tokens_are_enough_where_there_are_any() -> None:
    assert LinearCurve.needs(has_cls=True, level="clip") == Needs("none")
    assert LinearCurve.needs(has_cls=False, level="clip") == Needs("all")
    assert LinearCurve.needs(has_cls=True, level="frame") == Needs("all")
    curve = LinearCurve(classes=C, width=D, depth=L, has_cls=True)
    whole = features()
    assert torch.equal(curve.eval()(whole), curve(Features(whole.patches[:0], whole.cls)))


def test_size_at_base_and_no_place_in_the_table_of_probes() -> None:
    with torch.device("meta"):
        curve = LinearCurve(classes=527, width=768, depth=12, has_cls=True)
    assert sum(p.numel() for p in curve.parameters()) == 4_881_588
    assert LinearCurve not in known_probes().values()


def test_bf16_features_under_autocast_stay_near_float32() -> None:
    curve = LinearCurve(classes=C, width=D, depth=L, has_cls=True).eval()
    exact = features()
    assert exact.cls is not None
    with torch.autocast("cpu", torch.bfloat16):
        out = curve(Features(exact.patches.bfloat16(), exact.cls.bfloat16()))
    torch.testing.assert_close(out.float(), curve(exact), atol=0.05, rtol=0.05)
