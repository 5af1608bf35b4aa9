"""Decodes encoded audio to float32 at the requested rate (encoding: ``encode.py``).

Only the requested segment is read, by seeking, mixed to mono and resampled by soxr HQ (44.1k to
16k: 90 dB of stop band). ``reader.py`` opens files and detects damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from bat.audio.encode import encode as encode
from bat.audio.reader import (
    MAX_FILE_SECONDS as MAX_FILE_SECONDS,
)
from bat.audio.reader import (
    MP3_SLACK_FRAMES as MP3_SLACK_FRAMES,
)
from bat.audio.reader import (
    RATES_HZ,
    UNKNOWN_FRAMES,
    Reader,
    apart,
    blocks,
    check_length,
    check_samples,
    frames_within,
    mixed,
    open_reader,
    read_segment,
    reason,
    samples_of,
    untold_seconds,
)
from bat.audio.reader import (
    DecodeError as DecodeError,
)
from bat.errors import UserError


@dataclass(frozen=True)
class AudioInfo:
    """Properties of a file from its header."""

    frames: int
    """Samples per channel at ``sample_rate``; counted by decoding where the header has none."""
    sample_rate: int
    """Sample rate of the file, Hz."""
    channels: int
    codec: str
    """``wav``, ``flac``, ``ogg`` (Vorbis), ``opus``, ``mp3``, ``aiff``, ..."""


def decode(
    data: bytes | Path,
    *,
    sample_rate: int,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_decode_seconds: float = 3600.0,
    max_file_seconds: float = MAX_FILE_SECONDS,
    expected_frames: int | None = None,
    expected_rate: int | None = None,
    min_seconds: float = 0.0,
) -> np.ndarray:
    """Decodes a clip, or a segment of it, to mono float32.

    Args:
        data: the whole file as it lies in the shard, or its path.
        sample_rate: Hz of the result. Channels are mixed with equal weights, then resampled; a
            segment is resampled alone: its first and last millisecond differ from the whole clip's.
        start_seconds: start of the segment, to the nearest source frame.
        max_seconds: greatest length of the segment; None: to the end.
        max_decode_seconds: bound on what one call decodes; a file with more to read is refused.
        max_file_seconds: longest file, for any segment: checked by its header before anything is
            decoded; if that gives no length, no more than this is read. ``inf``: no bound.
        expected_frames: source frames (``probe(...).frames``) that the index recorded.
        expected_rate: Hz of the source that the index recorded.
        min_seconds: shortest usable clip (the whole of it, not the segment).

    Returns:
        (S,) float32, contiguous, finite, ``1 <= S <= ceil(max_seconds * sample_rate)``.

    Raises:
        DecodeError: see there.
        OSError: ``data`` is a path that cannot be opened.
        UserError: arguments that no file could satisfy.
    """
    _check_arguments(sample_rate, start_seconds, max_seconds, max_decode_seconds)
    _check_bound(max_file_seconds)
    with open_reader(data) as file:
        rate, subtype = file.samplerate, file.subtype
        expected = (expected_frames, expected_rate, min_seconds, max_file_seconds)
        wave = read_segment(file, start_seconds, max_seconds, max_decode_seconds, expected, mixed)
    return _finish(wave, rate, sample_rate, max_seconds, subtype)


def decode_into(
    row: np.ndarray,
    data: bytes | Path,
    *,
    sample_rate: int,
    place: Callable[[int], tuple[int, int]],
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_decode_seconds: float = 3600.0,
    max_file_seconds: float = MAX_FILE_SECONDS,
    expected_frames: int | None = None,
    expected_rate: int | None = None,
    min_seconds: float = 0.0,
) -> tuple[int, int]:
    """Decodes as ``decode`` into ``row`` (S,) float32, shifted circularly within its place.

    A mono file at ``sample_rate`` is decoded straight into the row: no wave is copied.

    Args:
        place: maps the samples n of the wave (at most S) to (offset, roll): its start in the row,
            ``0 .. S - n``, and the samples by which it is shifted, ``0 .. n - 1``. Called once.

    Returns:
        (offset, n). The row outside ``[offset, offset + n)`` is not changed; after an error its
        content is undefined.
    """
    _check_arguments(sample_rate, start_seconds, max_seconds, max_decode_seconds)
    _check_bound(max_file_seconds)
    placed: list[int] = []

    def into_row(file: Reader, start: int, frames: int) -> np.ndarray:
        direct = file.channels == 1 and file.samplerate == sample_rate and file.format != "MP3"
        if not direct or file.frames >= UNKNOWN_FRAMES or not 0 < frames <= len(row):
            return mixed(file, start, frames)
        offset, roll = place(frames)
        placed.append(offset)
        wave = row[offset : offset + frames]
        try:
            if start:
                file.seek(start)
            read = len(file.read(frames - roll, out=wave[roll:]))
            if roll and read == frames - roll:
                read += len(file.read(roll, out=wave[:roll]))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise DecodeError("corrupt", f"damaged audio: {reason(error)}") from error
        return wave[:read]

    with open_reader(data) as file:
        rate, subtype = file.samplerate, file.subtype
        expected = (expected_frames, expected_rate, min_seconds, max_file_seconds)
        wave = read_segment(
            file, start_seconds, max_seconds, max_decode_seconds, expected, into_row
        )
    if placed:
        check_samples(wave, subtype)
        return placed[0], len(wave)
    wave = _finish(wave, rate, sample_rate, max_seconds, subtype)[: len(row)]
    offset, roll = place(len(wave))
    write_rolled(row[offset:], wave, roll)
    return offset, len(wave)


def write_rolled(row: np.ndarray, wave: np.ndarray, roll: int) -> None:
    """Computes ``row[:n] = np.roll(wave, roll)`` for a ``wave`` (n,), without a copy between."""
    n = len(wave)
    row[roll:n] = wave[: n - roll]
    row[:roll] = wave[n - roll :]


def decode_channels(
    data: bytes | Path,
    *,
    sample_rate: int,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_decode_seconds: float = 3600.0,
    max_file_seconds: float = MAX_FILE_SECONDS,
    expected_frames: int | None = None,
    expected_rate: int | None = None,
    min_seconds: float = 0.0,
) -> np.ndarray:
    """Decodes as ``decode``, with channels kept: (S, channels) float32."""
    _check_arguments(sample_rate, start_seconds, max_seconds, max_decode_seconds)
    _check_bound(max_file_seconds)
    with open_reader(data) as file:
        rate, subtype = file.samplerate, file.subtype
        expected = (expected_frames, expected_rate, min_seconds, max_file_seconds)
        wave = read_segment(file, start_seconds, max_seconds, max_decode_seconds, expected, apart)
    return _finish(wave, rate, sample_rate, max_seconds, subtype)


def probe(data: bytes | Path, *, max_file_seconds: float = MAX_FILE_SECONDS) -> AudioInfo:
    """Returns length, rate, channels and codec of a file (its bytes or its path), from its header.

    Args:
        max_file_seconds: if the header gives no length, at most this much is decoded to count it.
            A length that the header gives is returned, however long.

    Raises:
        DecodeError: ``corrupt`` where the file is not audio; ``long`` beyond ``max_file_seconds``.
        OSError: ``data`` is a path that cannot be opened.
        UserError: a bound that is not positive.
    """
    _check_bound(max_file_seconds)
    with open_reader(data) as file:
        frames = file.frames
        if frames >= UNKNOWN_FRAMES:
            max_file_seconds, note = untold_seconds(file, max_file_seconds)
            most = frames_within(max_file_seconds, file.samplerate)
            frames = sum(len(block) for block in blocks(file, 0, most + 1))
            check_length(frames, file.samplerate, max_file_seconds, note)
        codec = {"WAVEX": "wav", "RF64": "wav"}.get(file.format, file.format.lower())
        if file.subtype == "OPUS":
            codec = "opus"
        return AudioInfo(frames, file.samplerate, file.channels, codec)


def _finish(
    wave: np.ndarray, rate: int, sample_rate: int, max_seconds: float | None, subtype: str
) -> np.ndarray:
    """Checks and resamples ``wave``, and limits it to the requested number of samples."""
    check_samples(wave, subtype)
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate, quality="HQ")
        if not len(wave):
            raise DecodeError("empty", f"too short to resample from {rate} to {sample_rate} Hz")
    if max_seconds is not None:
        wave = wave[: samples_of(max_seconds, sample_rate)]
    return np.ascontiguousarray(wave, dtype=np.float32)


def _check_bound(max_file_seconds: float) -> None:
    if not max_file_seconds > 0:
        raise UserError(f"max_file_seconds={max_file_seconds}: more than zero")


def _check_arguments(
    sample_rate: int, start_seconds: float, max_seconds: float | None, max_decode_seconds: float
) -> None:
    if not RATES_HZ[0] <= sample_rate <= RATES_HZ[1]:
        raise UserError(f"sample_rate={sample_rate}: in Hz, within {RATES_HZ}")
    if not 0 <= start_seconds < math.inf:
        raise UserError(f"start_seconds={start_seconds}: zero or more")
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise UserError(f"max_seconds={max_seconds}: more than zero, or None for the whole clip")
    if not 0 < max_decode_seconds < math.inf:
        raise UserError(f"max_decode_seconds={max_decode_seconds}: more than zero")
