"""Reads audio files where they lie: the index of a folder or a CSV, without shards.

``index_files`` makes a ``FileIndex`` of a task's rows; order, exact resume, caches, bad clips and
metrics work as with shards. A row is a file, a part of one (``Row.seconds``), a member of an
uncompressed tar (``Row.span``) or a cell of a parquet file (``Row.cell``). Lengths and sample rates
are read once from the files' headers: they are kept in the cache folder by path, size and
modification time, with a checksum of a few kilobytes, which ``read`` compares and ``hash``
includes. Audio is decoded only when it is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bat.audio.decode import DecodeError, Source, decode_channels, probe
from bat.audio.encode import encode
from bat.audio.ffmpeg import READ, has_av
from bat.audio.part import FilePart
from bat.data.columns import Writer, gather
from bat.data.index import BY_SEEKING, Index
from bat.data.sources import Shard
from bat.data.table import CLIP, MAX_AUDIO_BYTES, ShardTable
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.io import write_atomic
from bat.redact import one_line
from bat.tasks import parquet
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, LeftOut, Row, as_text, no_decoder
from bat.types import Clip

THREADS = 8
"""Threads that read headers."""
MAX_SECONDS = 14 * 86_400.0
"""Longest recording; of a file whose header gives no length, at most this is decoded to count."""
SAMPLED_BYTES = 4096
"""Bytes at the start, the middle and the end of a file that its checksum covers."""
MAX_SPLITS = 127
MAX_FOLD = (1 << 15) - 1
PART = 1024
"""Number of files that are asked for at a time."""
PART_SLACK_SECONDS = 0.05
"""By so much a part of a file may end beyond the file: times are often rounded."""


class Header(NamedTuple):
    """Properties of a file that are known before it is decoded."""

    size: int
    frames: int
    rate: int
    checksum: int
    codec: str


def read_row(row: Row) -> bytes:
    """Reads the encoded file of ``row``: a file, a part of one, a member of a tar, or a cell of a
    parquet file.

    Raises:
        OSError: missing or unreadable.
        DecodeError: ``empty``; ``long`` (over ``MAX_AUDIO_BYTES``); ``truncated`` where the tar
            ends inside the member; ``corrupt`` where ``path`` is no regular file.
    """
    if row.cell is not None:
        return _read_cell(row.path, *row.cell)
    if row.place is not None:
        return _read_part(row.path, *row.place)
    return _read_parts(row.path, row.span)[0]


def _read_cell(path: Path, group: int, row: int) -> bytes:
    data = parquet.read_cell(path, group, row)
    if data is None:
        raise DecodeError("empty", "no bytes in this cell: the file is kept elsewhere")
    _check_size(len(data))
    return data


def _read_part(path: Path, start_seconds: float, seconds: float) -> bytes:
    """Reads ``seconds`` of a recording by seeking; returns them as a WAV file of 16 bits."""
    rate = probe(path, max_file_seconds=MAX_SECONDS).sample_rate
    wave = decode_channels(
        path,
        sample_rate=rate,
        start_seconds=start_seconds,
        max_seconds=seconds,
        max_file_seconds=MAX_SECONDS,
    )
    if len(wave) < (seconds - PART_SLACK_SECONDS) * rate:
        ends = start_seconds + len(wave) / rate
        text = f"the file ends at {ends:g} s, its part at {start_seconds + seconds:g} s"
        raise DecodeError("truncated", text)
    return encode(wave, sample_rate=rate, codec="wav")


def _read_parts(
    path: Path, span: tuple[int, int] | None, *, sampled: bool = False
) -> tuple[bytes, int]:
    """Reads the clip at ``span`` (offset, size) of a regular file, or the whole file; ``sampled``:
    only the bytes that the checksum covers. Returns them and the size of the clip."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block without it
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError("corrupt", "not a regular file")
        offset, size = span or (0, status.st_size)
        if not (sampled and size):
            _check_size(size)
        if sampled:
            parts = [os.pread(file, SAMPLED_BYTES, offset + at) for at in _samples(size)]
            return b"".join(parts), size
        data = os.pread(file, size, offset)
    finally:
        os.close(file)
    if len(data) != size:
        raise DecodeError("truncated", f"{path.name} ends inside the clip: it was cut")
    return data, size


