"""Inverse block masks: exact counts, the golden distribution, the slow version, seeds."""

import json
import random

import numpy as np
import pytest
import torch

from bat.nn.masking import blocks_around, inverse_block_mask
from bat.shapes import Grid
from tests.reference import masks as slow

PAPER = Grid(64, 8)


def draw(rows: int, seed: int = 0, grid: Grid = PAPER, keep_ratio: float = 1 - 0.8):
    g = torch.Generator().manual_seed(seed)
    return inverse_block_mask(rows, grid, keep_ratio=keep_ratio, generator=g)


def map_of(views, grid: Grid) -> np.ndarray:
    return (~views.mask).float().mean(0).view(grid.time, grid.freq).numpy()


def agreement(mask: torch.Tensor, grid: Grid) -> float:
    """Kept 4-neighbours of kept patches over existing 4-neighbours, mean over rows."""
    kept = (~mask).float().view(-1, grid.time, grid.freq)
    ones = torch.ones_like(kept)

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        return (
            padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        )

    share = (kept * neighbours(kept)).sum((1, 2)) / (kept * neighbours(ones)).sum((1, 2))
    return float(share.mean())


def test_every_row_keeps_exactly_102_of_512_ascending() -> None:
    views = draw(500)
    assert views.keep_ids.shape == (500, 102)
    assert views.keep_ids.dtype == torch.int64
    assert (views.keep_ids.diff(dim=1) > 0).all()
    assert ((~views.mask).sum(1) == 102).all()
    assert not views.mask.gather(1, views.keep_ids).any()


def test_same_seed_same_masks_other_seed_other_masks() -> None:
    assert torch.equal(draw(8, seed=3).keep_ids, draw(8, seed=3).keep_ids)
    assert not torch.equal(draw(8, seed=3).keep_ids, draw(8, seed=4).keep_ids)


def test_rows_differ_from_each_other() -> None:
    ids = draw(64).keep_ids
    assert len({tuple(r.tolist()) for r in ids}) == 64


def test_blocks_equal_the_slow_version_for_random_centres() -> None:
    rng = random.Random(0)
    for time, freq in ((64, 8), (13, 8), (5, 3)):
        for _ in range(20):
            centres = [rng.randrange(time * freq) for _ in range(4)]
            fast = blocks_around(torch.tensor([centres]), Grid(time, freq), 5)[0]
            assert set(fast.nonzero()[:, 0].tolist()) == slow.blocks_around(centres, time, freq, 5)


def test_distribution_equals_the_slow_version() -> None:
    grid, rows = Grid(12, 8), 3000
    rng = random.Random(1)
    counts = np.zeros(grid.tokens)
    for _ in range(rows):
        counts[slow.inverse_block_mask(grid.time, grid.freq, 0.2, 5, 0.07, rng)] += 1
    fast = map_of(draw(rows, grid=grid, keep_ratio=0.2), grid).ravel()
    # two independent estimates of a frequency near 0.2: deviation of the difference 0.0103
    assert np.abs(fast - counts / rows).max() < 5 * 0.0103


def test_too_small_a_grid_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="keeps 0 of 2 patches"):
        draw(1, grid=Grid(2, 1))


def test_golden_centres_to_blocks(golden) -> None:
    cases = json.loads((golden / "masks.json").read_text())["inverse_block_mask"][
        "centres_to_blocks"
    ]
    for case in cases:
        centres = case["centres"]
        flat = [c if isinstance(c, int) else c[0] * 8 + c[1] for c in centres]
        kept = blocks_around(torch.tensor([flat]), PAPER, 5)[0].nonzero()[:, 0].tolist()
        expected = next(v for k, v in case.items() if "kept" in k and isinstance(v, list))
        assert kept == sorted(expected)


def test_golden_distribution(golden) -> None:
    stats = json.loads((golden / "masks.json").read_text())["inverse_block_mask"]["stats"]
    rows = 20_000
    views = draw(rows, seed=11)
    expected = np.array(stats["keep_freq_map"])
    # both maps come from 20,000 draws: standard error 0.0028 each, 0.004 of the difference
    difference = map_of(views, PAPER) - expected
    assert np.abs(difference).max() < 5 * 0.004
    assert np.sqrt((difference**2).mean()) < 1.3 * 0.004
    assert agreement(views.mask, PAPER) == pytest.approx(
        stats["neighbour_agreement_mean"], abs=0.004
    )
    columns = (~views.mask).view(rows, 64, 8).any(2).sum(1).float()
    assert float(columns.mean()) == pytest.approx(
        stats["time_columns_with_any_kept_mean"], abs=0.15
    )
    kept = (~views.mask).view(rows, 64, 8).float()
    for pair, expected_joint in stats["joint_keep_prob"].items():
        a, b = (int(v) for v in pair.split(","))
        first = kept[:, max(0, -a) : 64 - max(0, a), max(0, -b) : 8 - max(0, b)]
        second = kept[:, max(0, a) : 64 - max(0, -a), max(0, b) : 8 - max(0, -b)]
        assert float((first * second).mean()) == pytest.approx(expected_joint, abs=0.003), pair


def test_golden_counts_on_other_grids(golden) -> None:
    for case in json.loads((golden / "masks.json").read_text())["inverse_block_mask_other"]:
        grid, ratio = Grid(case["grid_time"], case["grid_freq"]), case["mask_ratio"]
        views = draw(2000, grid=grid, keep_ratio=1 - ratio)
        assert views.keep_ids.shape[1] == case["target_kept"]
        assert agreement(views.mask, grid) == pytest.approx(
            case["stats"]["neighbour_agreement_mean"], abs=0.015
        )
        if "keep_freq_map" in case["stats"]:
            expected = np.array(case["stats"]["keep_freq_map"])
            sigma = np.sqrt(2 * 0.25 / 2000)
            assert np.abs(map_of(views, grid) - expected).max() < 5 * sigma
