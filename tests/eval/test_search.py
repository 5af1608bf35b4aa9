"""Selection among candidates on validation clips, side by side or in passes."""

import numpy as np
import pytest
import torch

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.errors import UserError
from bat.eval.candidates import Plan, grid
from bat.eval.features import FeatureBank, progress_bar
from bat.eval.results import ResultsFile, ranking, summary
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.nn.losses import LOSSES
from bat.probes.base import Probe, build_probe
from bat.probes.curve import LinearCurve
from bat.probes.linear import Linear
from tests.eval.conftest import bank_of

n, L, T, FREQ, D, C = 60, 3, 2, 2, 16, 3
OPTIM = Optim(lr=0.05, betas=[0.9, 0.999], decay="matrices", warmup_steps=2, min_lr=1e-6)


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % C
    cls = torch.randn(n, L, D, generator=g)
    cls[:, -1] += 5 * torch.eye(D)[labels]
    return bank_of(torch.randn(n, L, T, FREQ, D, generator=g), cls, torch.eye(C)[labels])


def _splits(valid: bool = True) -> list[Split]:
    part = np.arange(n) // C % 4
    splits = []
    for k in range(2):
        own = np.flatnonzero((part != k) & ((part != k + 1) | (not valid)))
        splits.append(
            Split(str(k), own, np.flatnonzero(part == k),
                  np.flatnonzero(part == k + 1) if valid else None)
        )  # fmt: skip
    return splits


def _build(method: str) -> Probe:
    return build_probe(method, classes=C, width=D, depth=L, has_cls=True, prototypes=8, dropout=0.2)


def _plan(**words) -> Plan:
    words = {"build": _build, "optim": OPTIM, "steps": 12, "protocol": Protocol(lrs=[1e-5, 0.05]),
             **words}  # fmt: skip
    return Plan(loss=LOSSES["ce"], batch=16, multi_label=False, **words)


def _same(a, b) -> bool:
    return [vars(o) for o in a] == [vars(o) for o in b]


def test_cross_validate__selects_the_rate_that_learns(bank):
    fold_results = cross_validate(bank, _splits(), ["linear"], _plan(steps=40))
    for fold_result in fold_results:
        assert fold_result.selected["lr"] == 0.05
        assert fold_result.selected["candidates"] == 2
        assert fold_result.selected["step"] == 40
        assert 0.5 < fold_result.selected["validation"] <= 1
        assert fold_result.metrics["accuracy"] > 0.7


def test_cross_validate__candidates_are_independent(bank):
    both = cross_validate(bank, _splits(), ["linear", "cgp"], _plan(steps=4, seeds=2))
    for method in ("linear", "cgp"):
        alone = cross_validate(bank, _splits(), [method], _plan(steps=4, seeds=2))
        assert _same(alone, [o for o in both if o.method == method])
    one = cross_validate(bank, _splits(), ["linear"], _plan(steps=4, protocol=Protocol(lrs=[0.05])))
    assert [o.metrics for o in one] == [
        o.metrics for o in both if (o.method, o.seed) == ("linear", 0)
    ]


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (Protocol(lrs=[1e-5, 0.05], prototype_lrs=[0.01, 0.02, 0.05]), {"memory_bytes": 1.0}),
        (Protocol(lrs=[1e-5, 0.05], search="first"), {"epochs": 1.0}),
        (Protocol(lrs=[1e-5, 0.05], look_every=1, patience=1), {}),
    ],
)
def test_progress_bar__counts_all_folds_candidates_and_passes(bank, protocol, words):
    plan = _plan(**{"steps": 3, "seeds": 2, "protocol": protocol, **words})
    methods = ["linear", "cgp"]
    expected = plan.steps_left(_splits(), methods)
    with progress_bar(expected, "probes", unit="step", show=True) as plan.bar:
        cross_validate(bank, _splits(), methods, plan)
        assert plan.bar.n == plan.bar.total == expected > 0
    plan.done = lambda method, fold, seed: (method, fold) == ("cgp", "0")
    assert 0 < plan.steps_left(_splits(), methods) < expected


def test_cross_validate__passes_change_nothing(bank):
    seen = []

    class Spy(FeatureBank):
        def training(self, ids, *, batch, steps, seed):
            seen.append(seed)
            return super().training(ids, batch=batch, steps=steps, seed=seed)

    spy = Spy(patches=bank.patches, cls=bank.cls, targets=bank.targets, ids=bank.ids,
              keys=bank.keys, skipped={})  # fmt: skip
    together = cross_validate(spy, _splits(), ["linear", "cgp"], _plan(steps=4, seeds=2))
    assert len(seen) == 2  # one pass a round for eight candidates
    seen.clear()
    apart = cross_validate(
        spy, _splits(), ["linear", "cgp"], _plan(steps=4, seeds=2, memory_bytes=1)
    )
    assert len(seen) == 16
    assert {id(o) for o in together}.isdisjoint({id(o) for o in apart})
    order = [(o.fold, o.method, o.seed) for o in together]
    apart.sort(key=lambda o: order.index((o.fold, o.method, o.seed)))
    assert _same(together, apart)


