"""Decides what is read of recordings longer than ``data.clip_seconds``, and says so.

With ``data.windows`` they are cut into windows after the folds are made, so that the windows of a
recording are never on both sides; else their start is evaluated. For labels of time patches windows
begin at whole time patches of their recording, back to back.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np

from bat.config.sections import Data
from bat.data.index import Index
from bat.data.windows import Window, cut_into_windows, is_long, places_of, windows_of
from bat.errors import UserError
from bat.eval.splits import Split
from bat.tasks.events import Events


def window(
    index: Index,
    data: Data,
    events: Events | None,
    texts: dict[str, str] | None,
    *,
    shorten: bool,
) -> tuple[float, list[str]]:
    """Returns the seconds of every clip that an encoder sees, and lines that say so.

    ``data.clip_seconds``; with ``shorten`` the longest clip if that is shorter: the rest would be
    silence. Raises ``UserError`` if longer recordings with ``texts`` are to be cut into windows.
    """
    longest = float(index.seconds.max(initial=0)) or data.clip_seconds
    chosen = min(data.clip_seconds, longest) if shorten else data.clip_seconds
    said = []
    if chosen < data.clip_seconds:
        given = f"data.clip_seconds={data.clip_seconds:g}"
        said.append(f"window {chosen:.6g} s, the longest clip ({given})")
    longer = int(is_long(index, chosen).sum())
    if longer and data.windows and texts is not None:
        raise UserError(
            f"{longer} of {len(index)} recordings are longer than data.clip_seconds={chosen:g}, "
            "and a text is of a whole recording: say data.clip_seconds="
            f"{math.ceil(longest)} (memory grows with it), or cut the recordings at words"
        )
    if longer and not data.windows:
        line = (
            f"{longer} of {len(index)} clips are longer than the window of {chosen:g} s: only "
            f"their start is evaluated (the longest: {longest:.6g} s; data.windows=true reads all "
            "of it, data.clip_seconds= makes the window longer)"
        )
        if events is not None:
            late = sum(e.onset_seconds >= chosen for found in events.values() for e in found)
            line += f"; {late} event(s) begin after it"
        said.append(line)
    return chosen, said


def cut_recordings(
    index: Index,
    splits: list[Split],
    data: Data,
    *,
    in_time: bool,
    hop_seconds: float,
) -> tuple[Index, list[Split], dict[str, Window] | None, list[str]]:
    """Returns index and folds of the windows of long recordings, their places, and a line.

    Without ``data.windows``, or if no recording is long, they are unchanged and the places None.
    ``index`` itself is not changed. ``in_time``: labels are those of time patches of
    ``hop_seconds``.
    """
    long = is_long(index, data.clip_seconds)
    if not data.windows or not long.any():
        return index, splits, None, []
    cut = copy.copy(index)
    cut.__dict__.pop("hash", None)  # the hash covers the windows, too
    step: float | None = hop_seconds * max(1, math.floor(data.clip_seconds / hop_seconds + 1e-6))
    step = step if in_time else None
    cut_into_windows(cut, data.clip_seconds, step, rest_seconds=hop_seconds)
    of_windows = [
        replace(
            held,
            train=windows_of(cut, held.train),
            test=windows_of(cut, held.test),
            valid=None if held.valid is None else windows_of(cut, held.valid),
        )
        for held in splits
    ]
    windows = len(windows_of(cut, np.flatnonzero(long)))
    how = "outputs joined in time" if in_time else "probabilities averaged"
    line = (
        f"{int(long.sum())} of {len(index)} recordings are longer than {data.clip_seconds:g} s: "
        f"{windows} windows, {how}, each recording counts once (data.windows=true)"
    )
    return cut, of_windows, places_of(cut), [line]
