"""Which split a set that cannot be indexed is read from: the rule of ``data.split``, unindexed.

Sub-folders (``train/``, ``test/``) name splits at once. What the JSON of the clips says is known
only as they are read: the first ones of a few shards are looked at, and the rest decides on its
own while it is read (``SequentialClips`` passes over clips of other splits).
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from bat.data.sources import Patience, Shard
from bat.data.table import MAX_JSON_BYTES
from bat.data.tar_stream import open_stream, stream_members
from bat.redact import one_line
from bat.shapes import UserError

log = logging.getLogger("bat")

LOOKED_AT = 8
"""Shards, evenly spaced."""
CLIPS_EACH = 16
BYTES_EACH = 1 << 26
TRIES = 2


class Choice(NamedTuple):
    """What to read."""

    shards: list[Shard]
    splits: frozenset[str] | None
    """Splits of the clips to keep (``""``: those of none); None: all clips."""


def split_of(meta: dict[str, Any], shard: Shard) -> str:
    """Split of a clip: its JSON's, else its shard's; empty where there is none."""
    split = meta.get("split")
    return one_line(split) if isinstance(split, str) and split else shard.split


def choose_split(shards: Sequence[Shard], split: str, patience: Patience) -> Choice:
    """The shards and clips that ``split`` means: ``all``, a name, or ``auto``: ``train`` where
    there is one (told in the log), else all (with a warning where there are other splits).

    Where sub-folders have the name, the other sub-folders are not opened. Where ``auto`` sees no
    split in what it looks at, a clip that later says another one than ``train`` is passed over.

    Raises:
        UserError: a split that the data does not have.
    """
    if split == "all":
        return Choice(list(shards), None)
    name = "train" if split == "auto" else split
    folders = {shard.split for shard in shards if shard.split}
    if name in folders:
        kept = [shard for shard in shards if shard.split in ("", name)]
        others = sorted(folders - {name})
        if split == "auto" and others:
            log.info(
                "pre-training on the %d shards of split train; data.split=all takes those of %s "
                "too",
                len(kept),
                ", ".join(others),
            )
        return Choice(kept, frozenset([name]))
    said = _look(shards, patience)
    known = sorted(folders | said)
    if split == "auto":
        if name not in said and known:
            warn_no_train(known)
            return Choice(list(shards), None)
        if name in said:
            log.info(
                "pre-training on the clips of split train; data.split=all takes those of %s too",
                ", ".join(other for other in known if other != name) or "other splits",
            )
        return Choice(list(shards), frozenset([name] if name in said else ["", name]))
    if name not in said:
        if not said:
            raise UserError(f"no clip has split {name!r}: splits are {known or 'not given'}")
        log.warning(
            "the clips looked at have the splits %s: looking for %r among the others",
            ", ".join(known),
            name,
        )
    return Choice(list(shards), frozenset([name]))


def warn_no_train(splits: Sequence[str]) -> None:
    """``auto`` takes all ``splits``, the test set too where there is one."""
    log.warning(
        "pre-training on all clips: none of the splits (%s) is called train; data.split=NAME "
        "takes one of them",
        ", ".join(splits),
    )


def _look(shards: Sequence[Shard], patience: Patience) -> set[str]:
    """Splits that the JSON of the first clips of some shards name."""
    found: set[str] = set()
    count = min(LOOKED_AT, len(shards))
    for number in range(count):
        shard = shards[number * len(shards) // count]
        seen = room = 0
        try:
            with open_stream(shard, patience._replace(retries=min(TRIES, patience.retries))) as tar:
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
