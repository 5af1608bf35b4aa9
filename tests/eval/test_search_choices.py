"""Selection of validation steps: ties, blocks of a curve, patience. Every score is known before.

A scripted probe answers what its script says of the steps it has trained for and of whether its
rate is the fast one; so the right choice is known without training anything.
"""

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

n, C, PARTS = 24, 3, 8
FAST, SLOW = 1.0, 1e-4
OPTIM = Optim(lr=SLOW, betas=[0.9, 0.999], weight_decay=0.0, warmup_steps=0, min_lr=0.0)
HELD = Split("0", np.arange(8), np.arange(16, 24), np.arange(8, 16))


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    """The class token is the label, and the clip's place among the eight of its part."""
    truth = torch.eye(C)[torch.arange(n) % C]
    place = torch.arange(n)[:, None] % PARTS / PARTS
    return bank_of(torch.zeros(n, 0, 1, 1, C + 1), torch.cat([truth, place], 1)[:, None], truth)


class Scripted(Probe):
    """``script(steps, fast)``: of each answer, which share of the clips it has right, how sure it
    is, and how much surer of class 0 than of the others (if it is). ``rate`` climbs by about its
    learning rate a step, which tells the fast from the slow.
    """

    def __init__(self, script, names=("",)):
        super().__init__(classes=C, width=C + 1, depth=1, has_cls=True)
        self.script, self.names = script, names
        self.rate = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, features: Features) -> Tensor:
        truth, place = features.cls[-1].split([C, 1], 1)
        if self.training:
            self.steps += 1
            return truth * (1 + self.rate)
        said = self.script(int(self.steps), float(self.rate) > 0.5)
        said = [said] if self.names == ("",) else said
        return torch.stack([
            sure * torch.where(place < share, truth, truth.roll(1, 1)) + sum(more) * torch.eye(C)[0]
            for share, sure, *more in said
        ])  # fmt: skip

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, logits, strict=True))


def _run(bank, script, *, names=("",), steps=8, held=HELD, memory_bytes=8e9, loss="ce", **protocol):
    """Outcomes and how many steps were taken."""
    taken = []
    plan = Plan(
        build=lambda _: Scripted(script, names),
        loss=LOSSES[loss],
        optim=OPTIM,
        steps=steps,
        batch=8,
        multi_label=loss == "bce",
        metric="map" if loss == "bce" else "accuracy",
        protocol=Protocol(**protocol),
        memory_bytes=memory_bytes,
        bootstrap=5,
        on_step=lambda: taken.append(1),
    )
    return cross_validate(bank, [held], ["scripted"], plan), len(taken)


