"""Slow and obvious versions of event matching and edit distance."""

from __future__ import annotations

import functools
from collections.abc import Sequence


def matches(estimated: Sequence[float], reference: Sequence[float], collar: float) -> int:
    """The largest one-to-one matching, by augmenting paths over all pairs that may match."""
    partner: dict[int, int] = {}  # of references

    def place(i: int, seen: set[int]) -> bool:
        for j, onset in enumerate(reference):
            if abs(estimated[i] - onset) <= collar and j not in seen:
                seen.add(j)
                if j not in partner or place(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(estimated)))


def edits(a: str, b: str) -> int:
    """Levenshtein distance by its recursion."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))
