"""Metrics of classifiers by hand, and against two libraries."""

import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from bat.errors import UserError
from bat.metrics.ranking import evaluate, summarise


def test_evaluate__single_label_by_hand() -> None:
    targets = torch.eye(3).repeat(2, 1)
    found = evaluate(10 * targets, targets, multi_label=False)
    assert {found[k] for k in ("accuracy", "map", "f1", "f1_micro", "auroc")} == {1.0}
    assert found["per_class"] == {"ap": [1.0] * 3, "auroc": [1.0] * 3, "positives": [2] * 3}
    assert found["absent"] == []
    logits = torch.tensor([[2.0, 1.0], [2.0, 0.0], [1.0, 0.0]]).log()  # p0 = 2/3, 1, 1
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = evaluate(logits.clamp(min=-50), targets, multi_label=False)
    assert found["accuracy"] == pytest.approx(2 / 3)
    # class 0: of the two tied at 1 one is right, then all; class 1: the positive comes second
    assert found["map"] == pytest.approx((0.5 * (1 / 2) + 0.5 * (2 / 3) + 1 / 2) / 2)


def test_evaluate__multi_label_by_hand() -> None:
    logits = torch.tensor([[3.0, -1.0], [1.0, 2.0], [-2.0, 1.0], [2.0, -3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    found = evaluate(logits, targets, multi_label=True)
    ap = (1.0, 0.5 * 1 + 0.5 * (2 / 4))
    f1 = (2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1 + 1))
    assert found["map"] == pytest.approx(sum(ap) / 2)
    assert found["f1"] == pytest.approx(sum(f1) / 2)
    assert "accuracy" not in found


def test_evaluate__class_without_positives_is_excluded_and_reported() -> None:
    logits = torch.tensor([[3.0, -1.0, 5.0], [1.0, 2.0, 5.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = evaluate(logits, targets, multi_label=True)
    assert found["map"] == 1.0
    assert found["absent"] == [2]
    nothing = evaluate(logits, torch.zeros(2, 3), multi_label=True)
    assert all(math.isnan(nothing[name]) for name in ("map", "f1", "auroc", "dprime"))
    assert nothing["f1_micro"] == 0  # decisions were made, none of them right
    assert nothing["absent"] == [0, 1, 2]


def test_evaluate__confident_logits_do_not_tie() -> None:
    logits = torch.tensor([[90.0], [95.0], [-120.0]])
    targets = torch.tensor([[0.0], [1.0], [0.0]])
    assert evaluate(logits, targets, multi_label=True)["map"] == pytest.approx(0.5)
    assert evaluate(logits / 4, targets, multi_label=True)["map"] == 1.0


def test_evaluate__outputs_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(UserError, match="not finite"):
        evaluate(torch.tensor([[math.nan, 0.0]]), torch.eye(2)[:1], multi_label=False)


def test_summarise__population_deviation() -> None:
    assert summarise([0.5, 0.7]) == pytest.approx((0.6, 0.1))
    assert summarise([0.5]) == (0.5, 0.0)
    assert all(math.isnan(value) for value in summarise([0.5, math.nan]))


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


@pytest.mark.parametrize("kind", ["single", "single, ties", "several", "several, ties"])
def test_evaluate__equals_scikit_learn_and_torchmetrics(kind: str) -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with librosa")
    logits, targets = problem(kind)
    several = "several" in kind
    found = evaluate(logits, targets, multi_label=several)
    assert ("accuracy" in found) != several
    assert json.loads(json.dumps(found)) == found

    outputs = logits.double()
    scores = outputs.sigmoid() if several else outputs.softmax(1)
    decided = (scores > 0.5).int() if several else torch.eye(7)[scores.argmax(1)].int()
    hard = targets.int().numpy()
    present = [c for c in range(7) if hard[:, c].any()]
    mixed = [c for c in present if not hard[:, c].all()]
    assert mixed == [0, 1, 2, 3, 4]  # the cases are as hard as they say: none, all, mixed
    ap = {c: sk.average_precision_score(hard[:, c], scores[:, c]) for c in present}
    auroc = {c: sk.roc_auc_score(hard[:, c], scores[:, c]) for c in mixed}
    expected = {
        "map": np.mean(list(ap.values())),
        "f1": sk.f1_score(hard, decided, labels=present, average="macro", zero_division=0),
        "f1_micro": sk.f1_score(hard, decided, average="micro"),
        "auroc": np.mean(list(auroc.values())),
    }
    if not several:
        expected["accuracy"] = sk.accuracy_score(hard.argmax(1), decided.argmax(1))
        expected["f1_micro"] = expected["accuracy"]
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert found["per_class"]["ap"] == pytest.approx([ap.get(c) for c in range(7)], abs=1e-12)
    assert found["per_class"]["auroc"] == pytest.approx([auroc.get(c) for c in range(7)], abs=1e-12)
    assert found["per_class"]["positives"] == hard.sum(0).tolist()
    assert found["absent"] == sorted(set(range(7)) - set(present))

    true = targets.long()
    if several:
        f1 = [float(tm.binary_f1_score(scores[:, c], true[:, c])) for c in present]
        micro = tm.multilabel_f1_score(scores, true, 7, average="micro")
    else:
        answers, truth = scores.argmax(1), true.argmax(1)
        f1 = tm.multiclass_f1_score(answers, truth, 7, average="none")[present].tolist()
        micro = tm.multiclass_f1_score(answers, truth, 7, average="micro")
    theirs = {
        "map": np.mean(
            [float(tm.binary_average_precision(scores[:, c], true[:, c])) for c in present]
        ),
        "auroc": np.mean([float(tm.binary_auroc(scores[:, c], true[:, c])) for c in mixed]),
        "f1": np.mean(f1),
        "f1_micro": float(micro),
    }
    assert {k: found[k] for k in theirs} == pytest.approx(theirs, abs=2e-6)  # theirs is float32


def test_evaluate__dprime_is_of_the_macro_auroc_and_finite() -> None:
    logits, targets = problem("several")
    found = evaluate(logits, targets, multi_label=True)
    # d' = sqrt(2) z: a standard normal is below z with the AUROC's probability
    below = 0.5 * (1 + math.erf(found["dprime"] / 2))
    assert below == pytest.approx(found["auroc"], abs=1e-12)
    perfect = torch.eye(3).repeat(2, 1)  # 3 classes x 2 positives x 4 negatives: 24 pairs
    best = evaluate(9 * perfect, perfect, multi_label=False)["dprime"]
    assert 0.5 * (1 + math.erf(best / 2)) == pytest.approx(1 - 1 / 48)
    assert evaluate(-9 * perfect, perfect, multi_label=False)["dprime"] == pytest.approx(-best)
