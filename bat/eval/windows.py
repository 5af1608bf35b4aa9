"""Chooses the window of custom data (``data.csv``) and checks that events fit it."""

from __future__ import annotations

import numpy as np

from bat.config.schema import Supervised
from bat.data.index import Index
from bat.data.stream import frames_left_out
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.tasks.events import Events


def window(
    index: Index, clip_seconds: float, events: Events | None = None
) -> tuple[float, list[str]]:
    """Returns the seconds of every clip that an encoder sees, and lines that say so.

    ``clip_seconds``, or the longest clip if that is shorter: the rest would be silence. Longer
    clips are cut to their start, from which the times of ``events`` count.
    """
    seconds = _seconds(index)
    known = seconds[seconds > 0]
    longest = float(known.max()) if len(known) else clip_seconds
    chosen = min(clip_seconds, longest)
    said = []
    if chosen < clip_seconds:
        said.append(f"window {chosen:.6g} s, the longest clip (data.clip_seconds={clip_seconds:g})")
    longer = _longer(index, chosen)
    if longer:
        line = (
            f"{longer} of {len(index)} clips are longer than the window of {chosen:g} s: only "
            f"their start is judged (the longest: {longest:.6g} s; data.clip_seconds= makes the "
            "window longer)"
        )
        if events is not None:
            late = sum(e.onset_seconds >= chosen for found in events.values() for e in found)
            line += f"; {late} event(s) begin after it"
        said.append(line)
    return chosen, said


def check_events(events: Events, index: Index) -> None:
    """Raise ``UserError`` if events begin after their recording has ended."""
    of = {escape_key(key): found for key, found in events.items()}
    late = [
        (event.line, f"onset {event.onset_seconds:g}, {index.key(i)} has {end:.6g} s")
        for i, end in enumerate(_seconds(index).tolist())
        for event in of.get(index.key(i), ())
        if 0 < end <= event.onset_seconds
    ]
    known = set(index.vocabulary)
    met = (name for found in of.values() for event in found for name in event.labels)
    strange = next((name for name in met if name not in known), None)
    if strange is not None:
        raise UserError(
            f"an event has the label {strange!r}, which is not among the classes of the data: give "
            "its clip that label too (bat-shard does)"
        )
    if late:
        line, said = min(late)
        raise UserError(
            f"{len(late)} event(s) begin after their recording has ended (the first"
            f"{f' in line {line}' if line else ''}: {said}): give times in seconds, not in "
            "milliseconds or samples"
        )


def check_in_place(config: Supervised) -> None:
    """Raise ``UserError`` for settings that would shift clips against their events or texts."""
    for set_, name, remedy in (
        (config.data.roll, "data.roll=true", "data.roll=false"),
        (config.pad_offset == "random", "pad_offset=random", "pad_offset=start"),
    ):
        if set_:
            raise UserError(f"{name} moves clips, not their events: say {remedy}, or level=clip")


def _seconds(index: Index) -> np.ndarray:
    """Returns the lengths of the clips, (n,); 0 if unknown."""
    known = (index.frames > 0) & (index.rate > 0)
    return np.where(known, index.frames / np.maximum(index.rate, 1), 0.0)


def _longer(index: Index, clip_seconds: float) -> int:
    """Returns the number of clips longer than a window of ``clip_seconds``."""
    pairs = zip(index.frames.tolist(), index.rate.tolist(), strict=True)
    return sum(
        frames > 0 and rate > 0 and frames_left_out(frames, rate, clip_seconds) > 0
        for frames, rate in pairs
    )
