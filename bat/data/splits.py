"""Selects the split that is read from a set that cannot be indexed: ``data.split`` without an
index.

Sub-folders (``train/``, ``test/``) name splits at once. The JSON of the clips is known only as they
are read: the first clips of a few shards are examined, and the rest is filtered while it is read
(``SequentialClips`` skips clips of other splits).
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from bat.data.sources import RetryPolicy, Shard
from bat.data.table import MAX_JSON_BYTES
from bat.data.tar_stream import open_stream, stream_members
from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.folder import split_of as folder_split

log = logging.getLogger("bat")

TRAIN = ("train", "train-unbalanced")
"""Splits that ``auto`` takes, in order of preference; the second is the larger one of AudioSet."""
LOOKED_AT = 8
"""Number of shards examined, evenly spaced."""
CLIPS_EACH = 16
BYTES_EACH = 1 << 26
TRIES = 2


class Choice(NamedTuple):
    """The selected shards and splits."""

    shards: list[Shard]
    splits: frozenset[str] | None
    """Splits of the clips to keep (``""``: clips without one); None: all clips."""


def split_of(meta: dict[str, Any], shard: Shard) -> str:
    """Returns the split of a clip: that of its JSON, else of its shard; empty if there is none."""
    split = meta.get("split")
    return one_line(split) if isinstance(split, str) and split else shard.split


def choose_split(shards: Sequence[Shard], split: str, policy: RetryPolicy) -> Choice:
    """Returns the shards and clips that ``split`` selects.

    ``split`` is ``all``, a name, several (``a,b``), or ``auto``: the first of ``TRAIN`` that exists
    (written to the log), else all (``check_no_train``). Where sub-folders have the name, the other
    sub-folders are not opened. If ``auto`` finds no split in the clips that it examines, a clip
    that later names another split than ``train`` is skipped.

    Raises:
        UserError: a split that the data does not have, or only splits for evaluation.
    """
    if split == "all":
        return Choice(list(shards), None)
    folders = {shard.split for shard in shards if shard.split}
    names = {next((n for n in TRAIN if n in folders), TRAIN[0])}
    if split != "auto":
        names = {part.strip() for part in split.split(",")}
    if names <= folders:
        kept = [shard for shard in shards if shard.split in ("", *names)]
        others = sorted(folders - names)
        if split == "auto" and others:
            log.info(
                "pre-training on the %d shards of split %s; data.split=all takes those of %s too",
                len(kept),
                *names,
                ", ".join(others),
            )
        return Choice(kept, frozenset(names))
    said = _look(shards, policy)
    known = sorted(folders | said)
    if split == "auto":
        name = next((n for n in TRAIN if n in said), None)
        if name is None and known:
            check_no_train(known, f"the data has the splits {', '.join(known)}")
            return Choice(list(shards), None)
        if name is not None:
            log.info(
                "pre-training on the clips of split %s; data.split=all takes those of %s too",
                name,
                ", ".join(other for other in known if other != name) or "other splits",
            )
        return Choice(list(shards), frozenset(["", *TRAIN] if name is None else [name]))
    absent = sorted(names - {*known})
    if absent:
        if not said:
            raise UserError(f"no clip has split {absent[0]!r}: splits are {known or 'not given'}")
        log.warning(
            "the clips looked at have the splits %s: looking for %s among the others",
            ", ".join(known),
            ", ".join(map(repr, absent)),
        )
    return Choice(list(shards), frozenset(names))


def check_no_train(splits: Sequence[str], counted: str) -> None:
    """Warn that ``auto`` takes all clips because it finds none of ``TRAIN`` among ``splits``.

    Raises ``UserError`` if some are for evaluation (``test``, ``valid``); ``counted`` describes the
    splits found.
    """
    if any(folder_split(name) in ("test", "valid") for name in splits):
        raise UserError(
            f"{counted}: none of them is called train. Say which to pre-train on: "
            "data.split=NAME (several: A,B), or data.split=all, the held-out ones too"
        )
    log.warning(
        "pre-training on all clips: none of the splits (%s) is called train; data.split=NAME "
        "takes one of them",
        ", ".join(splits),
    )


def _look(shards: Sequence[Shard], policy: RetryPolicy) -> set[str]:
    """Returns the splits that the JSON of the first clips of some shards names."""
    found: set[str] = set()
    count = min(LOOKED_AT, len(shards))
    for number in range(count):
        shard = shards[number * len(shards) // count]
        seen = room = 0
        try:
            with open_stream(shard, policy._replace(retries=min(TRIES, policy.retries))) as tar:
                for member, data in stream_members(tar):
                    room += member.size
                    if os.path.splitext(member.name)[1].lower() != ".json" or not member.regular:
                        if room > BYTES_EACH:
                            break
                        continue
                    if member.size <= MAX_JSON_BYTES:
                        found |= _named(data())
                    seen += 1
                    if seen >= CLIPS_EACH:
                        break
        except (OSError, EOFError, zlib.error):
            continue  # counted when it is read
    return found


def _named(text: bytes) -> set[str]:
    try:
        split = json.loads(text).get("split")
    except (ValueError, AttributeError, RecursionError):
        return set()
    return {one_line(split)} if isinstance(split, str) and split else set()
