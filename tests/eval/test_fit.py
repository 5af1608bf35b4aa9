"""The probing loop on planted features: it learns, shares, repeats and leaves no trace."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bat.config.sections import Optim
from bat.errors import UserError
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank
from bat.eval.fit import Training, fit, predict, predictions
from bat.eval.results import summary
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.nn.losses import LOSSES
from bat.probes.base import Probe, build_probe, expand
from bat.probes.curve import LinearCurve
from bat.types import Features
from tests.eval.conftest import bank_of

n, L, T, FREQ, D, C = 60, 4, 3, 2, 16, 3
PLANTED = 2
OPTIM = Optim(lr=0.05, betas=[0.9, 0.999], decay="matrices", warmup_steps=2, min_lr=1e-4)


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    """Noise, but for the class written into the tokens of one block."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % C
    patches = torch.randn(n, L, T, FREQ, D, generator=g)
    cls = torch.randn(n, L, D, generator=g)
    cls[:, PLANTED] += 4 * torch.eye(D)[labels]
    patches[:, PLANTED] += 4 * torch.eye(D)[labels][:, None, None]
    return bank_of(patches, cls, torch.eye(C)[labels], 100 + np.arange(n))


def _splits(bank: FeatureBank, folds: int = 2) -> list[Split]:
    part = np.arange(n) // C % folds
    return [Split(str(k), bank.ids[part != k], bank.ids[part == k]) for k in range(folds)]


def _build(method: str, *, level: str = "clip") -> Probe:
    return build_probe(
        method, classes=C, width=D, depth=L, has_cls=True, level=level, prototypes=32, dropout=0.2
    )


def _validate(bank, methods, *, steps=60, build=_build, splits=None, **words):
    words = {"optim": OPTIM, "batch": 16, "multi_label": False, **words}
    plan = Plan(build=build, loss=LOSSES["ce"], steps=steps, **words)
    return cross_validate(bank, splits or _splits(bank), methods, plan)


def test_gate_finds_the_planted_block(bank):
    results = summary(_validate(bank, ["lcgp", "cgp"]))
    for method in ("lcgp", "cgp"):
        assert results[method]["mean"]["accuracy"] > 0.9, method
        gate = np.mean(list(results[method]["gate"].values()), axis=0)
        assert gate.argmax() == PLANTED
        assert gate.sum() == pytest.approx(1, abs=1e-5)


def test_permuted_labels_give_chance(bank):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    shuffled = bank_of(bank.patches, bank.cls, bank.targets[order], bank.ids)
    for fold_result in _validate(shuffled, ["cgp"]):
        assert fold_result.metrics["accuracy"] < 0.6


def test_a_probe_does_not_depend_on_its_companions(bank):
    alone = _validate(bank, ["cgp"], steps=8)
    together = [o for o in _validate(bank, ["linear", "cgp"], steps=8) if o.method == "cgp"]
    assert alone == together


class _GlobalDraws(LinearCurve):
    """A probe from elsewhere, whose dropout draws from the global generator."""

    def __init__(self, **words):
        super().__init__(**words)
        self.dropout = torch.nn.Dropout(0.5)


def test_fit__results_with_two_threads_are_those_with_one(bank):
    def build(method):
        if method != "global":
            return _build(method)
        return _GlobalDraws(classes=C, width=D, depth=L, has_cls=True)

    cores, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            methods = ["cgp", "protobin", "global"]
            results.append(_validate(bank, methods, steps=20, build=build))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(cores)
    assert results[0] == results[1]


def test_same_seed_same_result_and_another_seed_another(bank):
    first, again = _validate(bank, ["cgp"], steps=8), _validate(bank, ["cgp"], steps=8)
    assert first == again
    other = _validate(bank, ["cgp"], steps=8, seed=1)
    assert first[0].gate != other[0].gate


def test_global_generator_is_left_as_it_was(bank):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    _validate(bank, ["cgp"], steps=3)
    assert torch.equal(torch.rand(4), wanted)


def test_every_probe_trains_at_both_levels_under_autocast(bank):
    for level in ("clip", "frame"):
        methods = expand(["all"], level=level, encoder=False)
        assert len(methods) == (12 if level == "clip" else 8)
        fold_results = _validate(
            bank,
            methods,
            steps=2,
            build=lambda m, level=level: _build(m, level=level),
            autocast=torch.bfloat16,
        )
        assert len(fold_results) == 2 * len(methods)


