"""Rates, parameter groups and layer-wise decay against golden section 7."""

import json

import pytest
import torch
from torch import nn

from bat.encoders.bat import BAT
from bat.nn.optim import adamw, param_groups, set_lr, warmup_cosine
from bat.probes.base import build_probe


@pytest.fixture(scope="module")
def schedules(golden):
    return json.loads((golden / "schedules.json").read_text())


SCHEDULES = ("ssl_yaml", "small", "small_constant", "no_warmup", "zero_decay_interval",
             "scaled_groups")  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_warmup_cosine__rates(schedules, name):
    case = schedules[f"lr_{name}"]
    for step, *rates in case["rows"]:
        for scale, rate in zip(case.get("scales", [1.0]), rates, strict=True):
            mine = warmup_cosine(
                step,
                lr=case["lr"],
                warmup_steps=case["warmup"],
                total_steps=case["total"],
                min_lr=case["min_lr"],
                hold_steps=case["constant"],
                scale=scale,
            )
            assert mine == pytest.approx(rate, abs=1e-12, rel=0), (step, scale)


def test_golden_param_groups__layer_decay_and_weight_decay(schedules):
    table = schedules["layer_decay_0.75_depth12"]

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = BAT(width=8, depth=12, heads=2)
            self.head = build_probe("linear", classes=3, width=8, depth=12, has_cls=True)

    model = Classifier()
    own = model.backbone.no_weight_decay()

    def layer_of(name):
        inner = name.removeprefix("backbone.")
        return model.backbone.layer_of(inner) if inner != name else 13

    groups = param_groups(
        model,
        weight_decay=table["weight_decay"],
        decay="matrices",
        no_decay={f"backbone.{n}" for n in own},
        layer_decay=table["layer_decay"],
        layer_of=layer_of,
        depth=12,
    )
    mine = {
        name.removeprefix("backbone.").replace("head.norm", "head.ln"): (
            group["scale"],
            group["weight_decay"],
        )
        for group in groups
        for name, _ in group["params"]
    }
    wanted = table["by_param"]
    assert set(mine) == set(wanted)
    for name, row in wanted.items():
        assert mine[name] == pytest.approx((row["lr_scale"], row["weight_decay"]), abs=1e-12), name


def test_golden_param_groups__weight_decay_of_probes(schedules):
    names = {
        "fc": "fc",
        "norm": "ln",
        "layer_logits": "block_attention",
        "prototypes": "prototype_vectors",
    }
    table = schedules["probing_weight_decay_by_param"]
    for theirs, name in (("linear", "linear"), ("linear_cgp", "lcgp"), ("cgp", "cgp"),
                         ("protobin", "protobin")):  # fmt: skip
        probe = build_probe(name, classes=3, width=8, depth=2, has_cls=True, prototypes=4)
        groups = param_groups(
            probe, weight_decay=0.05, decay="matrices", no_decay=probe.no_weight_decay()
        )
        mine = {
            "head." + n.replace(n.partition(".")[0], names[n.partition(".")[0]]): g["weight_decay"]
            for g in groups
            for n, _ in g["params"]
        }
        assert mine == table[theirs], name


def test_param_groups__pre_training_is_one_that_decays_without_frozen_parameters():
    model = BAT(width=8, depth=1, heads=2)
    model.cls_token.requires_grad_(False)
    (group,) = param_groups(model, weight_decay=0.05)
    assert (group["weight_decay"], group["scale"]) == (0.05, 1.0)
    assert [n for n, _ in model.named_parameters() if n != "cls_token"] == [
        n for n, _ in group["params"]
    ]


def test_set_lr__scales_every_group_and_is_a_function_of_the_step():
    layer = nn.Linear(2, 2)
    groups = [
        {"params": [("weight", layer.weight)], "weight_decay": 0.1, "scale": 1.0},
        {"params": [("bias", layer.bias)], "weight_decay": 0.0, "scale": 0.5},
    ]
    optimizer = adamw(groups, lr=1.0, betas=[0.8, 0.9], eps=1e-6)
    rate = set_lr(optimizer, 2, lr=1e-3, warmup_steps=4, total_steps=8, min_lr=1e-6)
    assert rate == pytest.approx(5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-4, 2.5e-4])
    set_lr(optimizer, 0, lr=1e-3, warmup_steps=4, total_steps=8, min_lr=1e-6)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-6, 5e-7])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    assert type(optimizer) is torch.optim.AdamW


def test_adamw__is_fused_on_the_cpu_and_steps_as_the_default_does() -> None:
    torch.manual_seed(0)
    ours, plain = (torch.nn.Linear(5, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    fused = adamw(param_groups(ours, weight_decay=0.1), lr=1e-2)
    default = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    assert all(group["fused"] for group in fused.param_groups)
    for step in range(3):
        for layer, optimizer in ((ours, fused), (plain, default)):
            optimizer.zero_grad()
            layer(torch.full((2, 5), float(step))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight, atol=1e-6, rtol=1e-5)
