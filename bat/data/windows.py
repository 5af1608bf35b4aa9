"""Cuts the clips of an index into windows of one length, so that an epoch hears all of a recording.

A recording longer than ``clip_seconds`` becomes K clips with the same bytes, ``K = ceil(length /
clip_seconds)``: window k starts at ``k / (K - 1)`` of what is left over, to the nearest sample. So
each window is full, every sample lies in one, and the overlap, less than a window altogether, is
spread evenly. Shorter clips (and those longer by a fiftieth
at most, see ``CROP_SLACK``), and those of unknown length, stay one clip. The order of the
stream is then that of the windows: a pure function of (seed, epoch), each window once.
"""

from __future__ import annotations

import numpy as np

from bat.data.index import Index
from bat.data.stream import frames_left_out


def cut_into_windows(index: Index, clip_seconds: float) -> Index:
    """Replaces each long clip of ``index`` by its windows, in place; returns ``index``.

    Events and texts are dropped, since they describe whole recordings. ``index.starts`` (n,) is
    then the first sample of each window, at the rate of its file.
    """
    assert index.starts is None, "cut already"
    counts = np.ones(len(index), np.int64)
    left = np.zeros(len(index), np.int64)
    for i in np.flatnonzero(index.frames > clip_seconds * np.maximum(index.rate, 1)).tolist():
        frames = int(index.frames[i])
        left[i] = frames_left_out(frames, int(index.rate[i]), clip_seconds)
        if left[i]:
            counts[i] = -(-frames // (frames - left[i]))
    rows = np.repeat(np.arange(len(index)), counts)
    nth = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    labels = index.labels_per_clip
    first = index.label_ptr[:-1][rows]
    index.label_ptr = np.concatenate([[0], np.cumsum(labels[rows], dtype=np.int64)])
    within = np.arange(index.label_ptr[-1]) - np.repeat(index.label_ptr[:-1], labels[rows])
    index.label_ids = index.label_ids[np.repeat(first, labels[rows]) + within]
    index.take(rows)
    index.starts = left[rows] * nth // np.maximum(counts[rows] - 1, 1)
    index.events, index.texts = {}, {}
    return index
