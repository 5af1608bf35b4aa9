"""What a candidate is trained with is what its grid says: decay, prototypes' rates, warm-up, and
what a probe adds to the loss."""

import numpy as np
import pytest
import torch
from torch import nn

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank
from bat.eval.search import cross_validate
from bat.eval.splits import Round
from bat.nn.losses import LOSSES
from bat.probes.base import build_probe

n, L, T, FREQ, D, C = 24, 2, 2, 2, 8, 3
HELD = Round("0", np.arange(12), np.arange(12, 18), np.arange(18, 24))


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    g = torch.Generator().manual_seed(0)
    return FeatureBank(
        patches=torch.randn(n, L, T, FREQ, D, generator=g),
        cls=torch.randn(n, L, D, generator=g),
        targets=torch.eye(C)[torch.arange(n) % C],
        ids=np.arange(n),
        keys=[str(i) for i in range(n)],
        skipped={},
    )


def _run(bank, method, *, protocol=None, head=None, **words):
    """The trained probe and its outcome."""
    found: list[nn.Module] = []
    words = {"steps": 4, "optim": Optim(lr=0.01, decay="matrices", warmup_steps=0), **words}
    plan = Plan(
        build=lambda m: build_probe(
            m, classes=C, width=D, depth=L, has_cls=True, prototypes=6, dropout=0.0, **(head or {})
        ),
        loss=LOSSES["ce"],
        batch=6,
        multi_label=False,
        protocol=protocol,
        on_probe=lambda probe, own: found.append(probe),
        **words,
    )
    (outcome,) = cross_validate(bank, [HELD], [method], plan)
    return found[0], outcome


def _one(**words) -> Protocol:
    return Protocol(**{"lrs": [0.01], **words})


def test_a_candidate_s_weight_decay_is_trained_with(bank):
    weak, first = _run(bank, "linear", protocol=_one(weight_decays=[1e-6]))
    strong, second = _run(bank, "linear", protocol=_one(weight_decays=[30.0]))
    assert (first.chosen["weight_decay"], second.chosen["weight_decay"]) == (1e-6, 30.0)
    assert strong.fc.weight.norm() < 0.5 * weak.fc.weight.norm()


def test_probes_with_prototypes_have_rates_of_their_own(bank):
    protocol = Protocol(lrs=[0.25], prototype_lrs=[0.125])
    for method, rate in (("linear", 0.25), ("lcgp", 0.25), ("cgp", 0.125), ("proto", 0.125),
                         ("protobin", 0.125), ("protofloat", 0.125)):  # fmt: skip
        assert _run(bank, method, protocol=protocol)[1].chosen["lr"] == rate, method


def test_epochs_warm_up_for_a_tenth_of_their_steps(bank):
    """12 clips in batches of 6, 10 epochs: 20 steps, 2 of warm-up, though 400 are set."""
    optim = Optim(lr=0.01, decay="matrices", warmup_steps=400)
    short = Optim(lr=0.01, decay="matrices", warmup_steps=2)
    epochs, _ = _run(bank, "linear", optim=optim, epochs=10.0)
    steps, _ = _run(bank, "linear", optim=short, steps=20)
    slow, _ = _run(bank, "linear", optim=optim, steps=20)
    assert torch.equal(epochs.fc.weight, steps.fc.weight)
    assert not torch.equal(epochs.fc.weight, slow.fc.weight)


@pytest.mark.parametrize(("method", "setting"), [("h2t", "lasso"), ("proto", "orthogonality")])
def test_what_a_probe_adds_to_the_loss_is_trained(bank, method, setting):
    plain, _ = _run(bank, method, head={setting: 0.0}, steps=20)
    held, _ = _run(bank, method, head={setting: 50.0}, steps=20)
    with torch.no_grad():
        assert float(held.penalty()) < 0.8 * float(plain.penalty())