def _check_size(size: int) -> None:
    if size == 0:
        raise DecodeError("empty", "the file is empty")
    if size > MAX_AUDIO_BYTES:
        raise DecodeError("long", f"the file is larger than {MAX_AUDIO_BYTES} bytes")


def _samples(size: int) -> tuple[int, int, int]:
    """Returns the offsets of the parts that the checksum of a file of ``size`` bytes covers."""
    return 0, size // 2, max(0, size - SAMPLED_BYTES)


def _checksum(data: bytes) -> int:
    return zlib.crc32(b"".join(data[at : at + SAMPLED_BYTES] for at in _samples(len(data))))


def reason_of(error: DecodeError | OSError, row: Row) -> str:
    """Returns the reason why ``row`` is left out: ``KIND: MESSAGE``."""
    if isinstance(error, OSError):
        return f"unreadable: {error.strerror}"
    if error.kind == "corrupt" and row.suffix in UNDECODED_SUFFIXES:
        if row.suffix in READ and not has_av():
            return f"{no_decoder(row.suffix)}, or pip install 'bat-audio[av]'"
        return f"{error.kind}: {error}" if row.suffix in READ else no_decoder(row.suffix)
    return f"{error.kind}: {error}"


class FileIndex(Index):
    """The ``Index`` of audio files that are read where they lie; made by ``index_files``.

    A ``shard`` is one file here, and ``shard_name`` is its path.
    """

    def __init__(
        self,
        files: Sequence[Path],
        shard: Sequence[int],
        table: ShardTable,
        *,
        vocabulary: Sequence[str] | None,
    ) -> None:
        """Make the index of n clips from ``table`` (``header`` holds checksums, ``offset`` the
        values of ``_offset_of``); ``shard`` (n): index into ``files`` of each clip's file."""
        folder, names_of_pairs = [Shard(files[0].parent)], None
        if vocabulary is not None:
            names_of_pairs = partial(_as_given, list(vocabulary))
        head, columns = gather(folder, [0], [table], vocabulary=names_of_pairs, writer=Writer())
        super().__init__(head, columns, shards=folder)
        names = [os.fsencode(file.absolute()) for file in files]
        self._path_bytes = np.frombuffer(b"".join(names), np.uint8)  # avoids one object per file
        self._path_ptr = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self.shard = np.array(shard, np.int32)
        self.shard_bytes = np.bincount(self.shard, self.size).astype(np.int64)
        self.parts: dict[int, tuple[float, float]] = {}
        """Start and length in seconds of the clips that are parts of their files."""

    def place(self, number: int) -> Path:
        """Returns the path of file ``number``."""
        begin, end = self._path_ptr[number : number + 2]
        return Path(os.fsdecode(self._path_bytes[begin:end].tobytes()))

    def shard_name(self, i: int) -> str:
        """Returns the path of the file that clip ``i`` lies in."""
        return as_text(str(self.place(int(self.shard[i]))))

    def take(self, rows: np.ndarray) -> None:
        super().take(rows)
        if self.parts:
            old = enumerate(rows.tolist())
            self.parts = {i: self.parts[row] for i, row in old if row in self.parts}

    @functools.cached_property
    def hash(self) -> str:
        """Hash over keys, lengths, labels, folds, splits and the files' checksums."""
        return hashlib.sha256(super().hash.encode() + self.header.tobytes()).hexdigest()

    def read(self, i: int) -> Clip:
        """Reads the encoded clip ``i``.

        Raises:
            OSError: the file cannot be read, or was changed since it was indexed.
            DecodeError: it is truncated, empty, or no longer a regular file.
        """
        path, offset, size = self.place(int(self.shard[i])), int(self.offset[i]), int(self.size[i])
        if i in self.parts:
            data = _read_part(path, *self.parts[i])
        elif offset < 0:
            data = _read_cell(path, *divmod(-1 - offset, 1 << 32))
        else:
            data, _ = _read_parts(path, (offset, size) if offset else None)
        if len(data) != size or _checksum(data) != self.header[i]:
            raise OSError(5, f"{path.name} was changed since it was indexed: start again")
        codec = AUDIO_SUFFIXES[self.codec[i]]
        return Clip(self.key(i), data, codec, self.labels(i), self.shard_name(i))

    def audio(self, i: int) -> Source:
        """Returns clip ``i`` as ``Index.audio``, also where it is a file of its own."""
        offset = int(self.offset[i])
        if self.starts is None or offset < 0 or i in self.parts or self.size[i] < BY_SEEKING:
            return self.read(i).data
        path, span = self.place(int(self.shard[i])), (offset, int(self.size[i]))
        sampled, size = _read_parts(path, span if offset else None, sampled=True)
        if size != self.size[i] or zlib.crc32(sampled) != self.header[i]:
            raise OSError(5, f"{path.name} was changed since it was indexed: start again")
        return FilePart(path, *span) if offset else path


