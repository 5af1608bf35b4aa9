"""Reads the JSON that lies beside a clip in a shard: labels, events, text, fold and split.

Several layouts are read (docs/data.md); other fields are ignored.
"""

from __future__ import annotations

import json
from typing import Any

from bat.redact import one_line
from bat.tasks.events import from_json
from bat.tasks.labels import names_of


def parse(text: bytes) -> dict[str, Any]:
    """Returns the fields of a clip's JSON that bat reads (docs/data.md).

    A nested object where a value is expected becomes an empty list or object; control characters in
    texts are escaped.

    Raises:
        ValueError, TypeError, RecursionError: not a JSON object.
    """
    said = dict(json.loads(text))
    values = ("id", "fold", "split", "start_seconds", "num_samples", "sample_rate")
    lists = ("label", "labels", "label_id", "mid")  # a single value or a list
    kept = {name: _flat(said[name]) for name in values if name in said}
    kept |= {name: _listed(said[name]) for name in lists if name in said}
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
    return kept


def _flat(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value)
    return type(value)() if isinstance(value, (list, dict)) else value


def _listed(value: Any) -> Any:
    return [_flat(x) for x in value] if isinstance(value, list) else _flat(value)


def parse_labels(meta: dict[str, Any]) -> list[tuple[str, int]]:
    """Returns ``[(name, label_id or -1), ...]`` of a sample's JSON (docs/data.md).

    Read: ``label`` (or ``labels``) and ``label_id``, each a list or a single value;
    ``original_data.class_labels`` (LAION). Names are normalised by ``bat.tasks.labels.names_of``;
    numbers replace missing names.
    """
    original = meta.get("original_data")
    nested = original.get("class_labels") if isinstance(original, dict) else None
    given, numbers = meta.get("label", meta.get("labels", nested)), meta.get("label_id")
    names = names_of(given)
    numbers = numbers if isinstance(numbers, list) else [numbers]
    ids = [x for x in numbers if isinstance(x, int) and 0 <= x < 1 << 31]
    if not names and not given:
        names = [str(x) for x in ids]
    if len(ids) != len(names):
        ids = [-1] * len(names)
    return list(dict(zip(names, ids, strict=True)).items())
