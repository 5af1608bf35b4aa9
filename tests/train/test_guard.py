"""Steps that are not taken: the norm, clipping, what a skipped step leaves, and when it ends."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.io import read_jsonl
from bat.nn.ema import ema_update
from bat.nn.optim import adamw, param_groups
from bat.objectives.masked_latent import MaskedLatent
from bat.train.callbacks import Metrics
from bat.train.guard import Guard, GuardReport, spread_nan
from bat.train.nan_record import MicroBatch
from bat.train.pretrain import Pretraining
from bat.train.run_pretrain import pretrain
from bat.train.stopping import Stopping
from bat.types import WaveBatch
from tests.train.runs import run_and_cut


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))


def optimiser(module: torch.nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    if not fused:
        return torch.optim.AdamW(module.parameters(), lr=0.1)
    return adamw(param_groups(module, weight_decay=0.05), lr=0.1)


def backward(module: torch.nn.Module) -> None:
    module.zero_grad()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    module(x).square().mean().backward()


@pytest.mark.parametrize("clip", [None, 0.01, 100.0])
def test_guard__norm_and_clipping_are_pytorchs(clip: float | None) -> None:
    ours, theirs = model(), model()
    backward(ours)
    backward(theirs)
    norm = Guard(clip).inspect(optimiser(ours), ours.parameters())
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or 1e9)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_guard__step_of_a_gradient_that_is_not_finite_moves_nothing(
    value: float, fused: bool
) -> None:
    module, guard = model(), Guard(1.0)
    optimizer = optimiser(module, fused=fused)

    def step() -> None:
        guard.inspect(optimizer, module.parameters())
        optimizer.step()

    backward(module)
    step()
    weights = [p.detach().clone() for p in module.parameters()]
    before = {k: v.clone() for k, v in optimizer.state[next(module.parameters())].items()}
    backward(module)
    next(module.parameters()).grad[0, 0] = value
    step()
    assert guard.skip is not None
    assert guard.skip.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    after = optimizer.state[next(module.parameters())]
    assert all(torch.equal(after[k], v) for k, v in before.items())
    backward(module)
    step()
    assert guard.skip.item() == 0
    assert not torch.equal(weights[0], next(module.parameters()))


def test_ema_update__skipped_step_leaves_the_teacher() -> None:
    student, skipped, moved, plain = model(), model(), model(), model()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    ema_update(skipped, student, 0.9, skip=torch.tensor(1.0))
    ema_update(moved, student, 0.9, skip=torch.tensor(0.0))
    ema_update(plain, student, 0.9)
    for a, b, c, d in zip(*(m.parameters() for m in (skipped, moved, plain, model())), strict=True):
        assert torch.equal(a, d)
        assert torch.equal(b, c)
        assert not torch.equal(b, d)


def test_spread_nan__is_exact_for_finite_losses_and_spoils_the_gradient_of_others() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = x.square().sum()
    assert torch.equal(spread_nan(loss), loss)
    spread_nan(loss).backward()
    assert torch.equal(x.grad, 2 * x.detach())
    y = torch.tensor([3e38, 3e38], requires_grad=True)  # the sum is infinite, its gradient is 1
    spread_nan(y.sum()).backward()
    assert y.grad.isnan().all()


def spoil(monkeypatch: pytest.MonkeyPatch, at) -> None:
    """Make the loss of the micro-batches that ``at`` says NaN."""
    micro: list[int] = []
    original = MaskedLatent.spectrogram

    def spectrogram(self, batch):
        x = original(self, batch)
        return x * torch.nan if at(micro[-1]) else x

    step = Pretraining.training_step

    def training_step(self, batch, batch_idx):
        micro.append(batch_idx)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MaskedLatent, "spectrogram", spectrogram)
    monkeypatch.setattr(Pretraining, "training_step", training_step)


def test_pretrain__spoiled_step_is_skipped_and_its_keys_are_listed(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    spoil(monkeypatch, lambda k: k == 5)  # the second micro-batch of the third step
    states = []
    original = Pretraining.optimizer_step

    def optimizer_step(self, *args):
        original(self, *args)
        states.append({k: v.clone() for k, v in self.objective.state_dict().items()})

    monkeypatch.setattr(Pretraining, "optimizer_step", optimizer_step)
    pretrain(small("train.accumulate=2", "data.batch=2", "train.log_every=1", out=out))
    assert len(states) == 6
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(states)]
    assert same == [False, True, False, False, False]  # neither student nor teacher moved
    rows = read_jsonl(out / "bad_batches.jsonl")
    assert [(r["step"], r["rank"], len(r["keys"]), r["loss"]) for r in rows] == [(3, 0, 2, None)]
    lines = read_jsonl(out / "metrics.jsonl")
    (event,) = [r for r in lines if r.get("event")]
    assert (event["event"], event["step"]) == ("skipped", 3)
    assert "step 3 skipped: its loss is not finite" in event["message"]
    losses = [r["loss"] for r in lines if "loss" in r]
    assert len(losses) == 6
    assert all(losses)  # the other micro-batch's, where one was spoiled
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 1


def test_pretrain__too_many_skipped_steps_end_the_run_and_are_listed_once(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    spoil(monkeypatch, lambda k: k in (0, 2, 4))
    config = small("health.max_skipped=2", "train.steps=20", out=out)
    run_and_cut(monkeypatch, config, at=3)
    assert [r["step"] for r in read_jsonl(out / "bad_batches.jsonl")] == [1, 3]
    with pytest.raises(UserError, match=r"3 of the latest 100 steps were not finite .*bad_batches"):
        pretrain(config)  # from step 2
    assert [r["step"] for r in read_jsonl(out / "bad_batches.jsonl")] == [1, 3, 5]
    assert not (out / "export").exists()


def test_guard_report__skips_far_apart_do_not_end_a_run(tmp_path: Path) -> None:
    """Flags are read one step late, as on a GPU; a checkpoint holds them all the same."""

    def report() -> GuardReport:
        metrics = Metrics(every=1, progress=False)
        return GuardReport(
            Guard(None), tmp_path, most=1, keep=0, metrics=metrics, stopping=Stopping()
        )

    one = torch.ones(1, dtype=torch.int64)
    batch = WaveBatch(torch.zeros(1, 9), 9 * one, torch.zeros(1, 0), ["a"], one, [])

    def skip(at: GuardReport, step: int) -> None:
        at._unread.append((step, torch.tensor(1.0), None, [MicroBatch(batch, 0, one.float())]))

    first = report()
    for step in (10, 110, 210):
        skip(first, step)
    assert first.state_dict() == {"total": 3, "latest": [210]}
    assert not first.stopping.wanted
    again = report()
    again.load_state_dict(first.state_dict())
    skip(again, 309)
    assert again.state_dict()["total"] == 4
    assert again.stopping.wanted
