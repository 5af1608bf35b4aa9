"""Folds and splits: shares of every label, whole recordings, nothing but key and seed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from bat.errors import UserError
from bat.shard.assign import assign_folds, assign_splits
from bat.tasks.base import Row


def clips(count: dict[str, int]) -> list[Row]:
    return [
        Row(path=Path(f"{label}/{i}.wav"), key=f"{label}-{i}", labels=(label,))
        for label, n in count.items()
        for i in range(n)
    ]


COUNT = {"dog": 103, "cat": 40, "rain": 7, "frog": 2}


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_hold_their_share_of_every_label_and_of_all(folds: int) -> None:
    rows = assign_folds(clips(COUNT), folds)
    for label, n in COUNT.items():
        got = Counter(row.fold for row in rows if row.labels == (label,))
        sizes = [got[fold] for fold in range(1, folds + 1)]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1
    total = Counter(row.fold for row in rows)
    assert sorted(total) == list(range(1, folds + 1))
    assert max(total.values()) - min(total.values()) <= 1


def test_splits_hold_their_share_of_every_label_and_of_all() -> None:
    shares = {"train": 0.8, "valid": 0.1, "test": 0.1}
    rows = assign_splits(clips(COUNT), shares)
    total = Counter(row.split for row in rows)
    assert total == {"train": 122, "valid": 15, "test": 15}  # of 152
    for label, n in COUNT.items():
        got = Counter(row.split for row in rows if row.labels == (label,))
        assert all(abs(got[name] - share * n) <= 1 for name, share in shares.items())


def test_rare_labels_do_not_all_land_in_the_largest_split() -> None:
    rows = assign_splits(clips({f"species {i}": 3 for i in range(40)}), {"train": 0.9, "test": 0.1})
    assert Counter(row.split for row in rows) == {"train": 108, "test": 12}


def test_the_order_of_rows_and_the_folder_do_not_matter_but_the_seed_does() -> None:
    rows = clips(COUNT)
    first = {row.key: row.fold for row in assign_folds(rows, 5)}
    moved = [Row(path=Path("/x") / r.path, key=r.key, labels=r.labels) for r in rows]
    random.Random(1).shuffle(moved)
    again = assign_folds(moved, 5)
    assert [r.key for r in again] == [r.key for r in moved]
    assert {row.key: row.fold for row in again} == first
    other = {row.key: row.fold for row in assign_folds(rows, 5, seed=1)}
    assert sum(other[key] != fold for key, fold in first.items()) > 90  # of 152; 4/5 expected


def test_clips_of_one_recording_stay_together() -> None:
    rows = [
        Row(Path(f"{i % 9}.wav"), f"{i % 9}-{i}", ("a" if i % 2 else "b",), start_seconds=i)
        for i in range(90)
    ]
    where: dict[Path, set[int | None]] = {}
    for row in assign_folds(rows, 3):
        where.setdefault(row.path, set()).add(row.fold)
    assert [len(folds) for folds in where.values()] == [1] * 9
    assert Counter(min(folds) for folds in where.values() if None not in folds) == {
        1: 3,
        2: 3,
        3: 3,
    }


def test_a_long_recording_of_one_label_does_not_unbalance_another() -> None:
    long = [Row(Path("long.wav"), f"long-{i}", ("a",), start_seconds=i) for i in range(10)]
    rows = assign_folds([*long, *clips({"b": 11})], 2)
    got = Counter((row.labels, row.fold) for row in rows)
    assert got == {(("a",), 1): 10, (("b",), 1): 5, (("b",), 2): 6}


def test_members_of_one_tar_are_recordings_of_their_own() -> None:
    rows = [Row(Path("s.tar"), str(i), (), span=(i * 1024, 9), codec="wav") for i in range(10)]
    assert Counter(row.fold for row in assign_folds(rows, 5)) == dict.fromkeys(range(1, 6), 2)
    rows = [Row(Path("s.parquet"), str(i), (), cell=(0, i), codec="wav") for i in range(10)]
    assert Counter(row.split for row in assign_splits(rows, {"a": 0.5, "b": 0.5})) == {
        "a": 5,
        "b": 5,
    }


def test_of_several_labels_the_rarest_counts() -> None:
    rows = [
        Row(Path(f"{i}.wav"), str(i), ("speech", "frog") if i < 4 else ("speech",))
        for i in range(20)
    ]
    got = Counter((row.fold, len(row.labels)) for row in assign_folds(rows, 4))
    assert got == {(fold, n): (1 if n == 2 else 4) for fold in range(1, 5) for n in (1, 2)}


def test_what_they_had_is_replaced() -> None:
    rows = [Row(Path(f"{i}.wav"), str(i), (), fold=9, split="x") for i in range(4)]
    assert {row.fold for row in assign_folds(rows, 2)} == {1, 2}
    assert {row.split for row in assign_splits(rows, {"train": 1.0})} == {"train"}


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"train": 0.9, "test": 0.2}, "splits train=0.9,test=0.2: the fractions sum to 1.1"),
        ({}, "splits are empty: the fractions sum to 0, not to 1"),
        ({"train": 1.5, "test": -0.5}, r"split train=1\.5: a fraction of the clips"),
        ({"../x": 1.0}, r"split '\.\./x': use letters"),
        ({"train": 0.99, "test": 0.01}, "split 'test' gets none of the 4 recordings"),
    ],
)
def test_impossible_splits(shares: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        assign_splits(clips({"a": 4}), shares)


def test_impossible_folds() -> None:
    with pytest.raises(UserError, match="folds=1: 2 or more"):
        assign_folds(clips({"a": 4}), 1)
    with pytest.raises(UserError, match="fold 5 gets none of the 4 recordings"):
        assign_folds(clips({"a": 4}), 5)
