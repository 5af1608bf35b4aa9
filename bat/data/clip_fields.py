"""Defines the fields of a clip in a shard's table, and reads those of a clip's JSON.

A table may come from an untrusted source: ``sound`` checks that each number is within its range
before it is used to read, allocate or look up anything. A clip's JSON is untrusted too and takes up
to 25 times its bytes when parsed: ``parse`` keeps the fields that bat reads (labels, length, fold,
split and what ``bat-shard`` writes) and returns how much memory they take.
"""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from typing import Any

import numpy as np

from bat.data.tar import BLOCK
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES
from bat.tasks.events import from_json

MAX_AUDIO_BYTES = 1 << 30
UNREADABLE = (
    *(OSError, ArithmeticError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
)
"""Exceptions that numpy, zipfile and json raise on damaged or foreign files."""
KEY_BYTES = np.zeros(256, bool)
KEY_BYTES[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")] = True
CLIP = np.dtype(
    [
        ("offset", "<i8"),  # of the audio bytes in the tar
        ("size", "<i8"),
        ("frames", "<i8"),  # at ``rate``; -1 unknown
        ("rate", "<i4"),  # 0 unknown
        ("codec", "u1"),  # index into AUDIO_SUFFIXES
        ("fold", "<i2"),  # -1 none
        ("split", "i1"),  # index into ``splits``; -1 none
        ("labels", "<u2"),  # number of labels
        ("key", "u1"),  # length of the key, bytes
        ("header", "<u4"),  # CRC-32 of its header in the tar
    ]
)


def sound(
    *,
    tar_bytes: int,
    clips: np.ndarray,  # (n,) CLIP
    labels: np.ndarray,
    keys: np.ndarray,
    names: list[str],
    ids: list[int],
    splits: list[str],
    left_out: dict[str, str],
    sha256: str,
    mtime_ns: int,
    events: dict[str, list[Any]],
    texts: dict[str, str],
) -> bool:
    """Return True if the values of a ``ShardTable`` are valid; raises ``UNREADABLE`` on wrong
    types.

    Clips must lie one after the other, and each label must belong to a clip.
    """
    ends = clips["offset"] + clips["size"]
    arrays = (clips, labels, keys)
    said = [names, splits, list(left_out.values()), [sha256], list(texts.values())]
    return (
        [array.dtype for array in arrays] == [CLIP, np.int32, np.uint8]
        and all(array.ndim == 1 for array in arrays)
        and all(isinstance(x, int) for x in (tar_bytes, mtime_ns, *ids))
        and all(isinstance(x, str) for listed in said for x in listed)
        and all(isinstance(several, list) for several in events.values())
        and all(from_json(event) for several in events.values() for event in several)
        and len(names) == len(ids)
        and _within(clips["size"], 1, min(MAX_AUDIO_BYTES, tar_bytes))
        and _within(clips["offset"], BLOCK, tar_bytes - clips["size"])
        and _within(clips["offset"][1:], ends[:-1] + BLOCK, tar_bytes)
        and _within(clips["frames"], -1, 1 << 62)
        and _within(clips["rate"], 0, 1 << 31)
        and _within(clips["codec"], 0, len(AUDIO_SUFFIXES) - 1)
        and _within(clips["fold"], -1, 1 << 15)
        and _within(clips["split"], -1, len(splits) - 1)
        and _within(clips["key"], 1, 80)
        and _within(labels, 0, len(names) - 1)
        and bool(np.bincount(labels, minlength=len(names)).all())
        and int(clips["labels"].sum(dtype=int)) == len(labels)
        and int(clips["key"].sum(dtype=int)) == len(keys)
        and bool(KEY_BYTES[keys].all())
    )


def _within(values: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> bool:
    return bool(((values >= low) & (values <= high)).all())


VALUES = ("id", "fold", "split", "start_seconds", "num_samples", "sample_rate")
LISTS = ("label", "labels", "label_id", "mid")
"""Fields that hold a single value or a list."""
EVENT_BYTES = 300
"""Approximate memory of an event, bytes."""


def parse(text: bytes) -> tuple[dict[str, Any], int]:
    """Returns the fields of ``text`` that bat reads, and approximately the memory they take in
    bytes.

    A nested object where a value is expected becomes an empty list or object; control characters in
    texts are escaped.

    Raises:
        ValueError, TypeError, RecursionError: not a JSON object.
    """
    said = dict(json.loads(text))
    kept = {name: _flat(said[name]) for name in VALUES if name in said}
    kept |= {name: _listed(said[name]) for name in LISTS if name in said}
    original = said.get("original_data")  # LAION's layout
    if isinstance(original, dict) and "class_labels" in original:
        kept["original_data"] = {"class_labels": _listed(original["class_labels"])}
    if isinstance(said.get("text"), str):
        kept["text"] = one_line(said["text"])
    if isinstance(said.get("events"), list):  # keeps the valid ones
        found = (from_json(entry) for entry in said["events"])
        kept["events"] = [
            e._replace(labels=tuple(map(one_line, e.labels))) for e in found if e is not None
        ]
    return kept, _bytes(kept)


def _flat(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value)
    return type(value)() if isinstance(value, (list, dict)) else value


def _listed(value: Any) -> Any:
    return [_flat(x) for x in value] if isinstance(value, list) else _flat(value)


def _bytes(kept: dict[str, Any]) -> int:
    size = sys.getsizeof(kept)
    for value in kept.values():
        size += _bytes(value) if isinstance(value, dict) else sys.getsizeof(value)
        size += sum(map(sys.getsizeof, value)) if isinstance(value, list) else 0
    return size + EVENT_BYTES * len(kept.get("events", ()))
