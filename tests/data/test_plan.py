"""The plan: every clip once an epoch, whoever reads, in an order that hangs on nothing else."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from bat.data.balance import class_balance
from bat.data.draws import below, philox
from bat.data.plan import MIX_BLOCK, MixedPlan, Plan, make_plan
from bat.data.stream import Item, PlanSampler
from bat.errors import UserError

CASES = [  # clips, batch, world
    (10, 4, 1),
    (10, 3, 2),
    (7, 16, 1),
    (1, 2, 3),
    (64, 8, 8),
    (101, 5, 3),
]


def global_batches(
    plan: Plan, batch: int, world: int, *, first: int = 0, count: int
) -> list[list[Item]]:
    """Micro-batches ``first ..`` as all ranks together see them, by position."""
    how: dict[str, Any] = {"batch": batch, "batches": count, "batches_done": lambda: first}
    ranks = [PlanSampler(plan, rank=rank, world=world, **how) for rank in range(world)]
    return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("n", "batch", "world"), CASES)
def test_plan__every_clip_exactly_once_an_epoch(n: int, batch: int, world: int) -> None:
    plan = Plan(n, seed=3)
    count = -(-3 * n // (batch * world))  # three epochs at least
    batches = global_batches(plan, batch, world, count=count)
    items = list(itertools.chain(*batches))
    assert [p for p, _ in items] == list(range(count * batch * world))
    for epoch in range(3):
        clips = [c for _, c in items[epoch * n : (epoch + 1) * n]]
        assert sorted(clips) == list(range(n))
        assert clips == plan.order(epoch).tolist()


@pytest.mark.parametrize(("n", "batch", "world"), CASES)
def test_plan__going_on_anywhere_equals_not_stopping(n: int, batch: int, world: int) -> None:
    plan = Plan(n, seed=1)
    whole = global_batches(plan, batch, world, count=12)
    for first in (1, 5, 11):
        assert global_batches(plan, batch, world, first=first, count=12 - first) == whole[first:]


@pytest.mark.parametrize(("n", "batch", "world"), [(10, 3, 2), (64, 8, 8), (101, 5, 4)])
def test_plan__another_world_with_the_same_global_batch_keeps_the_batches(
    n: int, batch: int, world: int
) -> None:
    many, half, one = (
        global_batches(Plan(n, seed=1), batch * k, world // k, first=4, count=9)
        for k in (1, 2, world)
    )
    assert many == one == half


def test_plan__order_depends_on_seed_and_epoch_only() -> None:
    order = Plan(8, seed=0).order
    assert order(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]  # a change here breaks running resumes
    assert order(1).tolist() != order(0).tolist()
    assert Plan(8, seed=1).order(0).tolist() != order(0).tolist()
    assert Plan([5, 7, 9], seed=4).order(2).tolist() == [
        [5, 7, 9][i] for i in Plan(3, seed=4).order(2)
    ]


def test_plan__orders_of_earlier_versions_are_kept() -> None:
    """A change here breaks running resumes."""
    some: dict[str, Any] = {"seed": 5, "window": 64}
    plans = [
        Plan(1000, **some, shard=SHARD),
        Plan(np.arange(0, 1000, 3), **some, shard=SHARD[::-1].copy(), epoch_clips=200),
        Plan(1000, seed=5),
        Plan(1000, seed=5, keyed=True),
    ]
    then = [
        [1098260333, 1284026181, 4047089893, 52214495],
        [2887909058, 872037189, 1732131396, 334067424],
    ]
    assert [[zlib.crc32(p.order(e).astype("<i8").tobytes()) for p in plans] for e in (0, 3)] == then
    same_shards = Plan(1000, **some, shard=SHARD.astype(np.int32))
    assert same_shards.identity() == "1000 clips (70274682), windows of 64 over shards (26c271ac)"


def test_plan__keyed_order_is_an_even_permutation_without_memory() -> None:
    for n in (1, 2, 3, 7, 99, 100, 101, 4097):
        plan = Plan(n, seed=n, keyed=True)
        assert [sorted(plan.order(e).tolist()) for e in (0, 1)] == [list(range(n))] * 2
    found = Counter(tuple(Plan(4, seed=s, keyed=True).order(0).tolist()) for s in range(2400))
    assert len(found) == 24
    assert sum((k - 100) ** 2 / 100 for k in found.values()) < 60  # chi-square of 23: p = 4e-5
    steps = np.diff(Plan(100_000, seed=0, keyed=True).order(2))
    assert np.abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.02  # as of independent ones
    huge = Plan(10**12, seed=0, keyed=True)
    tracemalloc.start()
    clips = huge.clips(np.arange(10**12 - 500, 10**12 + 500))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(set(clips[:500].tolist())) == 500
    assert np.abs(clips[500:].mean() / 10**12 - 0.5) < 0.1
    assert len(pickle.dumps(huge)) < 1000


def test_plan__keyed_order_of_some_clips() -> None:
    some, few = np.arange(0, 90, 3), Plan(100, seed=1, epoch_clips=30, keyed=True)
    assert sorted(Plan(some, seed=1, keyed=True).order(4).tolist()) == some.tolist()
    orders = [few.order(e).tolist() for e in range(50)]
    assert {len(set(order)) for order in orders} == {30}
    assert set().union(*orders) == set(range(100))
    assert set(itertools.islice(few.stand_ins(65), 300)) == set(orders[2])
    with pytest.raises(UserError, match="shuffle=keyed and balance=class"):
        make_plan(some_index(), seed=0, shuffle="keyed", balance="class", epoch_clips=5)


def test_plan__large_set_takes_the_keyed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bat.data.plan.KEYED_FROM", 30)
    assert make_plan(some_index(), seed=0).identity() == "30 clips (from 0), keyed"
    assert "keyed" not in make_plan(some_index(), np.arange(29), seed=0).identity()
    assert "keyed" not in make_plan(some_index(), seed=0, shuffle="exact").identity()
    assert "windows" in make_plan(some_index(remote=True), seed=0).identity()
    balanced = make_plan(some_index(), seed=0, balance="class", epoch_clips=5)
    assert "keyed" not in balanced.identity()


def test_plan__window_of_many_clips_is_made_without_the_others() -> None:
    shard = np.repeat(np.arange(2000, dtype=np.int32), 1000)
    plan = Plan(2_000_000, seed=0, window=512, shard=shard)
    tracemalloc.start()
    clips = plan.clips(np.arange(1_000_000, 1_000_100))
    assert tracemalloc.get_traced_memory()[1] < 8 * 2_000_000  # not one array of all
    tracemalloc.stop()
    assert len(np.unique(shard[clips])) <= 2


def test_plan__orders_are_uniform() -> None:
    first = Counter(int(Plan(5, seed=s).order(e)[0]) for s in range(100) for e in range(20))
    assert all(abs(first[c] - 400) < 5 * np.sqrt(400 * 0.8) for c in range(5))
    draws = Counter(below(3, philox(0, i, 1)) for i in range(3000))
    assert all(abs(draws[c] - 1000) < 130 for c in range(3))


def test_plan__empty_selection_and_wrong_sizes() -> None:
    with pytest.raises(UserError, match="selection is empty"):
        Plan([], seed=0)
    with pytest.raises(UserError, match="seed=-1"):
        Plan(3, seed=-1)
    with pytest.raises(UserError, match="batch=0"):
        PlanSampler(Plan(3, seed=0), batch=0, batches=1)


# ---- windows


SHARD = np.repeat(np.arange(50), 20)  # 1,000 clips in 50 shards


def test_plan__windows_visit_shard_after_shard_and_every_clip_once() -> None:
    plan = Plan(1000, seed=2, window=100, shard=SHARD)
    orders = [plan.order(e) for e in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
        for first in range(0, 1000, 100):  # a window touches the fewest shards there are
            assert len(np.unique(SHARD[order[first : first + 100]])) == 5
    shards = [tuple(dict.fromkeys(SHARD[o[::100]].tolist())) for o in orders]
    assert len(set(shards)) == 3  # the shards come in another order each epoch
    inside = orders[0][:100]
    assert len(np.unique(SHARD[inside[:20]])) > 1  # the clips of a window are mixed
    assert Plan(1000, seed=3, window=100, shard=SHARD).order(0).tolist() != orders[0].tolist()


# ---- by weight


def test_plan__gumbel_top_k_draws_without_replacement_in_proportion() -> None:
    """Drawing one of three: P = w / sum(w). Drawing two: the known sequential probabilities."""
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    one: Counter[int] = Counter()
    out: Counter[int] = Counter()
    for epoch in range(1500):
        one.update(Plan(4, seed=1, weights=weights, epoch_clips=1).order(epoch).tolist())
        pair = Plan(4, seed=1, weights=weights, epoch_clips=2).order(epoch).tolist()
        assert len(set(pair)) == 2
        out.update({0, 1, 2} - set(pair))
    assert one[3] == 0
    for clip, p in enumerate([1 / 8, 2 / 8, 5 / 8]):
        assert abs(one[clip] - 1500 * p) < 5 * np.sqrt(1500 * p * (1 - p))
    left = 2 / 8 * 5 / 6 + 5 / 8 * 2 / 3  # clip 0 is the one left out
    assert abs(out[0] - 1500 * left) < 5 * np.sqrt(1500 * left * (1 - left))


def test_plan__weighted_epoch_is_shuffled_evenly_not_heavy_clips_first() -> None:
    weights = np.array([1.0] * 50 + [50.0] * 50)
    place: list[float] = []
    for epoch in range(200):
        order = Plan(100, seed=0, weights=weights, epoch_clips=60).order(epoch)
        place += np.flatnonzero(order >= 50).tolist()
    assert abs(np.mean(place) - 29.5) < 0.5


def test_plan__epoch_of_fewer_clips_takes_others_each_time() -> None:
    plan = Plan(100, seed=0, epoch_clips=30)
    assert len(plan) == 30
    seen = Counter(c for e in range(200) for c in plan.order(e).tolist())
    assert len(seen) == 100
    assert all(abs(n - 60) < 5 * np.sqrt(60 * 0.7) for n in seen.values())
    positions = np.arange(25, 35)  # across two epochs
    both = [*plan.order(0)[25:].tolist(), *plan.order(1)[:5].tolist()]
    assert plan.clips(positions).tolist() == both


def test_plan__class_balance_is_the_mean_of_one_over_counts() -> None:
    ids = np.array([0, 0, 0, 1, 1, 2])  # clips 0..4 carry {0}, {0}, {0, 1}, {}, {1, 2}
    ptr = np.array([0, 1, 2, 4, 4, 6])
    weights = class_balance(ids, ptr, np.arange(5))
    assert np.allclose(weights, [1 / 3, 1 / 3, (1 / 3 + 1 / 2) / 2, 0, (1 / 2 + 1) / 2])
    assert np.allclose(class_balance(ids, ptr, np.array([4, 1])), [1, 1])  # counts of the subset
    with pytest.raises(UserError, match="balance=class needs labels"):
        class_balance(ids, ptr, np.array([3]))


@pytest.mark.parametrize("clips", [0, 4])
def test_plan__epoch_clips_out_of_range(clips: int) -> None:
    with pytest.raises(UserError, match=f"epoch_clips={clips}: an epoch takes 1 to 3 of 3"):
        Plan(3, seed=0, epoch_clips=clips)
    with pytest.raises(UserError, match="1 to 1 of 2 clips \\(1 have no weight"):
        Plan(2, seed=0, weights=np.array([0.0, 1.0]), epoch_clips=2)


# ---- mixtures


def test_plan__mixture_keeps_its_shares_and_each_set_its_own_epochs() -> None:
    first, second = Plan(700, seed=0), Plan(np.arange(700, 800), seed=1)
    plan = MixedPlan([first, second], [3.0, 1.0], seed=4)
    clips = plan.clips(np.arange(10 * MIX_BLOCK))
    blocks = clips.reshape(10, MIX_BLOCK)
    assert ((blocks >= 700).sum(1) == 250).all()
    own = clips[clips >= 700]
    assert len(own) == 2500
    for epoch in range(25):
        assert own[epoch * 100 : epoch * 100 + 100].tolist() == second.order(epoch).tolist()
    assert clips[clips < 700][:700].tolist() == first.order(0).tolist()
    places = np.flatnonzero(blocks[3] >= 700)
    assert abs(places.mean() - 500) < 70  # mixed, not one after the other
    assert not np.array_equal(places, np.flatnonzero(blocks[4] >= 700))
    again = MixedPlan([first, second], [3.0, 1.0], seed=4)
    somewhere = np.arange(5_432, 7_001)
    assert again.clips(somewhere).tolist() == clips[somewhere].tolist()


def test_plan__mixture_of_thirds_and_bad_weights() -> None:
    plans = [Plan([i], seed=i) for i in range(3)]
    assert sorted(MixedPlan(plans, [1, 1, 1], seed=0).counts.tolist()) == [333, 333, 334]
    for weights, says in (
        ([1.0], "1 weights for 3 data sets"),
        ([1.0, 0.0, 1.0], "must be positive"),
        ([1.0, 1e-6, 1.0], "below a thousandth"),
    ):
        with pytest.raises(UserError, match=says):
            MixedPlan(plans, weights, seed=0)


def test_plan__identity_tells_orders_apart() -> None:
    plans = [
        Plan(10, seed=0),
        Plan(9, seed=0),
        Plan(10, seed=0, epoch_clips=5),
        Plan(10, seed=0, epoch_clips=5, weights=np.ones(10)),
        Plan(10, seed=0, epoch_clips=5, weights=np.arange(1.0, 11)),
        Plan(10, seed=0, window=3, shard=np.zeros(10, int)),
        Plan(10, seed=0, window=4, shard=np.zeros(10, int)),
    ]
    mixed = [MixedPlan(plans[:2], w, seed=0) for w in ([1, 1], [1, 2])]
    names = [plan.identity() for plan in [*plans, *mixed]]
    assert len(set(names)) == len(names)
    assert Plan(10, seed=0).identity() == names[0]


# ---- of an index


def some_index(**kw: Any) -> Any:
    """What ``make_plan`` looks at: 30 clips in 3 shards, two sources, labels on the first ten."""
    found = {
        "remote": False,
        "fits": True,
        "cache_bytes": 60,
        "shard_bytes": np.full(3, 10),
        "shard": np.repeat(np.arange(3), 10),
        "source": np.repeat([0, 1], [10, 20]),
        "label_ids": np.arange(10) % 2,
        "label_ptr": np.minimum(np.arange(31), 10),
        "__len__": lambda self: 30,
    }
    return type("SomeIndex", (), found | kw)()


def test_plan__order_is_in_windows_for_remote_shards() -> None:
    remote = some_index(remote=True, fits=False)
    assert "windows of 8192" in make_plan(remote, seed=0).identity()
    small = some_index(remote=True, fits=False, cache_bytes=50)
    with pytest.raises(UserError, match=r"8192 clips lies in about 3 .*lower data\.window"):
        make_plan(small, seed=0)
    assert "windows of 9" in make_plan(small, seed=0, window=9).identity()
    assert "windows of 7" in make_plan(some_index(), seed=0, shuffle="window", window=7).identity()
    assert "windows" in make_plan(some_index(remote=True), seed=0).identity()
    assert "windows" not in make_plan(some_index(), seed=0).identity()
    exact = make_plan(some_index(remote=True), seed=0, shuffle="exact")
    assert "windows" not in exact.identity()
    with pytest.raises(UserError, match="shuffle=exact over remote shards"):
        make_plan(remote, seed=0, shuffle="exact")


def test_plan__settings_of_the_order() -> None:
    with pytest.raises(UserError, match="balance=class needs epoch_clips"):
        make_plan(some_index(), seed=0, balance="class")
    with pytest.raises(UserError, match="exclude one another"):
        make_plan(some_index(), seed=0, mix=[1, 1], epoch_clips=3)
    with pytest.raises(UserError, match="mix has 3 weights for 2 sets"):
        make_plan(some_index(), seed=0, mix=[1, 1, 1])
    plan = make_plan(some_index(), seed=0, balance="class", epoch_clips=5)
    assert set(plan.order(0).tolist()) <= set(range(10))  # type: ignore[union-attr]
    mixed = make_plan(some_index(), np.arange(5, 30), seed=0, mix=[1, 1])
    clips = mixed.clips(np.arange(1000))
    assert (clips < 10).sum() == 500
    assert set(clips.tolist()) == set(range(5, 30))


def test_plan__prefetch_always_covers_all_that_comes_next() -> None:
    plan, asked = Plan(1000, seed=0), list[list[int]]()
    sampler = PlanSampler(
        plan,
        batch=4,
        batches=100,
        world=2,
        batches_done=lambda: 50,
        prefetch=lambda clips: asked.append(clips.tolist()),
        look_ahead=100,
    )
    for k, _ in enumerate(sampler, start=50):
        latest = asked[-1]  # what was asked for before replaces nothing that is still due
        assert plan.clips(np.arange(k * 8, k * 8 + 100)).tolist() in [
            latest[i : i + 100] for i in range(0, len(latest) - 99, 8)
        ]
    assert len(asked) == 13


def test_plan__stand_ins_are_of_the_plan_itself() -> None:
    """Never a clip without weight, of another window, another epoch or another data set."""
    even = Plan([3, 5, 9], seed=0)
    assert set(itertools.islice(even.stand_ins(7), 100)) == {3, 5, 9}
    assert list(itertools.islice(even.stand_ins(7), 5)) == list(
        itertools.islice(Plan([3, 5, 9], seed=0).stand_ins(7), 5)
    )
    weights = np.array([1.0, 1.0, 0.0, 0.0, 2.0])
    weighted = Plan(5, seed=0, weights=weights, epoch_clips=2)
    for position in range(20):
        among = set(weighted.order(position // 2).tolist())
        assert set(itertools.islice(weighted.stand_ins(position), 50)) == among
    window = Plan(1000, seed=2, window=100, shard=SHARD)
    here = window.order(1)[300:400].tolist()
    assert set(itertools.islice(window.stand_ins(1_333), 2_000)) == set(here)
    mixed = MixedPlan([Plan(700, seed=0), Plan(np.arange(700, 800), seed=1)], [1, 1], seed=0)
    for position, clip in enumerate(mixed.clips(np.arange(40)).tolist()):
        found = set(itertools.islice(mixed.stand_ins(position), 20))
        assert all((c < 700) == (clip < 700) for c in found)
