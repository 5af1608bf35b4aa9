"""Assigns folds and splits to a source that has none: by key, stratified, recordings kept whole.

Recordings (all clips of one file) are dealt label by label, the rarest label of a recording
counting for it (Sechidis et al. 2011 without their second criterion), in the order of a hash of
(seed, key). Each goes to the part that lacks most overall, among those that lack some of its label:
so each part holds its share of every label, within one recording, and its share of the whole.
The result depends on nothing else: not on the order of the rows, the machine, or the clips of other
labels.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bat.errors import UserError
from bat.shard.rows import SPLIT_NAME
from bat.tasks.base import Row


def assign_folds(rows: Sequence[Row], folds: int, *, seed: int = 0) -> list[Row]:
    """Returns ``rows`` with a fold from 1 to ``folds`` each, replacing any folds they had.

    Raises:
        UserError: fewer than 2 folds, or fewer recordings than folds.
    """
    if folds < 2:
        raise UserError(f"folds={folds}: 2 or more")
    names = [f"fold {i + 1}" for i in range(folds)]
    parts = _deal(rows, dict.fromkeys(names, 1 / folds), seed)
    return [replace(row, fold=part + 1) for row, part in zip(rows, parts, strict=True)]


def assign_splits(
    rows: Sequence[Row], fractions: Mapping[str, float], *, seed: int = 0
) -> list[Row]:
    """Returns ``rows`` with a split each, replacing any splits they had.

    Args:
        fractions: ``{"train": 0.9, "test": 0.1}``: of the clips; their sum is 1.

    Raises:
        UserError: another sum, a fraction that is not positive, a name that no folder can have, a
            split that gets no clip.
    """
    for name, share in fractions.items():
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"split {name!r}: use letters, digits, _, - and dots")
        if not 0 < share <= 1:
            raise UserError(f"split {name}={share:g}: a fraction of the clips, over 0 and up to 1")
    total = math.fsum(fractions.values())
    if abs(total - 1) > 1e-6:
        said = ",".join(f"{name}={share:g}" for name, share in fractions.items())
        raise UserError(f"splits {said or 'are empty'}: the fractions sum to {total:g}, not to 1")
    parts = _deal(rows, {f"split {name!r}": share for name, share in fractions.items()}, seed)
    names = list(fractions)
    return [replace(row, split=names[part]) for row, part in zip(rows, parts, strict=True)]


def _deal(rows: Sequence[Row], fractions: Mapping[str, float], seed: int) -> list[int]:
    """Returns the number of the part of each row; the names of the parts are for errors.

    Raises:
        UserError: a part that gets no recording.
    """
    recordings: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        recordings[row.path, row.span, row.cell].append(i)  # a member or a cell counts as a file
    count = Counter(label for row in rows for label in set(row.labels))
    strata: dict[str, list[tuple[bytes, str, list[int]]]] = defaultdict(list)
    for found in recordings.values():
        labels = {label for i in found for label in rows[i].labels}
        stratum = min(labels, key=lambda label: (count[label], label), default="")
        key = min(rows[i].key for i in found)
        digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogateescape")).digest()
        strata[stratum].append((digest, key, found))
    shares = list(fractions.values())
    parts = [0] * len(rows)
    total, everything = [0] * len(shares), 0
    for stratum in sorted(strata, key=lambda label: (count[label], label)):
        here, dealt = [0] * len(shares), 0
        for _, _, found in sorted(strata[stratum]):
            dealt += len(found)
            everything += len(found)
            lacking = [p for p, share in enumerate(shares) if share * dealt - here[p] > 1e-9]
            part = max(lacking, key=lambda p: (shares[p] * everything - total[p], -p))
            here[part] += len(found)
            total[part] += len(found)
            for i in found:
                parts[i] = part
    for part, name in enumerate(fractions):
        if not total[part]:
            raise UserError(
                f"{name} gets none of the {len(recordings)} recordings: ask for fewer parts"
            )
    return parts