@pytest.mark.parametrize(
    ("steps", "selected"),
    [
        ([(1, 1.0), (1, 3.0), (1, 2.0), (1, 3.0)], 8),  # of equal metrics the last
        ([(1, 3.0), (1, 1.0), (1, 1.0), (0.5, 9.0)], 6),  # whatever the loss
        ([(0.75, 1.0), (1, 0.01), (0.875, 1.0), (0.5, 1.0)], 4),  # the metric above the loss
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.625, 9.0)], 8),  # the last step is looked at
    ],
)
def test_validation__best_metric_then_latest_step(bank, steps, selected):
    (fold_result,), _ = _run(bank, lambda step, fast: steps[step // 2 - 1], look_every=2)
    assert fold_result.selected["step"] == selected
    share = steps[selected // 2 - 1][0]
    assert fold_result.metrics["accuracy"] == fold_result.selected["validation"] == share


@pytest.mark.parametrize("memory_bytes", [8e9, 1])
@pytest.mark.parametrize("rates", [[FAST, SLOW], [SLOW, FAST]])
@pytest.mark.parametrize(
    ("fast", "slow", "selected"),
    [
        ((1, 3.0), (1, 2.0), FAST),
        ((1, 2.0), (1, 3.0), SLOW),
        ((1, 2.0), (1, 2.0), None),
        ((0.5, 1.0), (0.75, 9.0), SLOW),
    ],
)
def test_rates__best_metric_then_loss_then_first(bank, fast, slow, selected, rates, memory_bytes):
    """None: all alike, so the rate that is named first; side by side or one after the other."""
    found, _ = _run(bank, lambda step, is_fast: fast if is_fast else slow, steps=2, lrs=rates,
                    memory_bytes=memory_bytes)  # fmt: skip
    assert [o.selected["lr"] for o in found] == [rates[0] if selected is None else selected]


@pytest.mark.parametrize("memory_bytes", [8e9, 1])
@pytest.mark.parametrize("rates", [[FAST, SLOW], [SLOW, FAST]])
@pytest.mark.parametrize(("fast", "slow"), [((4, 8), (2, 6)), ((2, 6), (4, 8))])
def test_validation__of_equal_ones_the_later_step(bank, fast, slow, rates, memory_bytes):
    """Whichever rate is named first, and in as many passes as it takes."""

    def script(step, is_fast):
        return (1 if step in (fast if is_fast else slow) else 0.5), 1.0

    (fold_result,), _ = _run(bank, script, lrs=rates, look_every=2, memory_bytes=memory_bytes)
    assert fold_result.selected["step"] == 8
    assert fold_result.selected["lr"] == (FAST if 8 in fast else SLOW)


@pytest.mark.parametrize(
    ("metric", "step", "validation", "accuracy"), [("task", 2, 0.75, 0.75), ("map", 4, 1.0, 0.25)]
)
def test_protocol__metric_selects(bank, metric, step, validation, accuracy):
    """Leaning to class 0 spoils accuracy and no class's order."""
    steps = {2: (0.75, 1.0), 4: (1, 1.0, 9.0)}
    (fold_result,), _ = _run(bank, lambda at, fast: steps[at], steps=4, look_every=2, metric=metric)
    assert (fold_result.selected["step"], fold_result.selected["validation"]) == (step, validation)
    assert fold_result.metrics["accuracy"] == accuracy  # a task is judged by its own metric


CURVE = {  # (fast, step): shares of the blocks
    (True, 2): [0.25, 0.250, 0.75],
    (True, 4): [0.875, 0.125, 0.5],
    (False, 2): [0.5, 0.375, 0.625],
    (False, 4): [0.625, 0.25, 0.625],
}


@pytest.mark.parametrize("memory_bytes", [8e9, 1])
@pytest.mark.parametrize("rates", [[FAST, SLOW], [SLOW, FAST]])
def test_curve__each_block_has_its_own_rate_and_step(bank, rates, memory_bytes):
    """And is judged once, as it was at that step with that rate."""
    found, _ = _run(
        bank,
        lambda step, fast: [(share, 1.0) for share in CURVE[fast, step]],
        names=("@1", "@2", "@3"),
        steps=4,
        lrs=rates,
        look_every=2,
        memory_bytes=memory_bytes,
    )
    rows = {
        o.method: (
            o.selected["lr"],
            o.selected["step"],
            o.selected["validation"],
            o.metrics["accuracy"],
        )
        for o in found
    }
    assert rows == {
        "scripted@1": (FAST, 4, 0.875, 0.875),
        "scripted@2": (SLOW, 2, 0.375, 0.375),
        "scripted@3": (FAST, 2, 0.75, 0.75),
    }
    assert len(found) == 3
    assert {o.probe for o in found} == {"scripted"}
    assert all(o.replicates is None for o in found)  # a curve has a band of its own


def _shares(*values):
    """A script of one answer: its share right at validation steps, every two steps."""
    return lambda step, fast: (values[step // 2 - 1], 1.0)


@pytest.mark.parametrize(
    ("patience", "shares", "selected", "taken"),
    [
        (2, [0.5, 0.25, 0.625, 0.5, 0.375, 1, 1], 6, 10),  # a gain starts the count anew
        (1, [0.5, 0.25, 1, 1, 1, 1, 1], 2, 4),
        (2, [0.5, 0.5, 0.5, 1, 1, 1, 1], 6, 6),  # as good is no gain
        (3, [0.5, 0.25, 0.25, 0.625, 0.5, 0.5, 0.75], 14, 14),
        (0, [0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25], 2, 14),  # 0: never
    ],
)
def test_patience__counts_validations_without_gain(bank, patience, shares, selected, taken):
    (fold_result,), steps = _run(bank, _shares(*shares), steps=14, look_every=2, patience=patience)
    assert (fold_result.selected["step"], steps) == (selected, taken)


@pytest.mark.parametrize("rates", [[FAST, SLOW], [SLOW, FAST]])
def test_patience__of_each_rate_alone(bank, rates):
    """A slow rate that still gains is trained on, however far ahead a faster one was."""
    fast, slow = _shares(0.875, 0.75, 1, 1, 1), _shares(0.25, 0.5, 0.625, 0.75, 0.95)
    (fold_result,), steps = _run(
        bank,
        lambda step, is_fast: (fast if is_fast else slow)(step, is_fast),
        steps=10,
        lrs=rates,
        look_every=2,
        patience=1,
    )
    assert (fold_result.selected["lr"], fold_result.selected["step"], steps) == (SLOW, 10, 10)
    assert fold_result.selected["candidates"] == 2


def test_patience__of_each_block_alone(bank):
    """Though the others of its probe go on, and it would have been better later."""
    one, two = _shares(0.5, 0.25, 1, 1), _shares(0.25, 0.5, 0.625, 0.75)
    found, steps = _run(bank, lambda *at: [one(*at), two(*at)], names=("@1", "@2"), look_every=2,
                        patience=1)  # fmt: skip
    assert steps == 8
    assert [(o.selected["step"], o.metrics["accuracy"]) for o in found] == [(2, 0.5), (8, 0.75)]


@pytest.mark.parametrize("best", [3, 6, 7])
def test_look_every__and_at_the_end(bank, best):
    seen = []

    def script(step, fast):
        seen.append(step)
        return (1 if step == best else 0.5), 1.0

    (fold_result,), _ = _run(bank, script, steps=7, look_every=3)
    assert seen == [3, 6, 7, best]  # the last: judged on the held-out clips
    assert fold_result.selected["step"] == best


def test_validation__without_a_positive_clip_to_validate_on_the_last_step(bank):
    """No class has an average precision then; a NaN must not win by being first."""
    empty = bank.targets.clone()
    empty[HELD.valid] = 0
    silent = bank_of(bank.patches, bank.cls, empty)
    sure = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}
    (fold_result,), _ = _run(silent, lambda step, fast: (1, sure[step]), look_every=2, loss="bce")
    assert (fold_result.selected["step"], fold_result.selected["validation"]) == (8, 0.0)
    assert fold_result.metrics["map"] == 1


def _searched(bank, script, *, names=("",), seeds=3, **words):
    """Outcomes, and which seed was trained at which rate."""
    trained = []
    plan = Plan(
        build=lambda _: Scripted(script, names),
        loss=LOSSES["ce"],
        optim=OPTIM,
        steps=4,
        batch=8,
        multi_label=False,
        seed=7,
        seeds=seeds,
        protocol=Protocol(lrs=[SLOW, FAST], look_every=2, search="first"),
        log_every=99,
        on_log=lambda row: trained.append((row["seed"], row["lr"])) if row["step"] == 1 else None,
        **words,
    )
    return cross_validate(bank, [HELD], ["scripted"], plan), trained, plan


def _fast_is_better(step, fast):
    return (1 if fast else 0.5), 1.0


def test_search_first__other_seeds_take_what_the_first_found(bank):
    found, trained, _ = _searched(bank, _fast_is_better)
    assert trained == [(7, SLOW), (7, FAST), (8, FAST), (9, FAST)]
    assert [(o.seed, o.selected["lr"], o.selected["candidates"]) for o in found] == [
        (7, FAST, 2), (8, FAST, 1), (9, FAST, 1)]  # fmt: skip


def test_search_first__goes_on_from_an_earlier_run(bank):
    """Its fold_results are those of the first seed: nothing is searched again."""
    before, _, _ = _searched(bank, _fast_is_better, seeds=1)
    found, trained, _ = _searched(bank, _fast_is_better, before=before,
                                  done=lambda method, fold, seed: seed == 7)  # fmt: skip
    assert trained == [(8, FAST), (9, FAST)]
    assert [o.seed for o in found] == [8, 9]


def test_search_first__each_answer_keeps_its_own_rate(bank):
    def script(step, fast):
        return [(1 if fast else 0.5, 1.0), (0.5 if fast else 1, 1.0)]

    def surprising(step, fast):
        """For the other seeds it would be better the other way round."""
        return script(step, not fast)

    before, _, _ = _searched(bank, script, names=("@1", "@2"), seeds=1)
    found, trained, _ = _searched(bank, surprising, names=("@1", "@2"), seeds=2, before=before,
                                  done=lambda method, fold, seed: seed == 7)  # fmt: skip
    assert trained == [(8, FAST), (8, SLOW)]
    rates = {o.method: o.selected["lr"] for o in found}
    assert rates == {"scripted@1": FAST, "scripted@2": SLOW}


def test_search_first__that_diverged_leaves_nothing_to_train(bank):
    found, trained, plan = _searched(bank, lambda step, fast: (1, float("nan")))
    assert found == []
    assert trained == [(7, SLOW), (7, FAST)]
    assert plan.diverged == [("scripted", "0", seed) for seed in (7, 8, 9)]
