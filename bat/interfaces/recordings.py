"""Lists the recordings in files, folders, CSVs and shards, and reads them window by window.

The order is that of the paths as given: a folder's files sorted, a CSV's lines and a shard's clips
as they stand; a file that is named again counts once. Lengths come from the files' headers, so the
windows of all recordings (``bat.data.windows``) are known before any audio is decoded.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from bat.audio.decode import DecodeError, decode
from bat.data.files import MAX_SECONDS, FileIndex, index_files
from bat.data.index import Index, open_index
from bat.data.sources import SUFFIXES, is_url
from bat.data.windows import Windows, fill_lengths
from bat.errors import UserError
from bat.eval.waveforms import waveforms
from bat.io import missing
from bat.tasks.base import AUDIO_SUFFIXES, Row, as_text
from bat.tasks.csv import ALSO_CALLED
from bat.tasks.folder import find_audio, keys_of
from bat.tasks.tables import numbered_lines
from bat.types import Skipped, WaveBatch

BATCH_SECONDS = 30.0
"""Seconds of audio, times clips of a batch, that a batch holds with its padding."""
WHOLE = "whole"


class LeftOut(NamedTuple):
    """A recording, or a window of one, without a result."""

    name: str
    start_seconds: float
    reason: str


class Recordings:
    """The n recordings of several indexes, one after another; made by ``list_recordings``.

    Attributes: ``names`` (n), paths as given, or shard and key; ``seconds`` (n,), 0 where a length
    cannot be read; ``left_out``: what is listed and cannot be read.
    """

    def __init__(
        self, indexes: Sequence[Index], names: list[str], left_out: Sequence[LeftOut]
    ) -> None:
        self.indexes, self.names, self.left_out = indexes, names, left_out
        self._first = np.cumsum([0, *map(len, indexes)])
        for index in indexes:
            fill_lengths(index)
        self.seconds = np.concatenate([index.seconds for index in indexes])

    def place(self, i: int) -> tuple[Index, int]:
        """Returns the index that holds recording ``i``, and its number there."""
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.indexes[number], i - int(self._first[number])

    def key(self, i: int) -> str:
        """Returns the key of recording ``i``, ASCII, without slashes."""
        index, j = self.place(i)
        return index.key(j)

    @property
    def hash(self) -> str:
        """Hash over names, lengths and checksums."""
        digest = hashlib.sha256("".join(index.hash for index in self.indexes).encode())
        for name in self.names:
            digest.update(f"{name}\0".encode(errors="backslashreplace"))
        return digest.hexdigest()


def list_recordings(
    paths: Sequence[str | Path], *, repeats: bool = False, progress: bool = False
) -> Recordings:
    """Returns the recordings at ``paths``: audio files, folders of audio, CSVs, shards.

    Args:
        paths: a folder is read recursively (one with tars and no audio: as shards); a CSV has a
            column ``path`` (or a synonym), relative to it; shards as ``bat.data.index.open_index``.
        repeats: a file that is named again counts again.
        progress: show a bar while headers are read.

    Raises:
        UserError: paths that do not exist or hold no audio (all of them), nothing readable.
    """
    groups: list[list[Path] | str] = []
    left_out: list[LeftOut] = []
    problems = [] if paths else ["no paths: name audio files, folders, CSVs or shards"]
    for given in paths:
        try:
            groups.append(_find(given, left_out))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    indexes: list[Index] = []
    names: list[str] = []
    seen: dict[str, Path] = {}
    for shards, several in itertools.groupby(groups, key=lambda group: isinstance(group, str)):
        if shards:
            for text in several:
                index = open_index(str(text), labels="drop")
                left_out += [LeftOut(name, 0.0, why) for name, why in index.left_out.items()]
                names += [f"{index.shard_name(j)}/{index.key(j)}" for j in range(len(index))]
                indexes.append(index)
            continue
        files = [Path(file) for group in several for file in group]
        if not repeats:
            files = [f for f in files if seen.setdefault(os.path.abspath(f), f) is f]
        if files:
            indexes.append(_index(files, names, left_out, progress))
    return Recordings(indexes, names, left_out)


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
    if is_url(given) and path.suffix[1:].lower() not in (*AUDIO_SUFFIXES, "csv"):  # a folder
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


def _index(
    files: list[Path], names: list[str], left_out: list[LeftOut], progress: bool
) -> FileIndex:
    """Returns the index of the readable ones of ``files``; adds to ``names`` and ``left_out``."""
    absolute = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(file) for file in absolute])
    keys = keys_of([os.path.relpath(file, common) for file in absolute])
    rows = [Row(path=file, key=key, labels=()) for file, key in zip(files, keys, strict=True)]
    index, others = index_files(rows, None, progress=progress)
    reasons = {entry.key: entry.reason for entry in others}
    for row in rows:
        name = as_text(str(row.path))
        if row.key in reasons:
            left_out.append(LeftOut(name, 0.0, reasons[row.key]))
        else:
            names.append(name)
    return index


def window_seconds(value: float | str | None, default: float | None) -> float | None:
    """Returns the seconds of a window: ``value``, ``default`` for None, and None for ``whole``."""
    try:
        return None if value == WHOLE else default if value is None else float(value)
    except ValueError:
        raise UserError(f"window={value}: seconds, or {WHOLE}") from None


def cut(
    seconds: NDArray[np.float64], *, window: float | None, hop: float | None, rest: float
) -> Windows:
    """Returns the windows of recordings of ``seconds`` (n,), None: whole ones; ``hop`` None: as
    long as the window."""
    if window is None and hop is not None:
        raise UserError(f"hop={hop:g}: without windows there is none; give a window too")
    if window is not None and not 0 < window <= MAX_SECONDS:
        raise UserError(f"window={window:g}: seconds, more than 0")
    if hop is not None and window is not None and not 0 < hop <= window:
        raise UserError(f"hop={hop:g}: more than 0 and at most the window, {window:g} seconds")
    return Windows(seconds, window, window if hop is None else hop, rest=rest)


class Reader(Dataset[WaveBatch]):
    """Dataset of the windows of recordings, or of waveforms (S_i,) at ``sample_rate``.

    ``__getitems__(rows)`` reads a batch. A window that cannot be decoded is in ``skipped``, with
    its row as ``position``.
    """

    def __init__(
        self,
        source: Recordings | list[NDArray[np.float32]],
        windows: Windows,
        *,
        sample_rate: int,
    ) -> None:
        self.source, self.windows, self.sample_rate = source, windows, sample_rate
        self._last: tuple[int, bytes] = (-1, b"")

    def __getitem__(self, row: int) -> WaveBatch:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> WaveBatch:
        numbers = np.array(rows, np.int64)
        start, end = (times.tolist() for times in self.windows.times(numbers))
        made: list[tuple[int, str, NDArray[np.float32]]] = []
        skipped: list[Skipped] = []
        for row, i, a, b in zip(
            rows, self.windows.recording(numbers).tolist(), start, end, strict=True
        ):
            if isinstance(self.source, list):
                first, last = (round(t * self.sample_rate) for t in (a, b))
                made.append((row, f"array {i}", self.source[i][first:last]))
                continue
            try:
                made.append((row, self.source.names[i], self._decode(i, a)))
            except (DecodeError, OSError) as error:
                kind = error.kind if isinstance(error, DecodeError) else "unreadable"
                why = str(error) if isinstance(error, DecodeError) else error.strerror
                skipped.append(Skipped("", "", kind, f"{kind}: {why}", row))
        waves = [torch.from_numpy(wave) for *_, wave in made]
        return WaveBatch(
            pad_sequence(waves, batch_first=True) if waves else torch.zeros(0, 0),
            torch.tensor([len(wave) for wave in waves], dtype=torch.int64),
            torch.zeros(len(made), 0),
            [name for _, name, _ in made],
            torch.tensor([row for row, *_ in made], dtype=torch.int64),
            skipped,
        )

    def _decode(self, i: int, start: float) -> NDArray[np.float32]:
        assert isinstance(self.source, Recordings)
        index, j = self.source.place(i)
        several = self.windows.counts[i] > 1
        data: bytes | Path
        if several and isinstance(index, FileIndex):  # read by seeking
            data = index.place(int(index.shard[j]))
        else:
            if self._last[0] != i:  # the windows of a recording in a shard share its bytes
                self._last = i, index.read(j).data
            data = self._last[1]
        window = float(self.windows.window[i])
        return decode(
            data,
            sample_rate=self.sample_rate,
            start_seconds=start,
            max_seconds=window if np.isfinite(window) else None,
            max_file_seconds=MAX_SECONDS,
            expected_frames=int(index.frames[j]) if index.frames[j] > 0 else None,
            expected_rate=int(index.rate[j]) if index.rate[j] > 0 else None,
        )


def batches_of(windows: Windows, rows: range, batch: int) -> Iterator[list[int]]:
    """Yields batches of windows ``rows``, similar lengths together, the longest first.

    A batch has at most ``batch`` clips and ``batch x BATCH_SECONDS`` with padding, or one clip.
    """
    start, end = windows.times(np.arange(rows.start, rows.stop))
    yield from by_length(end - start, batch, batch * BATCH_SECONDS, first=rows.start)


def by_length(
    seconds: NDArray[np.float64], batch: int, total: float, *, first: int = 0
) -> Iterator[list[int]]:
    """Yields batches of numbers from ``first`` on, the longest first: of ``batch`` clips at most
    that take ``total`` seconds with padding, or of one."""
    order = np.argsort(-seconds, kind="stable")
    while len(order):
        taken = max(1, min(batch, int(total // max(float(seconds[order[0]]), 1e-3))))
        yield (first + order[:taken]).tolist()
        order = order[taken:]


def compute_clips(
    compute: Any,
    clips: Any,
    *,
    sample_rate: int | None,
    window: float | str | None,
    hop: float | None,
    batch: int,
) -> tuple[Windows, dict[int, Any]]:
    """Returns the windows of paths or waveforms (``bat.eval.waveforms``), and what ``compute``
    (``bat.interfaces.parts.Compute``) gives for each. ``UserError`` if one is unreadable."""
    rate = compute.backbone.sample_rate
    given = [clips] if isinstance(clips, (str, Path)) else clips
    numbers = isinstance(given, np.ndarray) and given.dtype.kind not in "OU"
    if not (numbers or isinstance(given, Tensor)):
        given = list(given)
    source: Recordings | list[NDArray[np.float32]]
    if isinstance(given, list) and given and all(isinstance(c, (str, Path)) for c in given):
        source = list_recordings(given, repeats=True)
        if bad := source.left_out[:10]:
            raise UserError("; ".join(f"{one.name}: {one.reason}" for one in bad))
        seconds = source.seconds
    else:
        source = waveforms(given, sample_rate=sample_rate, to_rate=rate)
        seconds = np.array([len(wave) for wave in source]) / rate
    rest = compute.backbone.hop_seconds
    windows = cut(seconds, window=compute.window(window), hop=hop, rest=rest)
    reader = Reader(source, windows, sample_rate=rate)
    found: dict[int, Any] = {}
    for rows in batches_of(windows, range(len(windows)), batch):
        made = reader.__getitems__(rows)
        if made.skipped:
            (i,) = windows.recording(np.array([made.skipped[0].position])).tolist()
            raise UserError(f"{source.names[i]}: {made.skipped[0].why}")  # type: ignore[union-attr]
        found |= dict(zip(made.positions.tolist(), compute(made), strict=True))
    return windows, found