def test_held_out_clips_are_not_trained_on(bank):
    seen = []

    class Spy(FeatureBank):
        def training(self, ids, *, batch, steps, seed):
            seen.append(set(ids.tolist()))
            return super().training(ids, batch=batch, steps=steps, seed=seed)

    spy = Spy(patches=bank.patches, cls=bank.cls, targets=bank.targets, ids=bank.ids,
              keys=bank.keys, skipped={})  # fmt: skip
    _validate(spy, ["linear"], steps=1)
    for held, used in zip(_splits(bank), seen, strict=True):
        assert used == set(held.train.tolist())
        assert not used & set(held.test.tolist())


def test_callbacks_get_losses_and_probes(bank):
    rows, trained = [], []
    _validate(
        bank,
        ["linear"],
        steps=5,
        log_every=2,
        on_log=rows.append,
        on_probe=lambda probe, own: trained.append((type(probe).__name__, own[0].fold)),
    )
    assert [r["step"] for r in rows if r["fold"] == "0"] == [1, 2, 4, 5]
    assert set(rows[0]) == {"step", "fold", "method", "seed", "lr", "weight_decay", "loss"}
    assert trained == [("Linear", "0"), ("Linear", "1")]


def test_gradient_clipping_and_rate_act(bank):
    def trained(**words):
        torch.manual_seed(0)
        probe = _build("linear")
        optim = Optim(**{**vars(OPTIM), **words})
        batches = bank.training(bank.ids, batch=8, steps=3, seed=0)
        fit({"a": Training(probe, optim, "linear", 0)}, batches, loss=LOSSES["ce"], steps=3)
        return probe.fc.weight.detach()

    base = trained()
    assert torch.equal(base, trained())
    for words in ({"clip_norm": 1e-6, "eps": 1e-3}, {"lr": 0.01}, {"weight_decay": 5.0},
                  {"warmup_steps": 0}, {"betas": [0.1, 0.2]}):  # fmt: skip
        assert not torch.equal(base, trained(**words)), words


def test_fit__each_probe_is_updated_by_its_own_settings(bank):
    features, targets = next(bank.once(bank.ids, batch=16))
    optims = {
        "slow": replace(OPTIM, lr=1e-3, warmup_steps=0, weight_decay=0.5),
        "other": replace(OPTIM, lr=0.02, warmup_steps=0, betas=[0.5, 0.9], eps=0.1),
    }

    def trained(names: list[str], steps: int, stop: str = "") -> dict[str, dict]:
        trainings = {}
        for name in names:
            torch.manual_seed(0)
            trainings[name] = Training(_build("linear"), optims[name], "linear", 0)
        batches = iter([(features, targets)] * steps)
        fit(trainings, batches, loss=LOSSES["ce"], steps=6, after_step=lambda step, _: {stop})
        return {name: dict(t.probe.state_dict()) for name, t in trainings.items()}

    together = trained(list(optims), 6)
    for name in optims:
        torch.testing.assert_close(together[name], trained([name], 6)[name], rtol=0, atol=0)
    stopped = trained(list(optims), 6, stop="slow")
    torch.testing.assert_close(stopped["slow"], trained(["slow"], 1)["slow"], rtol=0, atol=0)
    torch.testing.assert_close(stopped["other"], together["other"], rtol=0, atol=0)


def test_predict_on_nothing_is_an_error():
    with pytest.raises(UserError, match="none of the held-out clips"):
        predict({"linear": _build("linear")}, iter([]))


def test_diverged_training_is_named_and_costs_only_itself(bank):
    wild = Optim(**{**vars(OPTIM), "lr": 1e30, "warmup_steps": 0})
    plan = Plan(build=_build, loss=LOSSES["ce"], optim=wild, steps=4, batch=8, multi_label=False)
    assert cross_validate(bank, _splits(bank), ["linear"], plan) == []
    assert plan.diverged == [("linear", "0", 0), ("linear", "1", 0)]
    assert "linear (1 held out, seed 0); lower optim.lr" in plan.diverged_line()


