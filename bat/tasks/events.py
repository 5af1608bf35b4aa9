"""Events of recordings: what sounds from when to when, as a CSV of one's own lists them.

Times are seconds from the start of the recording (SPEC section 5, ``dcase16``). Labels of whole
clips are the union of their events'; what is active at a time patch, ``bat.eval.frame_targets``
says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple


class Event(NamedTuple):
    """One sound in a recording."""

    onset_seconds: float
    offset_seconds: float
    labels: tuple[str, ...]
    line: int
    """Of the CSV."""


Events = Mapping[str, tuple[Event, ...]]
"""The events of each recording by its key (``Row.key``), in the order of the CSV; a recording
without events has an empty entry."""


def digest(events: Events) -> str:
    """Hash over keys, times and labels: what targets made of ``events`` depend on."""
    said = [[key, [event[:3] for event in found]] for key, found in sorted(events.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
