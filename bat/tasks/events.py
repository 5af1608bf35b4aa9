"""Events of recordings: sounds with onset, offset and label.

Times are seconds from the start of the clip (docs/method.md 5, ``dcase16``). The labels of a whole
clip are the union of its events' labels; ``bat.eval.targets`` computes the labels that are
active at a time patch, and ``bat.eval.scoring`` makes events of a probe's outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """One sound in a recording."""

    onset_seconds: float
    offset_seconds: float
    labels: tuple[str, ...]
    line: int = 0
    """Line of the CSV that it is from; 0: none."""

    def within(self, start_seconds: float, seconds: float) -> Event | None:
        """Returns its part in the piece of ``seconds`` from ``start_seconds``, in that time."""
        onset = max(self.onset_seconds - start_seconds, 0.0)
        offset = min(self.offset_seconds - start_seconds, seconds)
        if offset <= onset:
            return None
        return self._replace(onset_seconds=round(onset, 6), offset_seconds=round(offset, 6))


Events = Mapping[str, tuple[Event, ...]]
"""Events of each recording by its key (``Row.key``), in the order of the source; a recording
without events has an empty entry."""


class Detection(NamedTuple):
    """Constants of a task for making events from outputs and for their evaluation."""

    threshold: float = 0.5
    """Least probability at which a class is active in a patch."""
    median: int = 3
    """Patches of the median filter of each class before the threshold, odd; 1: none."""
    edge: Literal["start", "center", "end"] = "end"
    """End of an event: at the start of its last patch, or at the end of it; ``center``: it begins
    and ends at the centres of its first and last patch."""
    collar_seconds: float = 0.2
    """Tolerance of an onset."""
    segment_seconds: float = 1.0
    """Segment length of segment F1."""


def digest(events: Events) -> str:
    """Returns a hash over keys, times and labels, on which targets of ``events`` depend."""
    said = [[key, [event[:3] for event in found]] for key, found in sorted(events.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def as_json(event: Event) -> dict[str, Any]:
    """Returns an entry of the field ``events`` of a clip's JSON."""
    onset, offset, labels, _ = event
    label = labels[0] if len(labels) == 1 else list(labels)
    return {"onset": onset, "offset": offset, "label": label}


def from_json(value: Any) -> Event | None:
    """Reads an entry of the field ``events`` of a clip's JSON: an object as ``as_json`` makes it,
    or ``[onset, offset, label]``; None if it is neither."""
    if isinstance(value, dict):
        value = [value.get("onset"), value.get("offset"), value.get("label")]
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    *times, names = value
    names = names if isinstance(names, list) else [names]
    known = all(isinstance(t, (int, float)) and math.isfinite(t) for t in times)
    if not known or not 0 <= times[0] < times[1] or not all(isinstance(n, str) for n in names):
        return None
    return Event(float(times[0]), float(times[1]), tuple(names))