def test_rows_without_labels_train_nothing_and_are_not_judged(bank):
    """Labels of time patches: what lies beyond a clip's end changes no weight and no metric."""
    targets = bank.targets[:, None].repeat(1, T, 1)
    targets[::2, -1] = torch.nan
    trained, results = [], []
    for noise in (1.0, 100.0):
        patches = bank.patches.clone()
        patches[::2, :, -1] *= noise
        own = bank_of(patches, bank.cls, targets, bank.ids)
        fold_results = _validate(
            own,
            ["linear", "cgp", "curve"],
            steps=5,
            multi_label=True,
            metric="map",
            build=lambda m: (
                LinearCurve(classes=C, width=D, depth=L, has_cls=True, level="frame")
                if m == "curve"
                else _build(m, level="frame")
            ),
            on_probe=lambda probe, own: trained.append(next(iter(probe.state_dict().values()))),
        )
        assert len(fold_results) == 2 * (2 + L)
        results.append([o.metrics for o in fold_results])
    for before, after in zip(trained[: len(trained) // 2], trained[len(trained) // 2 :],
                             strict=True):  # fmt: skip
        assert torch.equal(before, after)
        assert before.isfinite().all()
    assert results[0] == results[1]


def test_rows_of_frames_know_their_clip_across_batches():
    """Five clips of one, no, three, two and three labelled patches, in batches of two."""
    lengths = torch.tensor([1, 0, 3, 2, 3])
    beyond = torch.arange(T) >= lengths[:, None]  # (5, T)
    targets = torch.rand(5, T, C).masked_fill_(beyond[..., None], torch.nan)
    patches = torch.rand(L, 5, T, FREQ, D)
    probe = _build("linear", level="frame")
    whole = probe.eval()(Features(patches, None)).detach()
    batches = [
        (Features(patches[:, i : i + 2], None), targets[i : i + 2]) for i in range(0, 5, 2)
    ]  # fmt: skip
    found = predictions({"linear": probe}, iter(batches))
    assert found.clips.tolist() == [0, 2, 2, 2, 3, 3, 4, 4, 4]
    assert torch.equal(found.targets, targets[~beyond])
    torch.testing.assert_close(found.logits["linear", ""], whole[~beyond])


def test_clip_labels_meet_the_mean_over_time_and_need_no_clip_numbers():
    probe, targets = _build("linear", level="frame"), torch.eye(C)
    features = Features(torch.rand(L, C, T, FREQ, D), None)
    found = predictions({"linear": probe}, iter([(features, targets)]))
    assert found.clips is None
    assert torch.equal(found.targets, targets)
    torch.testing.assert_close(found.logits["linear", ""], probe.eval()(features).mean(1).detach())


class Queried:
    """Stands in for an encoder whose blocks can be queried: queries pass through unchanged."""

    has_queries = True

    def query_blocks(self, queries, features):
        return queries[:, None].expand(-1, features.cls.shape[1], -1, -1)


@pytest.mark.parametrize(
    ("method", "shrink"),
    [
        ("linear", {"fc.weight"}),
        ("cgp", {"fc.weight"}),
        ("protobin", {"fc.weight"}),
        ("protofloat", {"fc.weight"}),
        ("proto", set()),
        ("ep", {"fc.weight", "values.weight"}),
        ("vqt", {"fc.weight"}),
        ("curve", {"weight"}),
    ],
)
def test_the_loop_decays_matrices_and_no_prototypes_or_queries(bank, method, shrink):
    """Without a gradient AdamW's decay is all that moves: by 1 - rate x decay a step."""
    words = {"classes": C, "width": D, "depth": L, "has_cls": True}
    head = {"prototypes": 8, "orthogonality": 0.0, "queries": 2, "pool_queries": 4}
    probe = (LinearCurve(**words) if method == "curve"
             else build_probe(method, **words, **head, encoder=Queried()))  # fmt: skip
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    optim = Optim(lr=0.1, weight_decay=2.0, decay="matrices", warmup_steps=3, min_lr=0.1)
    batches = bank.training(bank.ids, batch=4, steps=2, seed=0)
    fit({"a": Training(probe, optim, method, 0)}, batches, steps=2,
        loss=lambda logits, targets: 0 * logits.sum())  # fmt: skip
    for name, now in probe.named_parameters():
        wanted = before[name] * (0.8**2 if name in shrink else 1)
        torch.testing.assert_close(now.detach(), wanted, msg=f"{method}: {name}")
    assert shrink <= set(before)
