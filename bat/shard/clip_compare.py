"""Compares all clips of a set: duplicates, missing labels, labels with two numbers.

Works on hashes of 64 bits (two million clips: a chance of one in ten million for a false
duplicate), sorted once; names are looked up only for the clips that are reported.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bat.data.table import scan
from bat.shard.clip_check import Kind
from bat.shard.findings import KEPT, Report

RECORD = np.dtype(
    [("shard", "<i4"), ("clip", "<i4"), ("audio", "<u8"), ("labels", "<u8"), ("key", "<u8")]
)
EXAMPLES = 20
Pair = tuple[str, int]
"""(label, label_id)"""


class Clips:
    """Hashes and labels of the clips of one part of a shard."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int]] = []
        self.pairs: dict[Pair, list[int]] = {}
        """``{pair: [count, number of a clip, ...]}``, the first ``EXAMPLES`` clips."""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, key: str, audio: int, labels: Sequence[Pair]) -> None:
        """Add clip ``number`` of its shard; ``audio``: hash of its samples, 0 for none."""
        names = sorted({name for name, _ in labels})
        self._rows.append((0, number, audio, _hash("\0".join(names)) if names else 0, _hash(key)))
        for pair in labels:
            seen = self.pairs.setdefault(pair, [0])
            seen[0] += 1
            if len(seen) <= EXAMPLES:
                seen.append(number)

    def records(self, shard: int) -> np.ndarray:  # (n,) RECORD
        rows = np.array(self._rows, RECORD)
        rows["shard"] = shard
        return rows


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class Comparison:
    """Takes the parts in their order, then reports.

    Args:
        tars, names: path of each shard, and its name in the report.
    """

    def __init__(self, report: Report, tars: Sequence[Path], names: Sequence[str]) -> None:
        self.report, self.tars, self.names = report, tars, names
        self._parts = [np.zeros(0, RECORD)]
        self._pairs: dict[Pair, tuple[int, list[tuple[int, int]]]] = {}

    def add(self, shard: int, clips: Clips) -> None:
        self._parts.append(clips.records(shard))
        for pair, (count, *numbers) in clips.pairs.items():
            before, where = self._pairs.get(pair, (0, []))
            where += [(shard, number) for number in numbers][: EXAMPLES - len(where)]
            self._pairs[pair] = (before + count, where)

    def finish(self, *, labels_held: bool) -> None:
        """Add the findings to the report.

        Args:
            labels_held: True if each clip's labels were already checked against a vocabulary.
        """
        rows = np.concatenate(self._parts)
        self._twins(rows[rows["audio"] != 0], "audio")
        self._twins(rows, "key")
        unlabelled = rows[rows["labels"] == 0]
        if 2 * len(unlabelled) < len(rows):
            self._unlabelled(unlabelled)
        if not labels_held:
            self._two_numbers()

    def _twins(self, rows: np.ndarray, field: str) -> None:
        """Report clips that share ``field`` with an earlier one (duplicates)."""
        order = np.argsort(rows[field], kind="stable")
        values = rows[field][order]
        first = np.searchsorted(values, values)  # start of the run of equal values of each
        later = np.flatnonzero(first < np.arange(len(order)))
        pairs = np.stack([order[later], order[first[later]]], 1)
        pairs = pairs[np.argsort(pairs[:, 0])]  # (duplicates, 2) in the order of the set
        if field == "key":  # with the same audio: reported already
            same = rows["audio"][pairs[:, 0]] == rows["audio"][pairs[:, 1]]
            pairs = pairs[~same | (rows["audio"][pairs[:, 0]] == 0)]
        named = self._look_up(rows[pairs[:KEPT].ravel()])
        for n, (row, before) in enumerate(zip(rows[pairs[:, 0]], rows[pairs[:, 1]], strict=True)):
            one = named[_place(row)] if n < KEPT else _NOBODY
            other = named[_place(before)] if n < KEPT else _NOBODY
            where = f"{self.names[int(before['shard'])]}/{other.key}"
            what = "the same audio as" if field == "audio" else "the key is taken by"
            self._say("duplicate", row, one.key, f"{what} {where}{_leak(one, other)}")
            if field == "audio" and row["labels"] != before["labels"]:
                why = f"labelled {one.labels}; {where}, the same audio, has {other.labels}"
                self._say("label", row, one.key, why)

    def _unlabelled(self, rows: np.ndarray) -> None:
        named = self._look_up(rows[:KEPT])
        for row in rows:
            key = named.get(_place(row), _NOBODY).key
            self._say("label", row, key, "no label, where most clips have one")

    def _two_numbers(self) -> None:
        """Without a vocabulary, report labels with two numbers: the label_id of most clips is the
        right one."""
        wrong: list[tuple[Pair, str]] = []
        ids: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for (name, number), (count, _) in self._pairs.items():
            if number >= 0:
                ids[name].append((-count, number))
        owners: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for name, numbers in ids.items():
            (count, right), *others = sorted(numbers)
            owners[right].append((count, name))
            for _, odd in others:
                wrong.append(((name, odd), f"label_id {odd} for {name!r}, mostly {right}"))
        for number, names in owners.items():
            (_, owner), *rest = sorted(names)
            for _, name in rest:
                wrong.append(((name, number), f"label_id {number} for {name!r} and {owner!r}"))
        for pair, why in wrong:
            count, where = self._pairs[pair]
            rows = np.array([(shard, number, 0, 0, 0) for shard, number in where], RECORD)
            named = self._look_up(rows)
            for row in rows:
                self._say("label", row, named[_place(row)].key, why)
            self.report.counts["label"] += count - len(where)

    def _say(self, kind: Kind, row: np.ndarray, key: str, why: str) -> None:
        self.report.add(kind, self.names[int(row["shard"])], key, why)

    def _look_up(self, rows: np.ndarray) -> dict[tuple[int, int], _Named]:
        """Reads the JSON of these clips; each shard's headers are read once."""
        found: dict[tuple[int, int], _Named] = {}
        for shard in np.unique(rows["shard"]).tolist():
            table = scan(self.tars[shard])
            folder = self.names[shard].rpartition("/")[0]
            keys = table.key_list()
            ends = np.cumsum(table.clips["labels"], dtype=np.int64)
            for at in np.unique(rows["clip"][rows["shard"] == shard]).tolist():
                clip = table.clips[at]
                labels = table.labels[ends[at] - clip["labels"] : ends[at]]
                found[shard, at] = _Named(
                    key=keys[at],
                    labels=", ".join(table.names[i] for i in labels) or "unlabelled",
                    split=table.splits[clip["split"]] if clip["split"] >= 0 else folder,
                    fold=int(clip["fold"]),
                )
        return found


class _Named(NamedTuple):
    key: str
    labels: str
    split: str
    fold: int


_NOBODY = _Named("", "", "", -1)


def _place(row: np.ndarray) -> tuple[int, int]:
    return int(row["shard"]), int(row["clip"])


def _leak(one: _Named, other: _Named) -> str:
    """Returns a remark if two clips lie in different splits or folds (a leak of test data)."""
    if one.split != other.split:
        return f" (leak: splits {other.split or 'none'} and {one.split or 'none'})"
    return f" (leak: folds {other.fold} and {one.fold})" if one.fold != other.fold else ""
