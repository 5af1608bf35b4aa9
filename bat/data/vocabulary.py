"""One list of class names for the tables of many shards."""

from __future__ import annotations

from collections.abc import Sequence

from bat.data.table import ShardTable
from bat.errors import UserError
from bat.tasks.base import in_order
from bat.tasks.labels import by_number

MAX_CLASSES = 100_000
"""A row of targets holds them all, for each clip of a batch."""


def joint_vocabulary(tables: Sequence[ShardTable], given: Sequence[list[str]]) -> list[str]:
    """Class names in the order of their indices.

    From the manifests where there are some; else by ``label_id`` (``by_number``); else the names,
    sorted, numbers by value.

    Args:
        given: the vocabularies of the manifests.

    Raises:
        UserError: manifests that disagree, a label that theirs lacks, more than ``MAX_CLASSES``.
    """
    names = {name for table in tables for name in table.names}
    most = max([len(names), *map(len, given)])
    if most > MAX_CLASSES:
        raise UserError(
            f"the shards have {most} class names, more than {MAX_CLASSES}: are they captions? "
            "data.labels=drop pre-trains without labels"
        )
    if given:
        for other in given[1:]:
            if other != given[0]:
                odd = sorted(set(other) ^ set(given[0]))
                what = f"{odd[0]!r} is in one only" if odd else "the order differs"
                raise UserError(
                    f"the data sets have different labels ({what}): write them with one "
                    "vocabulary, or pre-train without labels (data.labels=drop)"
                )
        strange = sorted(names - set(given[0]))
        if strange:
            raise UserError(
                f"label {strange[0]!r} is not in the vocabulary of manifest.json: `bat-shard "
                f"verify` names the clips"
            )
        return list(given[0])
    pairs = {pair for t in tables for pair in zip(t.names, t.ids, strict=True)}
    return by_number(pairs) or in_order(names)
