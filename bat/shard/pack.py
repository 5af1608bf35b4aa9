"""Turns one row into the clips of a shard: checked by decoding, then kept, encoded, or cut.

A recording longer than ``clip_seconds`` becomes pieces ``KEY_00000``, ``KEY_00001``, ... It is read
by seeking, ``CHUNK_SECONDS`` at a time, each such chunk a ``Work`` of its own: a day of audio takes
the memory of a minute and is shared by all processes. Chunks are resampled whole and do not depend
on the process, so the bytes are the same for any number of processes. If a chunk does not decode,
its pieces are tried one by one: damage affects only the piece it is in. If nothing of the rest
decodes (truncated; a header that claims too much), the rest is left out as one entry. A recording
whose bytes are kept may have any length, one that is encoded whole an hour at most.
"""

from __future__ import annotations

import functools
import math
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bat.audio.decode import (
    AudioInfo,
    DecodeError,
    decode,
    decode_channels,
    encode,
    probe,
)
from bat.audio.encode import OPUS_RATES_HZ
from bat.data.files import MAX_SECONDS, check_claim, read_row, reason_of
from bat.errors import UserError
from bat.shard.settings import Channels as Channels
from bat.shard.settings import Codec as Codec
from bat.shard.settings import Recipe as Recipe
from bat.tasks.base import AUDIO_SUFFIXES, LeftOut, Row

CHUNK_SECONDS = 60.0  # 23 MB of 48 kHz stereo float32
SLACK = 0.02  # a recording longer than clip_seconds by this share at most stays whole
MAX_DECODE_SECONDS = 3600.0
LOOKS = 16  # places of the rest that are tried before it is left out


@dataclass(frozen=True)
class Work:
    """A row, or the pieces ``first .. stop - 1`` of a long one, prepared by one call."""

    row: Row
    info: AudioInfo | None = None
    """Properties of the recording that is cut; None: the row is not cut."""
    first: int = 0
    stop: int = 1
    count: int = 1
    """Number of pieces of the recording."""

    @property
    def share(self) -> float:
        """Fraction of the row that this work covers."""
        return (self.stop - self.first) / self.count


class Packed(NamedTuple):
    """A clip as it goes into the shard."""

    id: str
    suffix: str
    data: bytes
    frames: int
    rate: int
    start_seconds: float


class Outcome(NamedTuple):
    """The result of a work."""

    clips: list[Packed | LeftOut]
    """Clips and clips left out, in order."""
    ended: bool = False
    """True if the last entry stands for all the rest of the row: its further works give nothing."""


def works_of(row: Row, recipe: Recipe) -> Iterator[Work]:
    """Yields the works of ``row``: one, or the chunks of a recording that is to be cut."""
    seconds = recipe.clip_seconds
    if seconds is None:
        yield Work(row)
        return
    try:
        file = row.path if _is_file(row) else _held(row)
        info = probe(file, max_file_seconds=MAX_SECONDS)
        check_claim(info, len(file) if isinstance(file, bytes) else file.stat().st_size)
    except (DecodeError, OSError):
        yield Work(row)  # preparing it gives the same error
        return
    clip_frames = seconds * info.sample_rate
    if info.frames <= clip_frames * (1 + SLACK):
        yield Work(row)
        return
    count = math.ceil(info.frames / clip_frames - 1e-9)
    step = max(1, int(CHUNK_SECONDS / seconds))
    for first in range(0, count, step):
        stop = min(first + step, count)
        yield Work(row, info, first, stop, count)


def pack(work: Work, *, recipe: Recipe) -> Outcome:
    """Returns the clips of ``work``, in order, and the clips left out of it.

    Bytes are kept as they are where rate, codec and channels agree (``codec="keep"``: any codec;
    ``channels=None``: any number); otherwise the clip is encoded, under ``keep`` as FLAC.

    Raises:
        UserError: Opus is requested for a rate that it lacks.
    """
    row = work.row
    if work.info is not None:
        clips = list(_pieces(work, work.info, recipe))
        return _without_rest(clips, work, work.info, recipe.clip_seconds or 0.0)
    try:
        return Outcome([_whole(row, recipe)])
    except (DecodeError, OSError) as error:
        return Outcome([LeftOut(row.key, row.name, reason_of(error, row))])


def _whole(row: Row, recipe: Recipe) -> Packed | LeftOut:
    data = read_row(row)
    info = probe(data, max_file_seconds=MAX_SECONDS)
    check_claim(info, len(data))
    rate = recipe.sample_rate or info.sample_rate
    suffix = info.codec if info.codec in AUDIO_SUFFIXES else row.suffix
    same_codec = recipe.codec in ("keep", info.codec) and suffix in AUDIO_SUFFIXES
    stays = (None, "keep") if recipe.codec == "keep" else ("keep",)
    same_channels = info.channels == 1 or recipe.channels in stays
    stays_whole = rate == info.sample_rate and same_codec and same_channels
    seconds, bound = info.frames / info.sample_rate, _bound(recipe)
    if seconds > bound and not stays_whole:
        why = f"{seconds:.6g} s, and {bound:g} are encoded in one piece: give --clip-seconds"
        raise DecodeError("long", why)
    read = decode_channels if recipe.channels == "keep" else decode
    parts = max(1, math.ceil(seconds / bound))
    for part in range(parts):
        try:
            wave = read(
                data,
                sample_rate=rate,
                start_seconds=part * bound,
                max_seconds=bound if parts > 1 else None,
                expected_frames=info.frames,
                min_seconds=recipe.min_seconds or 0.0,
                max_decode_seconds=bound,
                max_file_seconds=math.inf,
            )
        except DecodeError as error:
            if error.kind != "empty" or not part:  # an MP3 ends within the slack of its header
                raise
    if stays_whole:
        return Packed(row.key, suffix, data, info.frames, rate, row.start_seconds)
    return _encoded(wave, row, row.key, rate, row.start_seconds, recipe)


