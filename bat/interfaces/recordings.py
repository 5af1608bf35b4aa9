"""Lists the recordings in files, folders, CSVs and shards, and reads them window by window.

The order is that of the paths as given: a folder's files sorted, a CSV's lines and a shard's clips
as they stand; a file that is named again counts once. Lengths come from the files' headers, so the
windows of all recordings are known before any audio is decoded:

    window k of a recording of d seconds covers [k hop, min(k hop + window, d)),
    k = 0 .. ceil((d - window - rest) / hop),   rest = one time patch of the encoder

The last window is as short as it is; a rest shorter than one time patch is not a window of its own.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from bat.audio.decode import DecodeError, decode, probe
from bat.data.files import MAX_SECONDS, FileIndex, index_files
from bat.data.index import Index, open_index
from bat.data.sources import SUFFIXES, is_url
from bat.errors import UserError
from bat.io import missing
from bat.tasks.base import AUDIO_SUFFIXES, Row, as_text
from bat.tasks.csv import ALSO_CALLED
from bat.tasks.folder import find_audio, keys_of
from bat.tasks.tables import numbered_lines
from bat.types import Skipped, WaveBatch

BATCH_SECONDS = 30.0
"""Seconds of audio, times clips of a batch, that a batch holds with its padding."""


class LeftOut(NamedTuple):
    """A recording, or a window of one, without a result."""

    name: str
    start_seconds: float
    reason: str


class Recordings:
    """The n recordings of several indexes, one after another; made by ``list_recordings``.

    Attributes: ``seconds`` (n,), 0 where a length cannot be read; ``left_out``: what is listed and
    cannot be read.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        names: Sequence[Sequence[str] | None],
        left_out: Sequence[LeftOut],
    ) -> None:
        """``names`` of the recordings of each index; None: shard and key."""
        self.indexes, self._names, self.left_out = list(indexes), list(names), list(left_out)
        self._first = np.cumsum([0, *map(len, indexes)])
        self.seconds = np.concatenate([_seconds(index) for index in indexes])

    def __len__(self) -> int:
        return len(self.seconds)

    def place(self, i: int) -> tuple[Index, int]:
        """Returns the index that holds recording ``i``, and its number there."""
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.indexes[number], i - int(self._first[number])

    def name(self, i: int) -> str:
        """Returns the path of recording ``i`` as given, or its shard and key."""
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        names, j = self._names[number], i - int(self._first[number])
        index = self.indexes[number]
        return f"{index.shard_name(j)}/{index.key(j)}" if names is None else names[j]

    def key(self, i: int) -> str:
        """Returns the key of recording ``i``, ASCII, without slashes."""
        index, j = self.place(i)
        return index.key(j)

    @property
    def hash(self) -> str:
        """Hash over names, lengths and checksums."""
        digest = hashlib.sha256("".join(index.hash for index in self.indexes).encode())
        for names in self._names:
            for name in names or ():
                digest.update(f"{name}\0".encode(errors="backslashreplace"))
        return digest.hexdigest()


def _seconds(index: Index) -> NDArray[np.float64]:
    """Returns the lengths of the clips; those that the index does not know are read."""
    known = (index.frames > 0) & (index.rate > 0)
    seconds = np.where(known, index.frames / np.maximum(index.rate, 1), 0.0)
    for i in np.flatnonzero(~known).tolist():
        try:
            found = probe(index.read(i).data, max_file_seconds=MAX_SECONDS)
            seconds[i] = found.frames / found.sample_rate
        except (DecodeError, OSError):
            continue  # reported where it is decoded
    return seconds


def list_recordings(
    paths: Sequence[str | Path],
    *,
    cache: Path | None = None,
    repeats: bool = False,
    progress: bool = False,
) -> Recordings:
    """Returns the recordings at ``paths``: audio files, folders of audio, CSVs, shards.

    Args:
        paths: a folder is read recursively (one with tars and no audio: as shards); a CSV has a
            column ``path`` (or a synonym), relative to it; shards as ``bat.data.index.open_index``.
        cache: JSON file that keeps the headers of audio files, for a command that continues.
        repeats: a file that is named again counts again.
        progress: show a bar while headers are read.

    Raises:
        UserError: paths that do not exist or hold no audio (all of them), nothing readable.
    """
    groups: list[list[Path] | str] = []
    left_out: list[LeftOut] = []
    problems: list[str] = []
    for given in paths:
        try:
            found = _find(given, left_out)
        except UserError as error:
            problems.append(str(error))
            continue
        if isinstance(found, list) and groups and isinstance(groups[-1], list):
            groups[-1] += found
        else:
            groups.append(found)
    if not paths:
        problems.append("no paths: name audio files, folders, CSVs or shards")
    if problems:
        raise UserError("; ".join(problems))
    indexes: list[Index] = []
    names: list[list[str] | None] = []
    seen: set[str] = set()
    for number, group in enumerate(groups):
        if isinstance(group, str):
            index = open_index(group, labels="drop")
            left_out += [LeftOut(name, 0.0, reason) for name, reason in index.left_out.items()]
            indexes.append(index)
            names.append(None)
            continue
        files = [f for f in group if repeats or not _again(seen, os.path.abspath(f))]
        if files:
            place = None if cache is None else cache.with_name(f"{cache.stem}-{number}.json")
            listed, said = _index_files(files, place, left_out, progress)
            indexes.append(listed)
            names.append(said)
    return Recordings(indexes, names, left_out)


