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

from bat.data.sources import RetryPolicy, Shard
from bat.data.table import MAX_JSON_BYTES
from bat.data.tar_stream import open_stream, stream_members
from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.folder import split_of as folder_split

log = logging.getLogger("bat")

TRAIN = ("train", "train-unbalanced")
"""What ``auto`` takes, the first that is there; the second is the larger of AudioSet's."""
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


def choose_split(shards: Sequence[Shard], split: str, policy: RetryPolicy) -> Choice:
    """The shards and clips that ``split`` means: ``all``, a name, several (``a,b``), or ``auto``:
    the first of ``TRAIN`` that is there (told in the log), else all (``check_no_train``).

    Where sub-folders have the name, the other sub-folders are not opened. Where ``auto`` sees no
    split in what it looks at, a clip that later says another one than ``train`` is passed over.

    Raises:
        UserError: a split that the data does not have, or none but such as are held out.
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
    """``auto`` finds none of ``TRAIN`` among ``splits``: it takes all clips, and warns of it.

    Raises ``UserError`` where some are to be held out (``test``, ``valid``); ``counted`` says what
    there is.
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
    """Splits that the JSON of the first clips of some shards name."""
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
