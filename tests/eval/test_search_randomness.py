"""Random numbers of probe runs: seeds, folds and methods, and paired resamples."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.nn.losses import LOSSES
from bat.probes.base import Probe
from bat.types import Features
from tests.eval.conftest import bank_of

n, T, D, C = 30, 3, 8, 3
STILL = Optim(lr=0.0, betas=[0.9, 0.999], weight_decay=0.0, warmup_steps=0, min_lr=0.0)
MOVING = Optim(lr=0.05, betas=[0.9, 0.999], weight_decay=0.0, warmup_steps=0, min_lr=0.0)
TRAIN, VALID, TEST = np.arange(10), np.arange(10, 20), np.arange(20, 30)
SPLITS = [Split("0", TRAIN, TEST, VALID), Split("1", TRAIN, TEST, VALID)]
"""Of the same clips: they differ in their names alone."""


def _bank(*, alike: bool = False, targets: Tensor | None = None) -> FeatureBank:
    """Noise with a trace of the label, or ``alike``: every clip the same one."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % C
    cls = torch.randn(n, 1, D, generator=g) + torch.eye(D)[labels][:, None]
    patches = torch.randn(n, 0, T, 1, D, generator=g)
    if alike:
        labels, cls = labels * 0, cls[:1].expand_as(cls)
    return bank_of(patches, cls, torch.eye(C)[labels] if targets is None else targets)


class Plain(Probe):
    """A linear layer; started at random or always the same; ``dropout`` before it. At frame level
    it says the same of every time patch but the last, where it says the opposite.
    """

    def __init__(self, *, random: bool, dropout: float, level="clip"):
        super().__init__(classes=C, width=D, depth=1, has_cls=True, level=level)
        self.fc, self.dropout = nn.Linear(D, C), nn.Dropout(dropout)
        if not random:
            nn.init.zeros_(self.fc.bias)
            with torch.no_grad():
                self.fc.weight.copy_(torch.eye(C, D) + 0.1 * torch.arange(D))

    def forward(self, features: Features) -> Tensor:
        out = self.fc(self.dropout(features.cls[-1]))
        return out if self.level == "clip" else torch.stack([out] * (T - 1) + [-out], 1)


def _run(bank, *, random=False, dropout=0.0, level="clip", methods=("a", "b"), splits=SPLITS,
         loss="ce", **words):  # fmt: skip
    words = {"optim": STILL, "steps": 3, "batch": 4, "seeds": 2, "multi_label": False, **words}
    plan = Plan(build=lambda _: Plain(random=random, dropout=dropout, level=level),
                loss=LOSSES[loss], **words)  # fmt: skip
    return cross_validate(bank, splits, list(methods), plan)


KINDS = {"init": {"random": True}, "dropout": {"dropout": 0.5}}


@pytest.mark.parametrize("kind", KINDS)
def test_randomness__depends_on_method_fold_and_seed(kind):
    """All clips are one, and the rate is 0: a loss tells initialisation and dropout apart."""
    rows: list[dict] = []
    _run(_bank(alike=True), **KINDS[kind], log_every=1, on_log=rows.append)
    losses = {(r["fold"], r["method"], r["seed"], r["step"]): r["loss"] for r in rows}
    assert len(losses) == 2 * 2 * 2 * 3
    first = [loss for (*_, step), loss in losses.items() if step == 1]
    assert len({round(loss, 5) for loss in first}) == 8
    for fold, method, seed in itertools.product("01", "ab", (0, 1)):
        steps = {round(losses[fold, method, seed, step], 5) for step in (1, 2, 3)}
        assert len(steps) == (3 if kind == "dropout" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_randomness__same_for_all_rates(kind):
    rows: list[dict] = []
    _run(_bank(), **KINDS[kind], methods=["a"], splits=SPLITS[:1], steps=2, log_every=1,
         on_log=rows.append, protocol=Protocol(lrs=[0.01, 0.1], weight_decays=[0.0, 9.0]),
    )  # fmt: skip
    for seed in (0, 1):
        first, last = (
            [r["loss"] for r in rows if (r["seed"], r["step"]) == (seed, step)] for step in (1, 2)
        )
        assert len(first) == len(set(last)) == 4
        assert len(set(first)) == 1


@pytest.mark.parametrize("memory_bytes", [8e9, 1])
def test_order__same_for_all_seeds(memory_bytes):
    """Nothing random but the order: all seeds and methods of a round end with the same weights."""

    def ends(**words):
        found: list[tuple] = []
        _run(_bank(), optim=MOVING, steps=2, memory_bytes=memory_bytes, **words,
             on_probe=lambda probe, own: found.append((own[0].fold, probe.fc.weight.detach())),
        )  # fmt: skip
        return {fold: [w for f, w in found if f == fold] for fold in "01"}

    found = ends()
    for weights in found.values():
        assert len(weights) == 4
        assert all(torch.equal(weights[0], w) for w in weights)
    assert not torch.equal(found["0"][0], found["1"][0])  # another round, another order
    other = ends(seed=7, seeds=1, methods=["a"], splits=SPLITS[:1])
    assert not torch.equal(found["0"][0], other["0"][0])


def test_replicates__paired_within_a_fold():
    """Methods and seeds that say the same of the same clips have the same replicates, so those of
    others can be taken draw by draw."""
    found = _run(_bank(), bootstrap=40)
    assert len(found) == 8
    values = {fold: [o.replicates for o in found if o.fold == fold] for fold in "01"}
    for own in values.values():
        assert len(own[0]) == 40
        assert len(set(own[0])) > 3  # draws differ
        assert own == [own[0]] * 4
    assert values["0"][0] != values["1"][0]
    apart = _run(_bank(), bootstrap=40, methods=["b"], splits=SPLITS[1:], memory_bytes=1)
    assert [o.replicates for o in apart] == values["1"][:2]


@pytest.mark.parametrize(("metric", "loss"), [("accuracy", "ce"), ("map", "bce")])
def test_replicates__draw_clips_not_frames(metric, loss):
    """Two patches that say what the clip says, and one beyond its end: as the clip alone, in its
    metrics, its choice and its resamples; batches of four of the ten clips."""
    words = {"metric": metric, "loss": loss, "multi_label": loss == "bce", "bootstrap": 40,
             "protocol": Protocol(lrs=[0.05])}  # fmt: skip
    frames = _bank().targets[:, None].repeat(1, T, 1)
    frames[:, -1] = torch.nan
    words |= {"methods": ["a"], "seeds": 1, "steps": 1}
    by_clip = _run(_bank(), **words)
    by_frame = _run(_bank(targets=frames), level="frame", **words)
    assert len(by_clip) == len(by_frame) == 2
    for clip, frame in zip(by_clip, by_frame, strict=True):
        assert np.std(clip.replicates) > 0.02
        assert frame.replicates == pytest.approx(clip.replicates, abs=1e-5)
        assert frame.metrics[metric] == pytest.approx(clip.metrics[metric], abs=1e-6)
        assert frame.selected == pytest.approx(clip.selected)
        positives = np.array(clip.metrics["per_class"]["positives"])
        assert frame.metrics["per_class"]["positives"] == ((T - 1) * positives).tolist()
