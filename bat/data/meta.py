"""What is kept of a clip's JSON: the fields that bat reads, and no more memory than it should take.

A shard's JSON may be anybody's (STACK section 6); parsed it takes up to 25 times its bytes. Read
are labels (``bat.data.table.parse_labels``), events, text, length, fold, split and what
``bat-shard`` writes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bat.redact import one_line
from bat.tasks.events import from_json

VALUES = ("id", "fold", "split", "start_seconds", "num_samples", "sample_rate")
LISTS = ("label", "labels", "label_id", "mid")
"""Each a value or a list of them."""
EVENT_BYTES = 300
"""About what an event takes."""


def parse(text: bytes) -> tuple[dict[str, Any], int]:
    """The fields of ``text`` that are read, and about how many bytes of memory they take.

    What is nested where a value should be comes as an empty list or object; control characters
    in texts are spelled out.

    Raises:
        ValueError, TypeError, RecursionError: not a JSON object.
    """
    said = dict(json.loads(text))
    kept = {name: _flat(said[name]) for name in VALUES if name in said}
    kept |= {name: _listed(said[name]) for name in LISTS if name in said}
    original = said.get("original_data")  # LAION's
    if isinstance(original, dict) and "class_labels" in original:
        kept["original_data"] = {"class_labels": _listed(original["class_labels"])}
    if isinstance(said.get("text"), str):
        kept["text"] = one_line(said["text"])
    if isinstance(said.get("events"), list):  # those that can be read
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
