"""Cuts recordings into windows: ``spans`` of one, ``Windows`` of many, clips of an index.

A recording of length d becomes K windows of length w; window k covers [s_k, min(s_k + w, d)):

    with a hop h     s_k = k h,                  K = 1 + ceil((d - w - rest) / h)
    without          s_k = k (d - w) / (K - 1),  K = ceil(d / w), or 1 if d <= w + rest

With a hop the last window is as short as it is, and up to ``rest`` at the end is no window of its
own. Without one all windows are full (but for recordings shorter than w), every sample lies in one,
and the overlap, less than a window altogether, is spread evenly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bat.audio.decode import DecodeError, probe
from bat.data.index import Index
from bat.data.stream import CROP_SLACK

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]
MAX_SECONDS = 14 * 86_400.0
"""Longest recording whose length is counted where its header gives none."""


class Windows:
    """The windows of n recordings, numbered from 0 over all of them.

    Args:
        lengths: (n,), in any unit; 0: unknown, one window.
        window: length of each, one or (n,); None: a recording is one window.
        hop: from the start of one to the next, one or (n,); None: full windows, spread evenly.
        rest: see above.

    Attributes: ``first`` (n + 1,), the number of each recording's first window.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        window: float | NDArray[np.float64] | None = None,
        hop: float | NDArray[np.float64] | None = None,
        *,
        rest: float | NDArray[np.float64] = 0.0,
    ) -> None:
        self.lengths: Floats = np.asarray(lengths, np.float64)
        self.hop = None if window is None else hop
        wide = np.inf if window is None else window
        self.window: Floats = np.broadcast_to(np.asarray(wide, np.float64), self.lengths.shape)
        beyond = np.maximum(self.lengths - self.window - rest, 0)
        if self.hop is None:
            count = np.where(beyond > 0, np.ceil(self.lengths / self.window), 1)
        else:
            count = 1 + np.ceil(beyond / self.hop - 1e-9)
        self.first: Numbers = np.concatenate([[0], np.cumsum(count, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def counts(self) -> Numbers:
        """(n,) windows of each recording."""
        return np.diff(self.first)

    def recording(self, rows: Numbers) -> Numbers:
        """Returns the recordings of windows ``rows``."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def times(self, rows: Numbers) -> tuple[Floats, Floats]:
        """Returns start and end of windows ``rows`` in their recordings."""
        of = self.recording(rows)
        nth, d, w = rows - self.first[of], self.lengths[of], self.window[of]
        start: Floats = np.zeros(len(rows))
        if self.hop is None:
            more = nth > 0
            start[more] = (d - w)[more] * nth[more] / (self.counts[of] - 1)[more]
        else:
            start += nth * np.broadcast_to(self.hop, self.lengths.shape)[of]
        return start, np.minimum(start + w, np.maximum(d, start))


def spans(
    length: float, window: float, hop: float | None = None, *, rest: float = 0.0
) -> list[tuple[float, float]]:
    """Returns start and end of each window of one recording; see ``Windows``."""
    windows = Windows([length], window, hop, rest=rest)
    start, end = windows.times(np.arange(len(windows)))
    return list(zip(start.tolist(), end.tolist(), strict=True))


def cut_into_windows(
    index: Index,
    clip_seconds: float,
    hop_seconds: float | None = None,
    *,
    rest_seconds: float = 0.0,
) -> Index:
    """Replaces each clip of ``index`` longer than ``clip_seconds`` by its windows, in place;
    returns ``index``. Clips longer by a fiftieth at most (``CROP_SLACK``), and those of unknown
    length, stay one clip. The order of the stream is then that of the windows: a pure function of
    (seed, epoch), each window once.

    Events and texts are dropped, since they describe whole recordings. ``index.starts`` (n,) is
    then the first sample of each window, at the rate of its file, and ``index.recordings`` (n,) the
    id that its recording had. ``hop_seconds`` and ``rest_seconds``: see ``Windows``.
    """
    assert index.starts is None, "cut already"
    rate = np.maximum(index.rate, 1)
    wide = _samples(index, clip_seconds)
    rest = CROP_SLACK * wide
    if hop_seconds is not None:
        rest = np.where(is_long(index, clip_seconds), rest_seconds * rate, np.inf)
    hop = None if hop_seconds is None else hop_seconds * rate
    windows = Windows(index.frames, wide, hop, rest=rest)
    each = np.arange(len(windows))
    rows, (start, _) = windows.recording(each), windows.times(each)
    labels = index.labels_per_clip
    first = index.label_ptr[:-1][rows]
    index.label_ptr = np.concatenate([[0], np.cumsum(labels[rows], dtype=np.int64)])
    within = np.arange(index.label_ptr[-1]) - np.repeat(index.label_ptr[:-1], labels[rows])
    index.label_ids = index.label_ids[np.repeat(first, labels[rows]) + within]
    index.take(rows)
    index.starts = (np.floor(start) if hop is None else np.rint(start)).astype(np.int64)
    index.events, index.texts = {}, {}
    return index


class Window(NamedTuple):
    """Place of a window in its recording."""

    recording: str
    """Key of the recording."""
    start_seconds: float


def _samples(index: Index, clip_seconds: float) -> Floats:
    """Returns the samples that are read of ``clip_seconds``, (n,), at the rates of the files."""
    wide: Floats = np.ceil(clip_seconds * np.maximum(index.rate, 1) - 1e-6)
    return wide


def is_long(index: Index, clip_seconds: float) -> NDArray[np.bool_]:
    """Returns (n,), True for clips known to be longer than ``clip_seconds``, beyond the slack."""
    wide = _samples(index, clip_seconds)
    long: NDArray[np.bool_] = (index.rate > 0) & (index.frames - wide > CROP_SLACK * wide)
    return long


def fill_lengths(index: Index) -> None:
    """Reads the lengths that ``index`` does not know from the headers of the clips; those that do
    not open stay unknown."""
    unknown = np.flatnonzero((index.frames < 0) | (index.rate == 0)).tolist()
    if unknown:
        index.frames, index.rate = index.frames.copy(), index.rate.copy()  # may be mapped
        vars(index).pop("hash", None)
    for i in unknown:
        try:
            found = probe(index.read(i).data, max_file_seconds=MAX_SECONDS)
        except (DecodeError, OSError):
            continue  # reported where it is decoded
        index.frames[i], index.rate[i] = found.frames, found.sample_rate


def windows_of(index: Index, recordings: Numbers) -> Numbers:
    """Returns the ids of all windows of ``recordings`` (ids before cutting), ascending."""
    assert index.recordings is not None, "not cut"
    return np.flatnonzero(np.isin(index.recordings, recordings))


def places_of(index: Index) -> dict[str, Window]:
    """Returns the place of each window of a cut ``index``, by its key."""
    assert index.starts is not None, "not cut"
    starts = (index.starts / np.maximum(index.rate, 1)).tolist()
    return {index.key(i): Window(index.recording_key(i), s) for i, s in enumerate(starts)}
