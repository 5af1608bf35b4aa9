"""The fast CGP operator gives the training run that the plain formula gives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.nn.losses import LOSSES
from bat.probes.base import Probe, build_probe
from bat.probes.cgp import CGP
from bat.types import Features
from tests.eval.conftest import bank_of
from tests.reference.probes import pooled

n, L, T, FREQ, D, C = 240, 4, 3, 2, 16, 4
OPTIM = Optim(lr=0.02, betas=[0.9, 0.999], decay="matrices", warmup_steps=4, min_lr=1e-6)
LABELS = torch.arange(n) % C


def _bank(*, planted: int | None = None, targets: Tensor | None = None) -> FeatureBank:
    """Noise; the label written into the class token of block ``planted`` and nothing else."""
    g = torch.Generator().manual_seed(0)
    cls = torch.randn(n, L, D, generator=g)
    if planted is not None:
        cls[:, planted] += 6 * torch.eye(D)[LABELS]
    return bank_of(
        torch.randn(n, L, T, FREQ, D, generator=g),
        cls,
        torch.eye(C)[LABELS] if targets is None else targets,
    )


def _splits() -> list[Split]:
    part = np.arange(n) // C % 4
    return [
        Split(str(k), np.flatnonzero((part != k) & (part != (k + 1) % 4)),
              np.flatnonzero(part == k), np.flatnonzero(part == (k + 1) % 4))
        for k in range(4)
    ]  # fmt: skip


def _build(method: str) -> Probe:
    return build_probe(method, classes=C, width=D, depth=L, has_cls=True, prototypes=24)


def _run(bank, *, build=_build, methods=("cgp",), steps=40, folds=4, **words):
    plan = Plan(build=build, loss=LOSSES["ce"], optim=OPTIM, steps=steps, batch=24,
                multi_label=False, protocol=Protocol(lrs=[0.005, 0.05]), **words)  # fmt: skip
    return cross_validate(bank, _splits()[:folds], list(methods), plan)


class PlainCGP(CGP):
    """The equation written down: all blocks normalised, all similarities stored."""

    def forward(self, features: Features) -> Tensor:
        gate = self.layer_logits.softmax(0)

        def mixed(layers: Tensor) -> Tensor:
            directions = layers / layers.norm(dim=-1, keepdim=True)
            return (gate.view(-1, *[1] * (layers.ndim - 1)) * directions).sum(0)

        assert features.cls is not None
        tokens = mixed(features.patches).flatten(1, 2)  # (B, N, D)
        x = pooled(tokens, self.prototypes, mixed(features.cls))  # (B, K, 3)
        return self.fc(self.dropout(x.flatten(1)))


def test_cgp__trains_as_the_plain_formula():
    """40 steps, two rates, with dropout, validation and selection."""
    rows: dict[str, list] = {}
    fold_results = {}
    for name, cls in (("fast", CGP), ("plain", PlainCGP)):
        rows[name] = []
        fold_results[name] = _run(
            _bank(planted=1),
            build=lambda _, cls=cls: cls(
                classes=C, width=D, depth=L, has_cls=True, prototypes=24, dropout=0.2
            ),
            folds=1,
            log_every=5,
            on_log=rows[name].append,
        )
    losses = {name: [r["loss"] for r in own] for name, own in rows.items()}
    assert len(losses["fast"]) == 2 * 9
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-3, abs=1e-5)
    assert losses["fast"][0] > 2 * losses["fast"][-1]
    for fast, plain in zip(fold_results["fast"], fold_results["plain"], strict=True):
        assert fast.selected == plain.selected
        assert fast.gate == pytest.approx(plain.gate, abs=1e-4)
        assert fast.metrics["map"] == pytest.approx(plain.metrics["map"], abs=1e-3)
