"""Cuts the clips of an index into windows of one length, so that all of a recording is read.

A recording longer than ``clip_seconds`` becomes K clips with the same bytes. Either all windows are
full, ``K = ceil(length / clip_seconds)``: window k starts at ``k / (K - 1)`` of what is left over,
to the nearest sample, so that every sample lies in one, and the overlap, less than a window
altogether, is spread evenly. Or window k starts at ``k * step_seconds``, and the last one is as
short as it is. Shorter recordings (and those longer by a fiftieth at most, see ``CROP_SLACK``), and
those of unknown length, stay one clip. The order of the stream is then that of the windows: a pure
function of (seed, epoch), each window once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bat.audio.decode import DecodeError, probe
from bat.data.index import Index
from bat.data.stream import frames_left_out

MAX_SECONDS = 14 * 86_400.0
"""Longest recording whose length is counted where its header gives none."""


class Window(NamedTuple):
    """Place of a window in its recording."""

    recording: str
    """Key of the recording."""
    start_seconds: float


def is_long(index: Index, clip_seconds: float) -> np.ndarray:
    """Returns (n,) bool, True for the clips that are longer than ``clip_seconds``."""
    seconds = index.frames / np.maximum(index.rate, 1)
    found = (index.frames > 0) & (index.rate > 0) & (seconds > clip_seconds)
    for i in np.flatnonzero(found).tolist():
        found[i] = frames_left_out(int(index.frames[i]), int(index.rate[i]), clip_seconds) > 0
    return found


def fill_lengths(index: Index) -> None:
    """Reads the lengths that ``index`` does not know from the headers of the clips; those that do
    not open stay unknown."""
    for i in np.flatnonzero((index.frames < 0) | (index.rate == 0)).tolist():
        try:
            found = probe(index.read(i).data, max_file_seconds=MAX_SECONDS)
        except (DecodeError, OSError):
            continue  # reported where it is decoded
        index.frames[i], index.rate[i] = found.frames, found.sample_rate


def cut_into_windows(
    index: Index,
    clip_seconds: float,
    *,
    step_seconds: float | None = None,
    rest_seconds: float = 0.0,
) -> Index:
    """Replaces each long clip of ``index`` by its windows, in place; returns ``index``.

    Events and texts are dropped, since they describe whole recordings. ``index.starts`` (n,) is
    then the first sample of each window, at the rate of its file, and ``index.recordings`` (n,) the
    number of its recording before.

    Args:
        clip_seconds: length of a window.
        step_seconds: from one start to the next; None: full windows, spread evenly.
        rest_seconds: with ``step_seconds``: a rest at the end that is no window of its own.
    """
    assert index.starts is None, "cut already"
    counts = np.ones(len(index), np.int64)
    left = np.zeros(len(index), np.int64)
    for i in np.flatnonzero(is_long(index, clip_seconds)).tolist():
        frames, rate = int(index.frames[i]), int(index.rate[i])
        left[i] = frames_left_out(frames, rate, clip_seconds)
        if step_seconds is None:
            counts[i] = -(-frames // (frames - left[i]))
        else:
            beyond = (left[i] / rate - rest_seconds) / step_seconds
            counts[i] = 1 + max(0, int(np.ceil(beyond - 1e-9)))
    rows = np.repeat(np.arange(len(index)), counts)
    nth = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    labels = index.labels_per_clip
    first = index.label_ptr[:-1][rows]
    index.label_ptr = np.concatenate([[0], np.cumsum(labels[rows], dtype=np.int64)])
    within = np.arange(index.label_ptr[-1]) - np.repeat(index.label_ptr[:-1], labels[rows])
    index.label_ids = index.label_ids[np.repeat(first, labels[rows]) + within]
    index.take(rows)
    if step_seconds is None:
        index.starts = left[rows] * nth // np.maximum(counts[rows] - 1, 1)
    else:
        index.starts = np.rint(nth * step_seconds * index.rate).astype(np.int64)
    index.events, index.texts = {}, {}
    return index


def windows_of(index: Index, recordings: np.ndarray) -> np.ndarray:
    """Returns the ids of all windows of ``recordings`` (ids before cutting), ascending."""
    assert index.recordings is not None, "not cut"
    return np.flatnonzero(np.isin(index.recordings, recordings))


def places_of(index: Index) -> dict[str, Window]:
    """Returns the place of each window of a cut ``index``, by its key."""
    assert index.starts is not None, "not cut"
    starts = (index.starts / np.maximum(index.rate, 1)).tolist()
    return {index.key(i): Window(index.recording_key(i), s) for i, s in enumerate(starts)}
