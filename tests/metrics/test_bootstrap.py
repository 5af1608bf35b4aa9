"""The bootstrap against a slow loop that copies rows, and on cases whose truth is known."""

import math

import numpy as np
import pytest
import torch

from bat.metrics import bootstrap
from bat.metrics.bootstrap import difference, draws, interval
from bat.metrics.ranking import Classification, evaluate


def problem(*, several: bool, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets (40, 5); class 4 has no positive clip, class 3 only one."""
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40, 5, generator=g)
    logits = logits.round() if ties else logits
    if several:
        targets = (torch.rand(40, 5, generator=g) < 0.3).float()
        targets[:, 3:] = 0.0
    else:
        targets = torch.eye(5)[torch.randint(3, (40,), generator=g)]
    targets[7] = torch.eye(5)[3]
    return logits + targets, targets


def replicates(
    logits: torch.Tensor,
    targets: torch.Tensor,
    metric: str,
    *,
    several: bool = False,
    resamples: int,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    classification = Classification(multi_label=several, groups=groups)
    classification.update(logits, targets)
    return classification.replicates(metric, resamples=resamples, seed=seed)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("metric", "several"), [("accuracy", False), ("map", False), ("map", True)]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_replicates__metric_of_the_drawn_rows(
    metric: str, several: bool, ties: bool, grouped: bool
) -> None:
    logits, targets = problem(several=several, ties=ties)
    clips = np.arange(40) % 13 if grouped else np.arange(40)
    groups = 100 + clips if grouped else None  # only which rows are alike counts
    found = replicates(
        logits, targets, metric, several=several, resamples=30, seed=5, groups=groups
    )
    expected = []
    for counts in np.concatenate(list(draws(clips.max() + 1, resamples=30, seed=5))):
        rows = [i for c, times in enumerate(counts) for i in [*np.flatnonzero(clips == c)] * times]
        expected.append(evaluate(logits[rows], targets[rows], multi_label=several)[metric])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.std(found) > 0.01  # draws differ


def test_draws__counts_of_clips_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.concatenate(list(draws(9, resamples=4000, seed=0)))
    assert counts.shape == (4000, 9)
    assert (counts.sum(1) == 9).all()
    assert counts.mean(0) == pytest.approx(np.ones(9), abs=0.08)  # 5 standard errors
    assert counts.var() == pytest.approx(8 / 9, abs=0.03)  # binomial: 9 x 1/9 x 8/9
    monkeypatch.setattr(bootstrap, "CELLS", 9 * 7)
    blocks = [len(block) for block in draws(9, resamples=30, seed=0)]
    assert blocks == [7, 7, 7, 7, 2]


def test_replicates__same_seed_same_draws_whatever_the_outputs() -> None:
    logits, targets = problem(several=False, ties=False)
    one = replicates(logits, targets, "accuracy", resamples=50, seed=1)
    worse = logits.clone()
    worse[0] = -20 * targets[0]  # wrong on clip 0, which one was right or wrong about
    other = replicates(worse, targets, "accuracy", resamples=50, seed=1)
    drawn = np.concatenate(list(draws(40, resamples=50, seed=1)))[:, 0]
    lost = drawn / 40 * float(logits[0].argmax() == targets[0].argmax())
    np.testing.assert_allclose(one - other, lost, atol=1e-12)
    assert (one != replicates(logits, targets, "accuracy", resamples=50, seed=2)).any()


def test_replicates__draw_without_any_class_has_no_value() -> None:
    logits, targets = torch.randn(3, 2), torch.zeros(3, 2)
    targets[0, 0] = 1.0
    found = replicates(logits, targets, "map", several=True, resamples=60)
    drawn = np.concatenate(list(draws(3, resamples=60, seed=0)))[:, 0] > 0
    assert 0 < drawn.sum() < 60
    assert (np.isnan(found) == ~drawn).all()
    assert interval(found) == interval(found[drawn])
    nothing = replicates(logits, torch.zeros(3, 2), "map", several=True, resamples=60)
    assert np.isnan(nothing).all()
    assert all(math.isnan(v) for v in interval(nothing))


def test_interval__middle_share_moved_to_the_value() -> None:
    values = np.arange(101) / 100
    assert interval(values, 0.9) == pytest.approx((0.05, 0.95))
    assert interval(values, 0.9, at=0.4) == pytest.approx((0.0, 0.85))  # -0.05 is no fraction
    assert interval(values, 0.9, at=0.6) == pytest.approx((0.15, 1.0))
    assert difference(values + 0.25, values) == pytest.approx((0.25, 0.25))
    assert difference(values, 0 * values, 0.5, at=0.0) == pytest.approx((-0.25, 0.25))


def test_interval__accuracy_is_covered_as_often_as_stated() -> None:
    """Of 200 sets of 100 clips from a classifier right 3 times in 4, 95% cover it: 4 sigma."""
    g = torch.Generator().manual_seed(0)
    targets, covered = torch.eye(2)[:1].expand(100, 2), 0
    for _ in range(200):
        right = (torch.rand(100, generator=g) < 0.75).float()
        found = replicates(torch.stack([right, 1 - right], 1), targets, "accuracy", resamples=200)
        low, high = interval(found, at=float(right.mean()))
        covered += low <= 0.75 <= high
    assert 0.885 < covered / 200 < 1


def test_interval__moved_replicates_cover_a_low_map() -> None:
    """Outputs that know nothing: replicates lie above the truth, moved ones around it."""
    g = torch.Generator().manual_seed(0)

    def one() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(100, 60, generator=g), (torch.rand(100, 60, generator=g) < 0.04).float()

    def score(logits: torch.Tensor, targets: torch.Tensor) -> float:
        return float(evaluate(logits, targets, multi_label=True)["map"])

    truth = np.mean([score(*one()) for _ in range(30)])
    plain = moved = 0
    for _ in range(16):
        logits, targets = one()
        found = replicates(logits, targets, "map", several=True, resamples=50)
        low, high = interval(found)
        plain += low <= truth <= high
        low, high = interval(found, at=score(logits, targets))
        moved += low <= truth <= high
    assert moved / 16 > 0.8
    assert plain < 8