def _again(seen: set[str], name: str) -> bool:
    """Returns True if ``name`` is in ``seen``, and adds it."""
    before = name in seen
    seen.add(name)
    return before


def _find(given: str | Path, left_out: list[LeftOut]) -> list[Path] | str:
    """Returns the files that ``given`` names, or the shards as text; adds to ``left_out``."""
    text, path = str(given), Path(given).expanduser()
    if path.is_dir():
        files, others = find_audio(path)
        left_out += [LeftOut(as_text(str(path / o.file)), 0.0, o.reason) for o in others]
        if files:
            return files
        if any(file.name.endswith(SUFFIXES) for file in (*path.glob("*"), *path.glob("*/*"))):
            return text
        raise UserError(
            f"{path} holds no audio ({', '.join(AUDIO_SUFFIXES[:5])}, ...) and no tars: "
            "name another folder"
        )
    if path.is_file():
        if path.name.endswith(SUFFIXES):
            return text
        return _listed(path) if path.suffix.lower() == ".csv" else [path]
    braces = re.search(r"\{.*(,|\.\.).*\}", text) is not None
    if text.endswith(SUFFIXES) and (is_url(given) or braces or glob.has_magic(text)):
        return text
    if is_url(given):
        raise UserError(f"{text}: of URLs, those of .tar shards are read; fetch other files first")
    raise UserError(f"{missing(path)}: name audio files, folders, CSVs or shards")


def _listed(path: Path) -> list[Path]:
    """Returns the files in column ``path`` of a CSV; other columns are not read."""
    columns, lines = numbered_lines(path)
    plain = {column: re.sub("[_ -]", "", column.lower()) for column in columns}
    found = [c for c, name in plain.items() if ALSO_CALLED.get(name, name) == "path"]
    if len(found) != 1:
        raise UserError(
            f"{path} line 1: {'no column' if not found else 'several columns'} 'path' (it has: "
            f"{', '.join(columns) or 'nothing'}): name the audio files in one"
        )
    if not lines:
        raise UserError(f"{path} lists no clips: below its header, give a line a clip")
    bare = next((number for number, cells in lines if not cells[found[0]]), None)
    if bare is not None:
        raise UserError(f"{path} line {bare}: no path")
    return [path.parent / cells[found[0]] for _, cells in lines]


def _index_files(
    files: list[Path], cache: Path | None, left_out: list[LeftOut], progress: bool
) -> tuple[FileIndex, list[str]]:
    """Returns the index of the readable ones of ``files`` and their names."""
    absolute = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(file) for file in absolute])
    keys = keys_of([os.path.relpath(file, common) for file in absolute])
    rows = [Row(path=file, key=key, labels=()) for file, key in zip(files, keys, strict=True)]
    index, others = index_files(rows, None, cache=cache, progress=progress)
    reasons = {entry.key: entry.reason for entry in others}
    names = []
    for row in rows:
        name = as_text(str(row.path))
        if row.key in reasons:
            left_out.append(LeftOut(name, 0.0, reasons[row.key]))
        else:
            names.append(name)
    return index, names


