"""Metrics on cases small enough to work out by hand."""

import math

import pytest
import torch

from bat.shapes import UserError
from bat.train.metrics import evaluate, summarise


def test_perfect_single_label():
    targets = torch.eye(3).repeat(2, 1)
    found = evaluate(10 * targets, targets, multi_label=False)
    assert found == {"accuracy": 1.0, "map": 1.0, "absent": []}


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
    assert math.isnan(nothing["map"])
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
    assert summarise([0.5, 0.7]) == pytest.approx((0.6, math.sqrt(0.02)))
    assert summarise([0.5]) == (0.5, 0.0)