def test_cross_validate__test_clips_select_nothing(bank):
    """With other labels on the test clips the same rates are chosen."""
    splits = _splits()[:1]
    wrong = bank.targets.clone()
    wrong[splits[0].test] = wrong[splits[0].test].roll(1, -1)
    other = bank_of(bank.patches, bank.cls, wrong)
    a, b = (cross_validate(s, splits, ["linear"], _plan(steps=40))[0] for s in (bank, other))
    assert a.selected == b.selected
    assert a.metrics["accuracy"] > 0.7
    assert b.metrics["accuracy"] < 0.3


def test_cross_validate__validation_clips_are_not_trained_on(bank):
    """Garbage features of the validation clips move the choice, not the trained weights."""
    splits, heads = _splits()[:1], []
    for spoilt in (False, True):
        cls = bank.cls.clone()
        if spoilt:
            cls[splits[0].valid] = 1e3
        source = bank_of(bank.patches, cls, bank.targets)
        plan = _plan(
            protocol=Protocol(lrs=[0.05]),
            on_probe=lambda probe, own: heads.append(probe.fc.weight.detach().clone()),
        )
        cross_validate(source, splits, ["linear"], plan)
    assert torch.equal(*heads)


def test_cross_validate__diverged_rate_is_not_selected(bank):
    plan = _plan(protocol=Protocol(lrs=[1e30, 0.05]), optim=Optim(**{**vars(OPTIM),
                 "warmup_steps": 0}), steps=30)  # fmt: skip
    (fold_result,) = cross_validate(bank, _splits()[:1], ["linear"], plan)
    assert fold_result.selected["lr"] == 0.05
    plan.protocol = Protocol(lrs=[1e30, 1e31])
    assert cross_validate(bank, _splits()[:1], ["linear"], plan) == []
    assert "diverged at every rate tried (1e+30, 1e+31): linear (0" in plan.diverged_line()


@pytest.mark.parametrize("protocol", [None, Protocol(lrs=[0.05])])
def test_cross_validate__divergence_of_one_probe_spares_others(bank, protocol):
    """A probe, or one block of a curve, whose outputs are not finite: others are handed over."""

    class Broken(Linear):
        def forward(self, features):
            return super().forward(features) * torch.nan

    class Curve(LinearCurve):
        def forward(self, features):
            out = super().forward(features)
            return torch.cat([out[:1] * torch.nan, out[1:]])

    kinds = {"broken": Broken, "curve": Curve}
    kept = []
    plan = _plan(
        protocol=protocol,
        build=lambda m: (
            kinds[m](classes=C, width=D, depth=L, has_cls=True) if m in kinds else _build(m)
        ),
        on_probe=lambda probe, own: kept.extend(o.method for o in own),
    )
    fold_results = cross_validate(bank, _splits(valid=protocol is not None)[:1],
                              ["linear", "broken", "curve", "cgp"], plan)  # fmt: skip
    assert kept == [o.method for o in fold_results] == ["linear", "cgp"]
    assert plan.diverged == [("broken", "0", 0), ("curve", "0", 0)]


def test_grid__rates_and_decays():
    optim = Optim(lr=0.1, weight_decay=0.2)
    assert grid(None, optim, prototypes=False) == [(0.1, 0.2)]
    assert grid(Protocol(selection="none"), optim, prototypes=True) == [(0.1, 0.2)]
    protocol = Protocol(lrs=[1, 2], prototype_lrs=[3], weight_decays=[0.5, 0.6])
    assert grid(protocol, optim, prototypes=False) == [(1, 0.5), (1, 0.6), (2, 0.5), (2, 0.6)]
    assert grid(protocol, optim, prototypes=True) == [(3, 0.5), (3, 0.6)]
    drawn = grid(Protocol(lrs=[1e-4, 7e-3], weight_decays=[1e-5, 5e-4], sobol=50), optim,
                 prototypes=False)  # fmt: skip
    assert len(set(drawn)) == 50
    rates, decays = (np.array(v) for v in zip(*drawn, strict=True))
    assert ((rates >= 1e-4) & (rates <= 7e-3)).all()
    assert ((decays >= 1e-5) & (decays <= 5e-4)).all()
    assert 20 <= (rates < np.sqrt(1e-4 * 7e-3)).sum() <= 30  # even on a log scale