class Windows:
    """The windows of recordings of ``seconds`` (n,), numbered over all recordings.

    ``window``: seconds of each; None: a recording is one window. ``hop``: seconds from one to the
    next; None: ``window``. ``rest``: seconds at the end that are no window of their own.
    """

    def __init__(
        self,
        seconds: NDArray[np.float64],
        *,
        window: float | None,
        hop: float | None,
        rest: float,
    ) -> None:
        if window is None and hop is not None:
            raise UserError(f"hop={hop:g}: without windows there is none; give a window too")
        if window is not None and not 0 < window <= MAX_SECONDS:
            raise UserError(f"window={window:g}: seconds, more than 0")
        if hop is not None and window is not None and not 0 < hop <= window:
            raise UserError(f"hop={hop:g}: more than 0 and at most the window, {window:g} seconds")
        self.seconds, self.window = seconds, window
        self.hop = window if hop is None else hop
        counts = np.ones(len(seconds), np.int64)
        if self.window is not None and self.hop is not None:
            beyond = np.ceil((seconds - self.window - rest) / self.hop - 1e-9)
            counts += np.maximum(beyond, 0).astype(np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # (n + 1,)

    def __len__(self) -> int:
        return int(self.first[-1])

    def recording(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the recordings of windows ``rows``."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def times(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns start and end of windows ``rows`` in their recordings, seconds."""
        of = self.recording(rows)
        if self.window is None:
            return np.zeros(len(rows)), self.seconds[of]
        assert self.hop is not None
        start = (rows - self.first[of]) * self.hop
        return start, np.minimum(start + self.window, np.maximum(self.seconds[of], start))


class WindowReader(Dataset[WaveBatch]):
    """Dataset of windows; ``__getitems__(rows)`` decodes a batch at ``sample_rate``.

    A window that cannot be decoded is in ``skipped``, with its row as ``position``.
    """

    def __init__(self, recordings: Recordings, windows: Windows, *, sample_rate: int) -> None:
        self.recordings, self.windows, self.sample_rate = recordings, windows, sample_rate
        self._last: tuple[int, bytes] = (-1, b"")

    def __getitems__(self, rows: list[int]) -> WaveBatch:
        waves: list[NDArray[np.float32]] = []
        kept: list[int] = []
        skipped: list[Skipped] = []
        for row in rows:
            try:
                waves.append(self._wave(row))
                kept.append(row)
            except (DecodeError, OSError) as error:
                kind = error.kind if isinstance(error, DecodeError) else "unreadable"
                why = str(error) if isinstance(error, DecodeError) else error.strerror
                skipped.append(Skipped("", "", kind, f"{kind}: {why}", row))
        names = [self.recordings.name(i) for i in self._of(kept)]
        return stack(waves, names, kept, skipped)

    def __getitem__(self, row: int) -> WaveBatch:
        return self.__getitems__([row])

    def _of(self, rows: Sequence[int]) -> list[int]:
        return self.windows.recording(np.array(rows, np.int64)).tolist()

    def _wave(self, row: int) -> NDArray[np.float32]:
        (i,) = self._of([row])
        (start,), _ = self.windows.times(np.array([row], np.int64))
        index, j = self.recordings.place(i)
        several = self.windows.first[i + 1] - self.windows.first[i] > 1
        return decode(
            self._source(i, index, j, several),
            sample_rate=self.sample_rate,
            start_seconds=float(start),
            max_seconds=self.windows.window,
            max_file_seconds=MAX_SECONDS,
            expected_frames=int(index.frames[j]) if index.frames[j] > 0 else None,
            expected_rate=int(index.rate[j]) if index.rate[j] > 0 else None,
        )

    def _source(self, i: int, index: Index, j: int, several: bool) -> bytes | Path:
        """Returns the path of a long recording in a file of its own, the bytes of others."""
        if several and isinstance(index, FileIndex):
            return index.place(int(index.shard[j]))
        if self._last[0] != i:
            self._last = i, index.read(j).data
        data = self._last[1]
        if not several:
            self._last = -1, b""
        return data


def stack(
    waves: Sequence[NDArray[np.float32]],
    keys: list[str],
    positions: Sequence[int],
    skipped: list[Skipped],
) -> WaveBatch:
    """Returns the batch of ``waves`` (S_i,), zero-padded on the right."""
    lengths = [len(wave) for wave in waves]
    padded = np.zeros((len(waves), max(lengths, default=0)), np.float32)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = wave
    return WaveBatch(
        torch.from_numpy(padded),
        torch.tensor(lengths, dtype=torch.int64),
        torch.zeros(len(waves), 0),
        keys,
        torch.tensor(positions, dtype=torch.int64),
        skipped,
    )


def batches_of(seconds: NDArray[np.float64], batch: int) -> Iterator[list[int]]:
    """Yields batches of indices into ``seconds``, similar lengths together, the longest first.

    A batch has at most ``batch`` clips and ``batch x BATCH_SECONDS`` with padding, or one clip.
    """
    order = np.argsort(-seconds, kind="stable").tolist()
    while order:
        most = max(1, math.floor(batch * BATCH_SECONDS / max(float(seconds[order[0]]), 1e-3)))
        taken = min(batch, most)
        yield order[:taken]
        order = order[taken:]


class Batches(Sampler[list[int]]):
    """Yields the batches of several ranges of windows, one range after another."""

    def __init__(self, windows: Windows, ranges: Sequence[range], *, batch: int) -> None:
        self.windows, self.ranges, self.batch = windows, ranges, batch

    def of(self, rows: range) -> Iterator[list[int]]:
        """Yields the batches of one range."""
        start, end = self.windows.times(np.arange(rows.start, rows.stop))
        for found in batches_of(end - start, self.batch):
            yield [rows.start + i for i in found]

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.ranges:
            yield from self.of(rows)
