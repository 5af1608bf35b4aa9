"""Folds and splits: shares of every label, whole recordings, nothing but key and seed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from bat.errors import UserError
from bat.shard.assign import assign_folds, assign_splits
from bat.tasks.base import Row

COUNT = {"dog": 103, "cat": 40, "rain": 7, "frog": 2}


def clips(count: dict[str, int]) -> list[Row]:
    return [
        Row(path=Path(f"{label}/{i}.wav"), key=f"{label}-{i}", labels=(label,))
        for label, n in count.items()
        for i in range(n)
    ]


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_assign_folds__hold_their_share_of_every_label_and_of_all(folds: int) -> None:
    rows = assign_folds(clips(COUNT), folds)
    total = Counter(row.fold for row in rows)
    assert set(total) == set(range(1, folds + 1))
    for label in (None, *COUNT):
        got = Counter(row.fold for row in rows if label in (None, *row.labels))
        sizes = [got[fold] for fold in total]
        assert max(sizes) - min(sizes) <= 1


def test_assign_splits__hold_their_share_of_every_label_and_of_all() -> None:
    shares = {"train": 0.8, "valid": 0.1, "test": 0.1}
    rows = assign_splits(clips(COUNT), shares)
    assert Counter(row.split for row in rows) == {"train": 122, "valid": 15, "test": 15}  # of 152
    for label, n in COUNT.items():
        got = Counter(row.split for row in rows if row.labels == (label,))
        assert all(abs(got[name] - share * n) <= 1 for name, share in shares.items())
    rows = assign_splits(clips({f"species {i}": 3 for i in range(40)}), {"train": 0.9, "test": 0.1})
    assert Counter(row.split for row in rows) == {"train": 108, "test": 12}


def test_assign_folds__depend_on_key_and_seed_alone() -> None:
    rows = clips(COUNT)
    first = {row.key: row.fold for row in assign_folds(rows, 5)}
    moved = [Row(path=Path("/x") / r.path, key=r.key, labels=r.labels, fold=9) for r in rows]
    random.Random(1).shuffle(moved)
    again = assign_folds(moved, 5)
    assert [r.key for r in again] == [r.key for r in moved]
    assert {row.key: row.fold for row in again} == first
    other = {row.key: row.fold for row in assign_folds(rows, 5, seed=1)}
    assert sum(other[key] != fold for key, fold in first.items()) > 90  # of 152; 4/5 expected


def test_assign_folds__recordings_stay_whole() -> None:
    rows = [
        Row(Path(f"{i % 9}.wav"), f"{i % 9}-{i}", ("a" if i % 2 else "b",), start_seconds=i)
        for i in range(90)
    ]
    where = {(row.path, row.fold) for row in assign_folds(rows, 3)}
    assert len(where) == 9
    assert Counter(fold for _, fold in where) == {1: 3, 2: 3, 3: 3}
    long = [Row(Path("long.wav"), f"long-{i}", ("a",), start_seconds=i) for i in range(10)]
    got = Counter((r.labels, r.fold) for r in assign_folds([*long, *clips({"b": 11})], 2))
    assert got == {(("a",), 1): 10, (("b",), 1): 5, (("b",), 2): 6}


@pytest.mark.parametrize("place", ["span", "cell"])
def test_assign_folds__members_of_one_file_are_recordings_of_their_own(place: str) -> None:
    span, cell = ((0, 9), None) if place == "span" else (None, (0, 9))
    rows = [
        Row(Path("s.tar"), str(i), (), span=span and (i, 9), cell=cell and (i, 9))
        for i in range(10)
    ]
    assert Counter(row.fold for row in assign_folds(rows, 5)) == dict.fromkeys(range(1, 6), 2)


def test_assign_folds__of_several_labels_the_rarest_counts() -> None:
    labels = [("speech", "frog")] * 4 + [("speech",)] * 16
    rows = [Row(Path(f"{i}.wav"), str(i), said) for i, said in enumerate(labels)]
    got = Counter((row.fold, len(row.labels)) for row in assign_folds(rows, 4))
    assert got == {(fold, n): (1 if n == 2 else 4) for fold in range(1, 5) for n in (1, 2)}


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"train": 0.9, "test": 0.2}, "train=0.9,test=0.2: .* 1.1"),
        ({}, "splits are empty"),
        ({"train": 1.5, "test": -0.5}, r"split train=1\.5"),
        ({"../x": 1.0}, r"split '\.\./x'"),
        ({"train": 0.99, "test": 0.01}, "split 'test' gets none of the 4 recordings"),
        (1, "folds=1: 2 or more"),
        (5, "fold 5 gets none of the 4 recordings"),
    ],
)
def test_assign__impossible_parts_are_refused(shares: dict[str, float] | int, says: str) -> None:
    rows = clips({"a": 4})
    with pytest.raises(UserError, match=says):
        assign_folds(rows, shares) if isinstance(shares, int) else assign_splits(rows, shares)
