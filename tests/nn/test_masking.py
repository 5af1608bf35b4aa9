"""Inverse block masks: exact counts, the golden distribution, the slow version, seeds.

What holds of masks holds however their bits are drawn: from a generator, or from a seed a row.
"""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bat.nn.masking import block_that_fits, blocks_around, inverse_block_mask, row_seeds, splitmix64
from bat.types import Grid, Views
from tests.reference import masks as slow

PAPER = Grid(64, 8)


Draw = Callable[..., Views]


@pytest.fixture(params=["generator", "seeds"])
def draw(request: pytest.FixtureRequest) -> Draw:
    """``draw(rows, seed=, grid=, keep_ratio=)``."""

    def masks(rows: int, seed: int = 0, grid: Grid = PAPER, keep_ratio: float = 1 - 0.8) -> Views:
        if request.param == "generator":
            g = torch.Generator().manual_seed(seed)
            return inverse_block_mask(rows, grid, keep_ratio=keep_ratio, generator=g)
        seeds = row_seeds(seed, torch.arange(-(-rows // 4)), 4)[:rows]
        return inverse_block_mask(rows, grid, keep_ratio=keep_ratio, seeds=seeds)

    return masks


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


def test_masks__every_row_keeps_exactly_102_of_512_ascending_and_its_own(draw: Draw) -> None:
    views = draw(500, seed=3)
    assert views.keep_ids.shape == (500, 102)
    assert views.keep_ids.dtype == torch.int64
    assert (views.keep_ids.diff(dim=1) > 0).all()
    assert ((~views.mask).sum(1) == 102).all()
    assert not views.mask.gather(1, views.keep_ids).any()
    assert len({tuple(r.tolist()) for r in views.keep_ids[:64]}) == 64
    assert torch.equal(views.keep_ids, draw(500, seed=3).keep_ids)
    assert not torch.equal(views.keep_ids, draw(500, seed=4).keep_ids)


def test_blocks_around__equal_the_slow_version_for_random_centres() -> None:
    rng = random.Random(0)
    for time, freq in ((64, 8), (13, 8), (5, 3)):
        for _ in range(20):
            centres = [rng.randrange(time * freq) for _ in range(4)]
            fast = blocks_around(torch.tensor([centres]), Grid(time, freq), 5)[0]
            assert set(fast.nonzero()[:, 0].tolist()) == slow.blocks_around(centres, time, freq, 5)


@pytest.mark.parametrize("grid", [Grid(12, 8), Grid(7, 8), Grid(4, 4)])
def test_masks__distribution_equals_the_slow_version(draw: Draw, grid: Grid) -> None:
    rows = 3000
    rng = random.Random(1)
    counts = np.zeros(grid.tokens)
    for _ in range(rows):
        counts[slow.inverse_block_mask(grid.time, grid.freq, 0.2, 5, 0.07, rng)] += 1
    fast = map_of(draw(rows, grid=grid, keep_ratio=0.2), grid).ravel()
    # two independent estimates of a frequency near 0.2: deviation of the difference 0.0103
    assert np.abs(fast - counts / rows).max() < 5 * 0.0103


def test_block_that_fits__largest_side_that_is_drawn() -> None:
    paper = {"keep_ratio": 1 - 0.8, "block": 5, "adjust": 0.07}
    sides = [block_that_fits(grid, **paper) for grid in (PAPER, Grid(13, 8), Grid(7, 8))]
    assert sides == [5, 5, 3]  # of 56 patches int(15.1 / 25) = 0 centres are drawn
    assert block_that_fits(Grid(2, 1), **paper) == 1


def test_masks__too_small_a_grid_is_refused(draw: Draw) -> None:
    with pytest.raises(ValueError, match="keeps 0 of 2 patches"):
        draw(1, grid=Grid(2, 1))


def test_golden_masks__centres_to_blocks(golden) -> None:
    cases = json.loads((golden / "masks.json").read_text())["inverse_block_mask"][
        "centres_to_blocks"
    ]
    for case in cases:
        centres = case["centres"]
        flat = [c if isinstance(c, int) else c[0] * 8 + c[1] for c in centres]
        kept = blocks_around(torch.tensor([flat]), PAPER, 5)[0].nonzero()[:, 0].tolist()
        expected = next(v for k, v in case.items() if "kept" in k and isinstance(v, list))
        assert kept == sorted(expected)


def test_golden_masks__distribution(draw: Draw, golden) -> None:
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


def test_golden_masks__counts_on_other_grids(draw: Draw, golden) -> None:
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


def test_splitmix64__equals_the_published_numbers() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    published += [4593380528125082431, 16408922859458223821]  # of seed 1234567
    got = splitmix64(torch.tensor([1234567, -1]), 5)
    assert [v % 2**64 for v in got[0].tolist()] == published
    state, expected = 2**64 - 1, []  # the other seed, by Python's integers
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert [v % 2**64 for v in got[1].tolist()] == expected


def test_row_seeds__masks_of_a_clip_depend_on_its_place_alone() -> None:
    def masks(positions: list[int], seed: int = 5) -> torch.Tensor:
        seeds = row_seeds(seed, torch.tensor(positions), 3)
        views = inverse_block_mask(len(seeds), PAPER, keep_ratio=1 - 0.8, seeds=seeds)
        return views.keep_ids.view(len(positions), 3, -1)

    together = masks([10, 11, 2**40])
    assert torch.equal(together[1:2], masks([11]))
    assert torch.equal(together.flip(0), masks([2**40, 11, 10]))
    assert not torch.equal(together, masks([10, 11, 2**40], seed=6))


def test_row_seeds__are_all_different_and_their_bits_even() -> None:
    seeds = row_seeds(3, torch.arange(100_000), 16)
    assert len(seeds.unique()) == 1_600_000
    bits = splitmix64(row_seeds(1, torch.arange(2000), 4), 16).flatten()
    ones = torch.stack([((bits >> k) & 1).double().mean() for k in range(64)])
    assert float((ones - 0.5).abs().max()) < 5 * 0.5 / len(bits) ** 0.5


def test_row_seeds__masks_of_neighbouring_places_and_views_are_independent() -> None:
    views, clips = 4, 4000
    seeds = row_seeds(0, torch.arange(clips), views)
    kept = ~inverse_block_mask(len(seeds), PAPER, keep_ratio=1 - 0.8, seeds=seeds).mask
    kept = kept.float().view(clips, views, -1)
    expected = float(kept.mean((0, 1)).square().sum())  # patches that two strangers share
    for a, b in (
        (kept[:-1, 0], kept[1:, 0]),
        (kept[:, 0], kept[:, 1]),
        (kept[1:, 0], kept[:-1, 1]),
    ):
        shared = (a * b).sum(1)
        assert float(shared.mean()) == pytest.approx(expected, abs=5 * float(shared.std()) / 60)