def _pieces(work: Work, info: AudioInfo, recipe: Recipe) -> Iterator[Packed | LeftOut]:
    row, first, stop = work.row, work.first, work.stop
    seconds = recipe.clip_seconds
    assert seconds is not None
    rate = recipe.sample_rate or info.sample_rate
    rest = info.frames / info.sample_rate - (stop - 1) * seconds  # seconds of the last piece
    brief = rest < recipe.shortest_rest - 1e-9
    whole = stop - 1 if brief else stop

    def read(begin: int, end: int) -> np.ndarray:
        get = decode_channels if recipe.channels == "keep" else decode
        return get(
            row.path if _is_file(row) else _held(row),
            sample_rate=rate,
            start_seconds=begin * seconds,
            max_seconds=(end - begin) * seconds,
            expected_frames=info.frames,
            max_decode_seconds=_bound(recipe),
            max_file_seconds=math.inf,
        )

    wave = None
    if whole > first:
        with suppress(DecodeError, OSError):  # then piece by piece, below
            wave = read(first, whole)
    for k in range(first, whole):
        key = f"{row.key}_{k:05d}"
        start_seconds = round(row.start_seconds + k * seconds, 6)
        try:
            if wave is None:
                piece = read(k, k + 1)
            else:
                begin, end = (round((i - first) * seconds * rate) for i in (k, k + 1))
                piece = wave[begin:end]
            yield _encoded(piece, row, key, rate, start_seconds, recipe)
        except (DecodeError, OSError) as error:
            yield LeftOut(key, row.name, reason_of(error, row))
    if brief:
        why = f"brief: the last {rest:.3g} s of the recording, less than {recipe.shortest_rest:g}"
        yield LeftOut(f"{row.key}_{stop - 1:05d}", row.name, why)


def _without_rest(
    clips: list[Packed | LeftOut], work: Work, info: AudioInfo, clip_seconds: float
) -> Outcome:
    """Replaces the last of ``clips`` by one entry if they and all after them do not decode."""
    good = max((i + 1 for i, clip in enumerate(clips) if isinstance(clip, Packed)), default=0)
    if good == len(clips) or work.stop == work.count:
        return Outcome(clips)
    seconds = info.frames / info.sample_rate
    last = (info.frames - 1) / info.sample_rate
    for start_seconds in np.linspace(last, work.stop * clip_seconds, LOOKS).tolist():
        with suppress(DecodeError, OSError):
            decode(
                work.row.path if _is_file(work.row) else _held(work.row),
                sample_rate=info.sample_rate,
                start_seconds=start_seconds,
                max_seconds=1 / info.sample_rate,
                max_file_seconds=math.inf,
            )
            return Outcome(clips)
    lost = clips[good]
    assert isinstance(lost, LeftOut)
    begin = (work.first + good) * clip_seconds
    why = f"{lost.reason}; nor does anything else from {begin:.6g} s to its end at {seconds:.6g} s"
    return Outcome([*clips[:good], lost._replace(reason=why)], ended=True)


def _encoded(
    wave: np.ndarray, row: Row, key: str, rate: int, start_seconds: float, recipe: Recipe
) -> Packed | LeftOut:
    codec: Literal["flac", "opus", "wav", "ogg"] = (
        "flac" if recipe.codec == "keep" else recipe.codec
    )
    try:
        data = encode(wave, sample_rate=rate, codec=codec)
    except UserError as error:
        if codec == "opus" and rate not in OPUS_RATES_HZ:
            raise UserError(f"{row.name}: {error} (sample_rate=48000)") from error
        return LeftOut(key, row.name, f"unencodable: {error}")
    info = probe(data)
    return Packed(key, codec, data, info.frames, info.sample_rate, start_seconds)


def _bound(recipe: Recipe) -> float:
    """Returns the greatest duration of one decoding, in seconds."""
    return max(MAX_DECODE_SECONDS, (recipe.clip_seconds or 0.0) * (1 + SLACK) + 1)


def _is_file(row: Row) -> bool:
    """Return True if ``row`` can be read from its path, by seeking."""
    if row.span is not None or row.cell is not None:
        return False
    return stat.S_ISREG(row.path.stat().st_mode)


@functools.lru_cache(maxsize=1)  # the chunks of a row are adjacent
def _held(row: Row) -> bytes:
    return read_row(row)
