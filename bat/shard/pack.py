"""Turns one row into the clips of a shard: checked by decoding, then kept, encoded, or cut.

A recording longer than ``clip_seconds`` becomes pieces ``KEY_00000``, ``KEY_00001``, ... It is read
by seeking, ``CHUNK_SECONDS`` at a time, each such chunk a ``Work`` of its own: a day of audio takes
the memory of a minute and is shared by all processes. Chunks are resampled whole and do not depend
on the process, so the bytes are the same for any number of processes. If a chunk does not decode,
its pieces are tried one by one: damage affects only the piece it is in. A recording whose bytes are
kept may have any length, one that is encoded whole an hour at most.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from bat.audio.decode import (
    RATES_HZ,
    AudioInfo,
    DecodeError,
    check_length,
    decode,
    decode_channels,
    probe,
)
from bat.audio.encode import OPUS_RATES_HZ, encode
from bat.data.files import MAX_SECONDS, read_row, reason_of
from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES, LeftOut, Row

Codec = Literal["keep", "flac", "opus", "wav", "ogg"]
Channels = Literal["mono", "keep"]

CHUNK_SECONDS = 60.0  # 23 MB of 48 kHz stereo float32
SLACK = 0.02  # a recording longer than clip_seconds by this share at most stays whole
MAX_DECODE_SECONDS = 3600.0


@dataclass(frozen=True)
class Recipe:
    """The conversion of each row; the fields are arguments of ``write_shards``.

    Raises:
        UserError: settings that no clip could satisfy.
    """

    codec: Codec = "keep"
    sample_rate: int | None = None
    channels: Channels | None = None
    clip_seconds: float | None = None
    min_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.codec not in get_args(Codec):
            raise UserError(f"codec {self.codec!r}: one of {', '.join(get_args(Codec))}")
        if self.channels not in (None, *get_args(Channels)):
            raise UserError(f"channels {self.channels!r}: mono or keep")
        rate, low, high = self.sample_rate, *RATES_HZ
        if rate is not None and not low <= rate <= high:
            raise UserError(f"sample_rate={rate}: in Hz, {low} to {high}")
        if self.codec == "opus" and rate is not None and rate not in OPUS_RATES_HZ:
            raise UserError(f"Opus has no {rate} Hz: one of {', '.join(map(str, OPUS_RATES_HZ))}")
        clip, least = self.clip_seconds, self.min_seconds
        if clip is not None and not 0.01 <= clip < math.inf:
            raise UserError(f"clip_seconds={clip}: 0.01 or more")
        if least is not None and not 0 <= least <= (clip or 1e9):
            raise UserError(f"min_seconds={least}: 0 to {clip or 1e9:g} (clip_seconds)")

    @property
    def shortest_rest(self) -> float:
        """Shortest duration of the last piece of a recording, in seconds."""
        assert self.clip_seconds is not None
        return self.clip_seconds / 2 if self.min_seconds is None else self.min_seconds

    @property
    def longest_read(self) -> float:
        """Greatest duration that is decoded at once, in seconds."""
        return max(MAX_DECODE_SECONDS, (self.clip_seconds or 0.0) * (1 + SLACK) + 1)


@dataclass(frozen=True)
class Work:
    """A row, or the pieces ``first .. stop - 1`` of a long one, packed by one call."""

    row: Row
    info: AudioInfo | None = None
    """Properties of the recording that is cut; None: the row is not cut."""
    first: int = 0
    stop: int = 1
    count: int = 1
    """Number of pieces of the recording."""


class Packed(NamedTuple):
    """A clip as it goes into the shard."""

    id: str
    suffix: str
    data: bytes
    frames: int
    rate: int
    start_seconds: float


def works_of(row: Row, recipe: Recipe) -> Iterator[Work]:
    """Yields the works of ``row``: one, or the chunks of a recording that is to be cut."""
    info, seconds = None, recipe.clip_seconds
    if seconds is not None:
        with suppress(DecodeError, OSError):  # packing it gives the same error
            info = probed(row)
    if info is None or seconds is None or info.frames <= seconds * info.sample_rate * (1 + SLACK):
        yield Work(row)
        return
    count = math.ceil(info.frames / (seconds * info.sample_rate) - 1e-9)
    step = max(1, int(CHUNK_SECONDS / seconds))
    for first in range(0, count, step):
        yield Work(row, info, first, min(first + step, count), count)


def probed(recording: Row | bytes) -> AudioInfo:
    """Returns the properties of a recording; ``DecodeError`` ("long") beyond ``MAX_SECONDS``."""
    file = recording if isinstance(recording, bytes) else _file_of(recording)
    info = probe(file, max_file_seconds=MAX_SECONDS)
    check_length(info.frames, info.sample_rate, MAX_SECONDS)
    return info


def pack(work: Work, *, recipe: Recipe) -> list[Packed | LeftOut]:
    """Returns the clips of ``work``, in order, and the clips left out of it.

    Bytes are kept as they are where rate, codec and channels agree (``codec="keep"``: any codec;
    ``channels=None``: any number); otherwise the clip is encoded, under ``keep`` as FLAC.

    Raises:
        UserError: Opus is requested for a rate that it lacks.
    """
    if work.info is not None:
        return list(_pieces(work, work.info, recipe))
    try:
        return [_whole(work.row, recipe)]
    except (DecodeError, OSError) as error:
        return [LeftOut(work.row.key, work.row.name, reason_of(error, work.row))]


def _whole(row: Row, recipe: Recipe) -> Packed | LeftOut:
    data = read_row(row)
    info = probed(data)
    rate = recipe.sample_rate or info.sample_rate
    suffix = info.codec if info.codec in AUDIO_SUFFIXES else row.suffix
    same_codec = recipe.codec in ("keep", info.codec) and suffix in AUDIO_SUFFIXES
    stays = (None, "keep") if recipe.codec == "keep" else ("keep",)
    same_channels = info.channels == 1 or recipe.channels in stays
    is_kept = rate == info.sample_rate and same_codec and same_channels
    seconds, bound = info.frames / info.sample_rate, recipe.longest_read
    if seconds > bound and not is_kept:
        why = f"{seconds:.6g} s, and {bound:g} are encoded in one piece: give --clip-seconds"
        raise DecodeError("long", why)
    read = functools.partial(
        decode_channels if recipe.channels == "keep" else decode,
        sample_rate=rate,
        expected_frames=info.frames,
        min_seconds=recipe.min_seconds or 0.0,
        max_decode_seconds=bound,
        max_file_seconds=math.inf,
    )
    (wave,) = deque(decoded(data, info, bound, read), maxlen=1)  # one part if it is not kept
    if is_kept:
        return Packed(row.key, suffix, data, info.frames, rate, row.start_seconds)
    return _encoded(wave, row, row.key, rate, row.start_seconds, recipe)


def decoded(
    data: bytes, info: AudioInfo, part_seconds: float, read: Callable[..., np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields a whole file as ``read`` (``decode`` with its settings) decodes it, part by part.

    Raises:
        DecodeError: any part of it does not decode.
    """
    parts = max(1, math.ceil(info.frames / info.sample_rate / part_seconds))
    for part in range(parts):
        most = part_seconds if parts > 1 else None
        try:
            yield read(data, start_seconds=part * part_seconds, max_seconds=most)
        except DecodeError as error:
            if error.kind != "empty" or not part:  # an MP3 ends within the slack of its header
                raise