def _as_given(vocabulary: list[str], pairs: set[tuple[str, int]]) -> list[str]:
    return vocabulary


def _offset_of(row: Row) -> int:
    """Returns the offset of the clip in its file: 0 for a whole file; negative for a cell."""
    if row.cell is not None:
        group, number = row.cell
        return -1 - (group << 32 | number)
    assert row.span is None or row.span[0] > 0, "a member of a tar has a header before it"
    return row.span[0] if row.span else 0


def index_files(
    rows: Sequence[Row],
    vocabulary: Sequence[str] | None,
    *,
    cache: Path | None = None,
    absent: Sequence[LeftOut] = (),
    progress: bool = False,
    windows: bool = False,
) -> tuple[FileIndex, list[LeftOut]]:
    """Returns the index of ``rows``, read where they lie.

    Args:
        rows: as ``Task.read`` returns them.
        vocabulary: class names in the order of their indices; None: the labels are dropped.
        cache: JSON file in which lengths, rates and checksums of the files are kept, with a list
            of what is left out; None, or where it cannot be written: headers are read at each call.
        absent: clips that the source lists and does not hold, added to that list.
        progress: show a bar while headers are read.
        windows: keep files that are too large to be read at once, since windows of them are read.

    Returns:
        The index, and the clips left out with their reasons: ``absent``, and files that are empty,
        not audio, too large or without a decoder.

    Raises:
        UserError: no file can be read; a fold or a number of splits that an index cannot hold.
    """
    kept: list[tuple[Row, Header]] = []
    left_out = [*absent]
    for row, said in zip(rows, _headers(rows, cache, absent, progress, windows), strict=True):
        if isinstance(said, Header):
            kept.append((row, said))
        else:
            left_out.append(LeftOut(row.key, row.name, said, row.split))
    if not kept:
        first = left_out[len(absent)]
        raise UserError(
            f"none of the {len(rows)} files can be read (the first: {first.file}, "
            f"{first.reason}): name other files, or convert them to WAV or FLAC"
        )
    numbers: dict[Path, int] = {}
    shard = [numbers.setdefault(row.path, len(numbers)) for row, _ in kept]
    table = _table(kept, list(vocabulary or ()))
    index = FileIndex(list(numbers), shard, table, vocabulary=vocabulary)
    index.parts = {i: row.place for i, (row, _) in enumerate(kept) if row.place is not None}
    if vocabulary is not None:
        clips = [row for row, _ in kept]
        index.events = {i: r.events for i, r in enumerate(clips) if r.events is not None}
        index.texts = {i: one_line(r.text) for i, r in enumerate(clips) if r.text is not None}
    return index, left_out


def _table(kept: Sequence[tuple[Row, Header]], vocabulary: list[str]) -> ShardTable:
    """Makes arrays of places, lengths, labels and keys."""
    numbers = {name: i for i, name in enumerate(vocabulary)}
    splits: dict[str, int] = {}
    labels: list[int] = []
    keys: dict[str, None] = {}
    clips = np.zeros(len(kept), CLIP)
    for i, (row, (size, frames, rate, checksum, codec)) in enumerate(kept):
        key = escape_key(row.key)
        if key in keys:
            key = escape_key(f"{row.key}#{i}")
        keys[key] = None
        fold = -1 if row.fold is None else row.fold
        if not -1 <= fold <= MAX_FOLD:
            raise UserError(f"{row.name}: fold {fold} is not within 0 and {MAX_FOLD}")
        split = -1 if row.split is None else splits.setdefault(one_line(row.split), len(splits))
        if split >= MAX_SPLITS:
            raise UserError(f"{row.name}: more than {MAX_SPLITS} splits: name fewer")
        mine = [numbers[label] for label in row.labels] if numbers else []
        labels += mine
        place = (_offset_of(row), size, frames, rate, AUDIO_SUFFIXES.index(codec))
        clips[i] = (*place, fold, split, len(mine), len(key), checksum)
    return ShardTable(
        tar_bytes=int(clips["size"].sum()),
        clips=clips,
        labels=np.array(labels, np.int32),
        keys=np.frombuffer("".join(keys).encode("ascii"), np.uint8),
        names=vocabulary,
        ids=list(range(len(vocabulary))),
        splits=list(splits),
    )