def test_results_file__read_back_or_refused(bank, tmp_path):
    fold_results = cross_validate(bank, _splits(), ["linear"], _plan(bootstrap=100))
    path, made = tmp_path / "results.jsonl", {"encoder": "x", "data": "y"}
    ResultsFile(path, encoder="A", made_from=made).add(fold_results)
    with path.open("a") as file:
        file.write('{"encoder": "A", "meth')  # cut off by a kill
    again = ResultsFile(path, encoder="A", made_from=made)
    assert _same(again.fold_results, fold_results)
    assert again.done("linear", "1", 0)
    assert not again.done("linear", "1", 1)
    assert not again.done("cgp", "1", 0)
    assert ResultsFile(path, encoder="B", made_from=made).fold_results == []
    with pytest.raises(UserError, match="with other data than"):
        ResultsFile(path, encoder="A", made_from={**made, "data": "z"})

    def never(probe, own):
        raise AssertionError("trained again")

    plan = _plan(done=again.done, on_probe=never)
    assert cross_validate(bank, _splits(), ["linear"], plan) == []


def test_summary__says_what_the_deviation_is_over(bank):
    fold_results = cross_validate(bank, _splits(), ["linear"], _plan(seeds=3, bootstrap=100))
    entry = summary(fold_results)["linear"]
    values = np.array([[row[str(s)]["accuracy"] for s in range(3)]
                       for row in entry["folds"].values()])  # fmt: skip
    assert entry["std_over"] == "seeds"
    assert entry["mean"]["accuracy"] == pytest.approx(values.mean())
    assert entry["std"]["accuracy"] == pytest.approx(values.mean(0).std())
    low, high = entry["interval"]
    assert low <= entry["mean"]["accuracy"] <= high
    assert high - low < 0.5
    one = summary([o for o in fold_results if o.seed == 0])["linear"]
    assert one["std_over"] == "folds"
    assert one["std"]["accuracy"] == pytest.approx(values[:, 0].std())
    alone = summary(fold_results[:1])["linear"]
    assert (alone["std_over"], alone["std"]["accuracy"]) == ("none", 0)
    rows = ranking({"A": {"linear": entry}, "B": {"linear": alone, "curve@1": entry}}, "accuracy")
    assert [r["encoder"] for r in rows] in (["A", "B"], ["B", "A"])
    assert rows[0]["mean"] >= rows[1]["mean"]


def _one(bank, method, *, head=None, **words):
    """The trained probe and its fold_result, in one fold."""
    found = []
    words = {"steps": 4, "protocol": None, **words}
    plan = _plan(
        build=lambda m: build_probe(
            m, classes=C, width=D, depth=L, has_cls=True, prototypes=6, dropout=0.0, **(head or {})
        ),
        on_probe=lambda probe, own: found.append(probe),
        **words,
    )
    (fold_result,) = cross_validate(
        bank, _splits(valid=plan.protocol is not None)[:1], [method], plan
    )
    return found[0], fold_result


def test_candidate__is_trained_with_its_weight_decay(bank):
    weak, first = _one(bank, "linear", protocol=Protocol(lrs=[0.05], weight_decays=[1e-6]))
    strong, second = _one(bank, "linear", protocol=Protocol(lrs=[0.05], weight_decays=[9.0]))
    assert (first.selected["weight_decay"], second.selected["weight_decay"]) == (1e-6, 9.0)
    assert strong.fc.weight.norm() < 0.5 * weak.fc.weight.norm()


def test_grid__probes_with_prototypes_have_rates_of_their_own(bank):
    protocol = Protocol(lrs=[0.25], prototype_lrs=[0.125])
    for method, rate in (("linear", 0.25), ("lcgp", 0.25), ("cgp", 0.125), ("proto", 0.125),
                         ("protobin", 0.125), ("protofloat", 0.125)):  # fmt: skip
        assert _one(bank, method, protocol=protocol)[1].selected["lr"] == rate, method


@pytest.mark.parametrize(("method", "setting"), [("h2t", "lasso"), ("proto", "orthogonality")])
def test_training__includes_what_a_probe_adds_to_the_loss(bank, method, setting):
    plain, _ = _one(bank, method, head={setting: 0.0}, steps=20)
    held, _ = _one(bank, method, head={setting: 50.0}, steps=20)
    with torch.no_grad():
        assert float(held.penalty()) < 0.8 * float(plain.penalty())


def test_run_steps__epochs_count_passes_and_warm_up_is_a_tenth():
    optim = Optim(lr=1e-3, decay="matrices", warmup_steps=400)
    held = Split("1", np.arange(40), np.arange(40, 45))
    assert _plan(steps=50, optim=optim).run_steps(held) == (50, 400)
    assert _plan(epochs=4.0, optim=optim).run_steps(held) == (10, 1)
    assert _plan(epochs=4.0, min_steps=300, optim=optim).run_steps(held) == (300, 30)
    assert _plan(epochs=400.0, min_steps=300, optim=optim).run_steps(held) == (1000, 100)
