"""Finds the files of a published data set and collects what is wrong with them.

A message names every kind of mistake at once, each with its count, the first places and the remedy.
Nothing is downloaded: where files are missing, the message says where the set is published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bat.errors import UserError
from bat.tasks.base import Reading, Row, Task
from bat.tasks.events import Event

SHOWN = 3
"""Places that a message names of each kind of mistake."""


class Mistakes:
    """Mistakes of the data set at ``root``; ``published``: its name and where to get it."""

    def __init__(self, root: Path, published: str) -> None:
        self.root, self.published = root, published
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Adds a mistake; ``kind``: what is wrong, a colon, and the remedy, as ``MISSING``."""
        self._found.setdefault(kind, []).append(place)

    def event(
        self,
        onset: str | float,
        offset: str | float,
        label: str,
        *,
        known: Collection[str],
        at: str,
    ) -> Event | None:
        """Returns the event of these seconds, or None with a mistake added.

        ``known``: the classes of the set; ``at``: the file and line.
        """
        if label not in known:
            self.add(UNKNOWN, f"{label!r}, {at}")
            return None
        try:
            times = float(onset), float(offset)
        except ValueError:
            times = math.nan, math.nan
        if not 0 <= times[0] < times[1] < math.inf:
            self.add(TIMES, f"{onset} to {offset}, {at}")
            return None
        return Event(*times, (label,))

    def check(self) -> None:
        """Raises ``UserError`` if there is any mistake."""
        if not self._found:
            return
        said = []
        for kind, places in self._found.items():
            more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            what, _, remedy = kind.partition(": ")
            said.append(f"{len(places)} {what} ({'; '.join(places[:SHOWN])}{more}): {remedy}")
        raise UserError("\n  ".join([f"{self.published}, in {self.root}:", *said]))


MISSING = "listed audio file(s) do not exist: complete the download"
UNKNOWN = "line(s) have a label that is no class of the set: mend or remove them"
TIMES = "event(s) do not have 0 <= onset < offset: mend or remove them"
"""Kinds of mistakes."""


def find_root(root: Path, needed: Sequence[str], published: str) -> Path:
    """Returns ``root``, or a folder in it or two levels below, that holds all of ``needed``.

    Raises:
        UserError: none does; the message names what is missing and where the set is published.
    """

    def lacks(place: Path) -> list[str]:
        return [name for name in needed if not (place / name).exists()]

    if not lacks(root):
        return root
    places = [root, *sorted(path for at in ("*", "*/*") for path in root.glob(at) if path.is_dir())]
    lacking = {place: lacks(place) for place in places}
    best = min(places, key=lambda place: len(lacking[place]))  # the first of equals
    if lacking[best]:
        raise UserError(
            f"{best} lacks {', '.join(lacking[best])} of {published}: name the folder that holds "
            "them, data.root=DIR; bat downloads nothing"
        )
    return best


def event_task(
    name: str,
    rows: Callable[[Path], Reading],
    classes: Sequence[str],
    *,
    metrics: tuple[str, ...] = (),
    **constants: Any,
) -> Task:
    """Returns the task of a set with ``classes`` and strong labels; ``metrics`` after the usual."""
    return Task(
        name=name,
        rows=rows,
        target="events",
        metrics=("event_f1", "segment_f1", "psds1", "psds2", "map", *metrics),
        classes=len(classes),
        label_sets=(frozenset(classes),),
        **constants,
    )


def row_of(audio: Path, key: str, events: Sequence[Event], *, split: str) -> Row:
    """Returns the row of a recording with these events; its labels are their union."""
    labels = dict.fromkeys(label for event in events for label in event.labels)
    return Row(audio, key, tuple(labels), split=split, events=tuple(events))
