"""Metrics on cases small enough to work out by hand, and against two libraries."""

import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from bat.errors import UserError
from bat.metrics.ranking import evaluate, summarise


def test_perfect_single_label():
    targets = torch.eye(3).repeat(2, 1)
    found = evaluate(10 * targets, targets, multi_label=False)
    assert found.pop("dprime") > 2
    assert found.pop("per_class") == {"ap": [1.0] * 3, "auroc": [1.0] * 3, "positives": [2] * 3}
    assert found.pop("absent") == []
    assert found == dict.fromkeys(["accuracy", "map", "f1", "f1_micro", "auroc"], 1.0)


def test_single_label_by_hand():
    logits = torch.tensor([[2.0, 1.0], [2.0, 0.0], [1.0, 0.0]]).log()  # p0 = 2/3, 1, 1
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    logits = logits.clamp(min=-50)
    found = evaluate(logits, targets, multi_label=False)
    assert found["accuracy"] == pytest.approx(2 / 3)
    # class 0: of the two tied at 1 one is right, then all; class 1: the positive comes second
    assert found["map"] == pytest.approx((0.5 * (1 / 2) + 0.5 * (2 / 3) + 1 / 2) / 2)


def test_multi_label_by_hand():
    logits = torch.tensor([[3.0, -1.0], [1.0, 2.0], [-2.0, 1.0], [2.0, -3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    found = evaluate(logits, targets, multi_label=True)
    ap = (1.0, 0.5 * 1 + 0.5 * (2 / 4))
    f1 = (2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1 + 1))
    assert found["map"] == pytest.approx(sum(ap) / 2)
    assert found["f1"] == pytest.approx(sum(f1) / 2)
    assert "accuracy" not in found


def test_class_without_positives_is_left_out_and_reported():
    logits = torch.tensor([[3.0, -1.0, 5.0], [1.0, 2.0, 5.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = evaluate(logits, targets, multi_label=True)
    assert found["map"] == 1.0
    assert found["absent"] == [2]
    nothing = evaluate(logits, torch.zeros(2, 3), multi_label=True)
    assert all(math.isnan(nothing[name]) for name in ("map", "f1", "auroc", "dprime"))
    assert nothing["f1_micro"] == 0  # decisions were made, none of them right
    assert nothing["absent"] == [0, 1, 2]


def test_confident_logits_do_not_tie():
    logits = torch.tensor([[90.0], [95.0], [-120.0]])
    targets = torch.tensor([[0.0], [1.0], [0.0]])
    assert evaluate(logits, targets, multi_label=True)["map"] == pytest.approx(0.5)
    assert evaluate(logits / 4, targets, multi_label=True)["map"] == 1.0


def test_not_finite_is_an_error():
    with pytest.raises(UserError, match="not finite"):
        evaluate(torch.tensor([[math.nan, 0.0]]), torch.eye(2)[:1], multi_label=False)


def test_summary_over_folds():
    assert summarise([0.5, 0.7]) == pytest.approx((0.6, 0.1))
    assert summarise([0.5]) == (0.5, 0.0)


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets (60, 7): class 5 has no positive clip, class 6 of several only those."""
    g = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(60, 7, generator=g)
    if "ties" in kind:
        logits = logits.round()
    if "single" in kind:
        targets = torch.eye(7)[torch.randint(5, (60,), generator=g)]
        return logits + targets, targets
    targets = (torch.rand(60, 7, generator=g) < 0.25).float()
    targets[:, 5], targets[:, 6] = 0.0, 1.0
    return logits + targets - 1, targets


KINDS = ["single", "single, ties", "several", "several, ties"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_is_scikit_learns(kind: str) -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with librosa")
    logits, targets = problem(kind)
    several = "several" in kind
    found = evaluate(logits, targets, multi_label=several)
    hard, outputs = targets.numpy().astype(int), logits.double()
    scores = (outputs.sigmoid() if several else outputs.softmax(1)).numpy()
    decided = (scores > 0.5).astype(int) if several else np.eye(7)[scores.argmax(1)].astype(int)
    present = [c for c in range(7) if hard[:, c].any()]
    mixed = [c for c in present if not hard[:, c].all()]
    ap = {c: sk.average_precision_score(hard[:, c], scores[:, c]) for c in present}
    auroc = {c: sk.roc_auc_score(hard[:, c], scores[:, c]) for c in mixed}
    f1 = sk.f1_score(hard, decided, labels=present, average="macro", zero_division=0)
    expected = {
        "map": np.mean(list(ap.values())),
        "f1": f1,
        "f1_micro": sk.f1_score(hard, decided, average="micro"),
        "auroc": np.mean(list(auroc.values())),
    }
    if not several:
        expected["accuracy"] = sk.accuracy_score(hard.argmax(1), decided.argmax(1))
        expected["f1_micro"] = expected["accuracy"]
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert ("accuracy" in found) != several
    assert found["per_class"]["ap"] == pytest.approx([ap.get(c) for c in range(7)], abs=1e-12)
    assert found["per_class"]["auroc"] == pytest.approx([auroc.get(c) for c in range(7)], abs=1e-12)
    assert found["per_class"]["positives"] == hard.sum(0).tolist()
    assert found["absent"] == sorted(set(range(7)) - set(present))
    assert mixed == ([0, 1, 2, 3, 4])  # the cases are as hard as they say: none, all, mixed


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_is_torchmetrics(kind: str) -> None:
    logits, targets = problem(kind)
    several = "several" in kind
    found = evaluate(logits, targets, multi_label=several)
    hard, outputs = targets.long(), logits.double()
    scores = outputs.sigmoid() if several else outputs.softmax(1)
    present = [c for c in range(7) if hard[:, c].any()]
    mixed = [c for c in present if not hard[:, c].all()]
    pairs = {c: (scores[:, c], hard[:, c]) for c in present}
    expected = {
        "map": np.mean([float(tm.binary_average_precision(*pairs[c])) for c in present]),
        "auroc": np.mean([float(tm.binary_auroc(*pairs[c])) for c in mixed]),
    }
    if several:
        expected["f1"] = np.mean([float(tm.binary_f1_score(*pairs[c])) for c in present])
        expected["f1_micro"] = float(tm.multilabel_f1_score(scores, hard, 7, average="micro"))
    else:
        answers, truth = scores.argmax(1), hard.argmax(1)
        each = tm.multiclass_f1_score(answers, truth, 7, average="none")
        expected["f1"] = float(each[present].mean())
        expected["f1_micro"] = float(tm.multiclass_f1_score(answers, truth, 7, average="micro"))
        expected["accuracy"] = float(tm.multiclass_accuracy(answers, truth, 7, average="micro"))
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=2e-6)  # theirs is float32


def test_dprime_is_of_the_macro_auroc_and_stays_finite() -> None:
    logits, targets = problem("several")
    found = evaluate(logits, targets, multi_label=True)
    # d' = sqrt(2) z: a standard normal is below z with the AUROC's probability
    below = 0.5 * (1 + math.erf(found["dprime"] / 2))
    assert below == pytest.approx(found["auroc"], abs=1e-12)
    perfect = torch.eye(3).repeat(2, 1)  # 3 classes x 2 positives x 4 negatives: 24 pairs
    best = evaluate(9 * perfect, perfect, multi_label=False)["dprime"]
    assert 0.5 * (1 + math.erf(best / 2)) == pytest.approx(1 - 1 / 48)
    assert evaluate(-9 * perfect, perfect, multi_label=False)["dprime"] == pytest.approx(-best)


def test_results_survive_json() -> None:
    logits, targets = problem("several")
    found = evaluate(logits, targets, multi_label=True)
    assert json.loads(json.dumps(found)) == found