def _pieces(work: Work, info: AudioInfo, recipe: Recipe) -> Iterator[Packed | LeftOut]:
    row, first, stop, seconds = work.row, work.first, work.stop, recipe.clip_seconds
    assert seconds is not None
    rate = recipe.sample_rate or info.sample_rate
    rest = info.frames / info.sample_rate - (stop - 1) * seconds  # seconds of the last piece
    is_brief = rest < recipe.shortest_rest - 1e-9
    whole = stop - 1 if is_brief else stop

    def read(begin: int, end: int) -> np.ndarray:
        return (decode_channels if recipe.channels == "keep" else decode)(
            _file_of(row),
            sample_rate=rate,
            start_seconds=begin * seconds,
            max_seconds=(end - begin) * seconds,
            expected_frames=info.frames,
            max_decode_seconds=recipe.longest_read,
            max_file_seconds=math.inf,
        )

    chunk = None
    if whole > first:
        with suppress(DecodeError, OSError):  # then piece by piece, below
            chunk = read(first, whole)
    for k in range(first, whole):
        key = f"{row.key}_{k:05d}"
        try:
            if chunk is None:
                wave = read(k, k + 1)
            else:
                begin, end = (round((i - first) * seconds * rate) for i in (k, k + 1))
                wave = chunk[begin:end]
            start_seconds = round(row.start_seconds + k * seconds, 6)
            yield _encoded(wave, row, key, rate, start_seconds, recipe)
        except (DecodeError, OSError) as error:
            yield LeftOut(key, row.name, reason_of(error, row))
    if is_brief:
        why = f"brief: the last {rest:.3g} s of the recording, less than {recipe.shortest_rest:g}"
        yield LeftOut(f"{row.key}_{stop - 1:05d}", row.name, why)


def _encoded(
    wave: np.ndarray, row: Row, key: str, rate: int, start_seconds: float, recipe: Recipe
) -> Packed | LeftOut:
    codec = "flac" if recipe.codec == "keep" else recipe.codec
    try:
        data = encode(wave, sample_rate=rate, codec=codec)
    except UserError as error:
        if codec == "opus" and rate not in OPUS_RATES_HZ:
            raise UserError(f"{row.name}: {error} (sample_rate=48000)") from error
        return LeftOut(key, row.name, f"unencodable: {error}")
    info = probe(data)
    return Packed(key, codec, data, info.frames, info.sample_rate, start_seconds)


def _file_of(row: Row) -> Path | bytes:
    """Returns the path of a row that can be read by seeking, else its bytes."""
    if row.span is None and row.cell is None and row.place is None and row.path.is_file():
        return row.path
    return _held(row)


@functools.lru_cache(maxsize=1)  # the chunks of a row are adjacent
def _held(row: Row) -> bytes:
    return read_row(row)
