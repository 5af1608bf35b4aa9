"""All probes and the loop that trains them side by side, on a GPU as on the CPU."""

import numpy as np
import pytest
import torch

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.encoders.bat import BAT
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank, to_device
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.nn.losses import LOSSES
from bat.probes.base import build_probe, expand
from bat.types import Features, Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

L, B, D, C = 3, 6, 32, 4
GRID = Grid(time=6, freq=8)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def encoder() -> BAT:
    torch.manual_seed(0)
    return BAT(width=D, depth=L, heads=4, grid=GRID).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features(encoder) -> Features:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return encoder.features(torch.rand(B, 1, 96, 128, generator=g), entry=True)


@pytest.mark.parametrize("name", expand(["all"], level="clip"))
def test_logits_and_gradients_are_the_cpu_s(name, encoder, features):
    results = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(2)
        probe = build_probe(
            name, classes=C, width=D, depth=L, has_cls=True, encoder=encoder.to(device),
            prototypes=40, dropout=0.0,
        ).to(device)  # fmt: skip
        logits = probe(to_device(features, device))
        logits.square().sum().backward()
        results.append((logits.detach().cpu(), {k: p.grad.cpu() for k, p in
                                                probe.named_parameters()}))  # fmt: skip
    encoder.to("cpu")
    (wanted, grads), (got, there) = results
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    for key, grad in grads.items():
        scale = float(grad.abs().max()) + 1e-6
        assert float((there[key] - grad).abs().max()) < 2e-2 * scale, key


def test_a_probing_side_by_side_in_bf16(features, encoder):
    n = 24
    bank = FeatureBank(
        patches=features.patches.transpose(0, 1).repeat(4, 1, 1, 1, 1).bfloat16().cuda(),
        cls=features.cls.transpose(0, 1).repeat(4, 1, 1).bfloat16().cuda(),
        targets=torch.eye(C)[torch.arange(n) % C],
        ids=np.arange(n),
        keys=[str(i) for i in range(n)],
        skipped={},
    )
    part = np.arange(n) % 3
    held = Split("0", *(np.flatnonzero(part == k) for k in range(3)))
    methods = expand(["all"], level="clip", encoder=False)
    plan = Plan(
        build=lambda m: build_probe(m, classes=C, width=D, depth=L, has_cls=True, prototypes=40),
        loss=LOSSES["ce"],
        optim=Optim(lr=1e-2, decay="matrices", warmup_steps=1),
        steps=6,
        batch=4,
        multi_label=False,
        seeds=2,
        protocol=Protocol(lrs=[1e-3, 1e-2], look_every=3),
        bootstrap=100,
        autocast=torch.bfloat16,
        device=CUDA,
    )
    fold_results = cross_validate(bank, [held], methods, plan)
    assert [(o.method, o.seed) for o in fold_results] == [(m, s) for m in methods for s in (0, 1)]
    assert not plan.diverged