def _headers(
    rows: Sequence[Row],
    cache: Path | None,
    absent: Sequence[LeftOut],
    progress: bool,
    windows: bool,
) -> list[Header | str]:
    """Returns the header of each row, or the reason why it is left out; keeps them in ``cache``."""
    from tqdm import tqdm

    before: dict[str, Any] = {}
    if cache is not None:
        with suppress(OSError, ValueError):
            kept = json.loads(cache.read_bytes())
            before = kept if isinstance(kept, dict) else {}
    files = before.get("files")
    known = files if isinstance(files, dict) else {}
    names = [_name(row) for row in rows]
    entries: list[list[Any]] = []
    threads = 1 if any(row.cell is not None for row in rows) else THREADS  # cells are read in order
    with (
        tqdm(total=len(rows), desc="headers", leave=False, delay=1.0, disable=not progress) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for start in range(0, len(rows), PART):  # an interrupt waits for this many
            part = slice(start, start + PART)
            entries += pool.map(_entry, rows[part], [known.get(name, []) for name in names[part]])
            bar.update(len(rows[part]))
    found = [_said(entry, windows) for entry in entries]
    left_out = [{"key": e.key, "file": e.file, "reason": e.reason} for e in absent]
    left_out += [
        {"key": row.key, "file": row.name, "reason": said}
        for row, said in zip(rows, found, strict=True)
        if isinstance(said, str)
    ]
    now = {"left_out": left_out, "files": dict(zip(names, entries, strict=True))}
    if cache is not None and now != before:
        with suppress(OSError):  # without a cache the run is slower, but works
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cache, json.dumps(now).encode())
    return found


def _said(entry: list[Any], windows: bool) -> Header | str:
    """Returns the header in an ``_entry``, or the reason why the file is left out."""
    if len(entry) == 3:
        return str(entry[2])
    header = Header(*entry[2:])
    if header.size > MAX_AUDIO_BYTES and not windows:
        return f"long: the file is larger than {MAX_AUDIO_BYTES} bytes"
    return header


def _entry(row: Row, known: list[Any]) -> list[Any]:
    """Returns ``[modification time, bytes of the file, *Header]`` of a row, or a reason in place of
    the header; ``known``: what an earlier call returned."""
    stamp: list[Any] = []
    try:
        state = os.stat(row.path)
        stamp = [state.st_mtime_ns, state.st_size]
        undecoded = len(known) == 3 and row.suffix in READ  # PyAV may be there now
        if known[:2] == stamp and not undecoded:
            return known
        return [*stamp, *_header_of(row)]
    except DecodeError as error:
        return [*stamp, reason_of(error, row)]
    except OSError as error:
        return [0, -1, reason_of(error, row)]  # read again at the next start


def _name(row: Row) -> str:
    """Returns the name of the file of ``row`` in the cache."""
    place = row.span or row.cell or row.place
    return f"{os.path.abspath(row.path)}{f'|{place[0]},{place[1]}' if place else ''}"


def _header_of(row: Row) -> Header:
    """Reads the header of the file of ``row``; raises as ``read_row``."""
    if row.span is None and row.cell is None and row.place is None:
        sampled, size = _read_parts(row.path, None, sampled=True)
        info, checksum = probe(row.path, max_file_seconds=MAX_SECONDS), zlib.crc32(sampled)
    else:
        data = read_row(row)
        size = len(data)
        info, checksum = probe(data, max_file_seconds=MAX_SECONDS), _checksum(data)
    if not info.frames:
        raise DecodeError("empty", "no samples")
    codec = next((c for c in (info.codec, row.suffix) if c in AUDIO_SUFFIXES), "wav")
    return Header(size, info.frames, info.sample_rate, checksum, codec)
