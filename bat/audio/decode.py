"""Decodes audio files to float32 at the requested rate, or raises ``DecodeError``.

libsndfile (soundfile) reads WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF and more, from memory or a path;
what it does not know (m4a, aac, wma) is read through PyAV if installed (``bat.audio.ffmpeg``).
Only the requested segment is read, by seeking and in blocks, so the memory for a clip depends on
its actual content and never on its header's claims; channels are mixed and soxr resamples (HQ;
44.1k to 16k: 90 dB of stop band). A file longer than ``max_file_seconds`` is refused by its header;
one without a length is read no further.

Damaged files: a truncated OGG, MP3, Opus or WAV is read short by libsndfile **without an error**,
and for all but MP3 the reported length shrinks with the file. So the header is compared with the
file (``bat.audio.truncated``) or with ``expected_frames``, the length that an index recorded when
the clip was whole, and the frames that were read with the header.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Required, TypedDict, Unpack

import numpy as np
import soundfile
import soxr

from bat.audio.encode import encode as encode
from bat.audio.ffmpeg import SLACK_FRAMES, AvFile, open_av
from bat.audio.part import FilePart
from bat.audio.truncated import missing_end
from bat.errors import UserError

Source = bytes | Path | FilePart
"""A file's bytes, its path, or its place in a file that holds others."""
Kind = Literal["corrupt", "empty", "truncated", "mismatch", "long", "nan", "range", "rate", "brief"]

BLOCK_SAMPLES = 2**22  # samples (all channels) read at once: 16 MiB
UNKNOWN_FRAMES = 2**62  # libsndfile answers 2^63 - 1 where a header gives no length
MP3_SLACK_FRAMES = 3 * 1152  # encoder delay and padding: decoders count them differently
MAX_FILE_SECONDS = 3600.0  # a longer file is not a clip: see docs/security.md
NO_LENGTH_HZ = 2 * 192_000  # samples a second (all channels) read of a file without a length
RATES_HZ = (1_000, 768_000)
PEAK = 1e6  # samples beyond this are no audio, and their power would overflow float32


class DecodeError(ValueError):
    """A clip that cannot be used; ``kind`` gives the reason in one word, for counting.

    ``corrupt`` unreadable; ``empty`` no samples (at the requested position); ``truncated`` fewer
    bytes or frames than the header or the index states; ``mismatch`` more frames than the index
    recorded; ``long`` beyond ``max_file_seconds`` or ``max_decode_seconds``; ``nan`` samples that
    are not finite; ``range`` beyond 1e6; ``rate`` another sample rate than the index recorded;
    ``brief`` whole, but shorter than requested.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # pickled intact from loader workers


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


class Segment(TypedDict, total=False):
    """Keywords of ``decode``: what is read of a file, and the checks on it."""

    sample_rate: Required[int]
    """Hz of the result. A segment is resampled alone: its first and last millisecond differ from
    the whole clip's."""
    start_seconds: float
    """Start of the segment, to the nearest source frame; 0 if omitted."""
    max_seconds: float | None
    """Greatest length of the segment; None: to the end."""
    max_decode_seconds: float
    """Bound on what one call decodes (3600); a file with more to read is refused."""
    max_file_seconds: float
    """Longest file, for any segment (3600; ``inf``: no bound): checked by its header before
    anything is decoded; if that gives no length, no more than this is read."""
    expected_frames: int | None
    """Source frames (``probe(...).frames``) that the index recorded."""
    expected_rate: int | None
    """Hz of the source that the index recorded."""
    min_seconds: float
    """Shortest usable clip (the whole of it, not the segment)."""


def decode(data: Source, **segment: Unpack[Segment]) -> np.ndarray:
    """Decodes a clip (the whole file's bytes, or its path), or a segment of it, to mono float32.

    Channels are mixed with equal weights.

    Returns:
        (S,) float32, contiguous, finite, ``1 <= S <= ceil(max_seconds * sample_rate)``.

    Raises:
        DecodeError: see there.
        OSError: ``data`` is a path that cannot be opened.
        UserError: arguments that no file could satisfy.
    """
    return _decode(data, mono=True, **segment)


def decode_channels(data: Source, **segment: Unpack[Segment]) -> np.ndarray:
    """Decodes as ``decode``, with channels kept: (S, channels) float32."""
    return _decode(data, mono=False, **segment)


def decode_into(
    row: np.ndarray,
    data: Source,
    *,
    place: Callable[[int], tuple[int, int]],
    **segment: Unpack[Segment],
) -> tuple[int, int]:
    """Decodes as ``decode`` into ``row`` (S,) float32, shifted circularly within its place.

    Args:
        place: maps the samples n of the wave (at most S) to (offset, roll): its start in the row,
            ``0 .. S - n``, and the samples by which it is shifted, ``0 .. n - 1``. Called once.

    Returns:
        (offset, n). The row outside ``[offset, offset + n)`` is not changed.
    """
    wave = _decode(data, mono=True, **segment)[: len(row)]
    offset, roll = place(len(wave))
    write_rolled(row[offset:], wave, roll)
    return offset, len(wave)


def write_rolled(row: np.ndarray, wave: np.ndarray, roll: int) -> None:
    """Computes ``row[:n] = np.roll(wave, roll)`` for a ``wave`` (n,), without a copy between."""
    n = len(wave)
    row[roll:n] = wave[: n - roll]
    row[:roll] = wave[n - roll :]


def probe(data: Source, *, max_file_seconds: float = MAX_FILE_SECONDS) -> AudioInfo:
    """Returns length, rate, channels and codec of a file (its bytes or its path), from its header.

    Args:
        max_file_seconds: if the header gives no length, at most this much is decoded to count it.
            A length that the header gives is returned, however long.

    Raises:
        DecodeError: ``corrupt`` where the file is not audio; ``truncated`` where its end is
            missing; ``long`` beyond ``max_file_seconds``.
        OSError: ``data`` is a path that cannot be opened.
    """
    with _open(data) as file:
        frames = file.frames
        if frames >= UNKNOWN_FRAMES:
            max_file_seconds *= _share_read(file)
            most = samples_of(max_file_seconds, file.samplerate)
            frames = sum(len(block) for block in _blocks(file, 0, most + 1))
            check_length(frames, file.samplerate, max_file_seconds)
        codec = {"WAVEX": "wav", "RF64": "wav"}.get(file.format, file.format.lower())
        if file.subtype == "OPUS":
            codec = "opus"
        _check_end(file, data)
        return AudioInfo(frames, file.samplerate, file.channels, codec)


def check_length(frames: int, rate: int, max_file_seconds: float) -> None:
    """Raises ``DecodeError`` ("long") for a file with too many frames."""
    if frames > samples_of(max_file_seconds, rate):
        text = f"a file of {frames / rate:.6g} s or more: longer than max_file_seconds="
        raise DecodeError("long", f"{text}{max_file_seconds:g}")


def channel_mean(block: np.ndarray) -> np.ndarray:
    """Returns the mean over the channels: (n, channels) -> (n,).

    It adds channel by channel: ``mean(1)`` takes twenty times as long, and a matrix product, which
    is as fast, wakes BLAS threads that spin: 8 ms instead of 0.3 in a loader worker on its own
    core.
    """
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    total: np.ndarray = block[:, 0] + block[:, 1]
    for channel in range(2, channels):
        total += block[:, channel]
    total *= np.float32(1.0 / channels)
    return total


def samples_of(seconds: float, rate: int) -> int:
    """Returns the samples of ``seconds``, rounded up; ``inf`` is more than any file."""
    # no extra sample for a rounding error of the product
    return math.ceil(seconds * rate - 1e-6) if seconds < 1e9 else UNKNOWN_FRAMES


def _decode(
    data: Source,
    *,
    mono: bool,
    sample_rate: int,
    start_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_decode_seconds: float = 3600.0,
    max_file_seconds: float = MAX_FILE_SECONDS,
    expected_frames: int | None = None,
    expected_rate: int | None = None,
    min_seconds: float = 0.0,
) -> np.ndarray:
    if not RATES_HZ[0] <= sample_rate <= RATES_HZ[1]:
        raise UserError(f"sample_rate={sample_rate}: in Hz, within {RATES_HZ}")
    if not 0 <= start_seconds < math.inf:
        raise UserError(f"start_seconds={start_seconds}: zero or more")
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise UserError(f"max_seconds={max_seconds}: more than zero, or None for the whole clip")
    if not 0 < max_decode_seconds < math.inf:
        raise UserError(f"max_decode_seconds={max_decode_seconds}: more than zero")
    if not max_file_seconds > 0:
        raise UserError(f"max_file_seconds={max_file_seconds}: more than zero")

    with _open(data) as file:
        rate, subtype = file.samplerate, file.subtype
        slack = MP3_SLACK_FRAMES if file.format == "MP3" else 0
        slack = SLACK_FRAMES if isinstance(file, AvFile) else slack

        def check_whole(frames: int) -> None:
            """Checks the length of the whole file."""
            check_length(frames, rate, max_file_seconds)
            if expected_frames is not None and abs(frames - expected_frames) > slack:
                text = f"{frames} frames, but {expected_frames} when it was indexed"
                raise DecodeError("truncated" if frames < expected_frames else "mismatch", text)
            if 0 < frames < min_seconds * rate - 1e-6:
                text = f"{frames / rate:g} s, shorter than min_seconds={min_seconds:g}"
                raise DecodeError("brief", text)

        if expected_rate is not None and rate != expected_rate:
            text = f"{rate} Hz, but {expected_rate} Hz when it was indexed"
            raise DecodeError("rate", text)
        if expected_frames is None:
            _check_end(file, data)
        start = round(start_seconds * rate)
        total = file.frames if file.frames < UNKNOWN_FRAMES else None
        if total is None:
            max_file_seconds *= _share_read(file)
            check_length(start, rate, max_file_seconds)
            wanted = samples_of(max_file_seconds, rate) + 1 - start  # one more shows an excess
        else:
            check_whole(total)
            wanted = total - start
        if wanted <= 0:
            raise DecodeError("empty", f"no samples at {start_seconds} s of {total} frames")
        if max_seconds is not None:
            wanted = min(wanted, samples_of(max_seconds, rate))
        cap = samples_of(max_decode_seconds, rate)
        blocks = _blocks(file, start, min(wanted, cap))
        parts = [channel_mean(block) if mono else block for block in blocks]
    wave = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0)])
    n = len(wave)
    check_length(start + n, rate, max_file_seconds)
    if n == cap < wanted:
        text = f"more than max_decode_seconds={max_decode_seconds:g} to read: cut the file, ask for"
        raise DecodeError("long", f"{text} max_seconds, or raise the bound")
    if total is None and n < wanted and (n or not start):
        check_whole(start + n)  # read to the end: now the length is known
    if total is not None and n < min(wanted, cap) - slack:
        raise DecodeError("truncated", f"only {n} of {min(wanted, cap)} frames decode")
    if not n:
        raise DecodeError("empty", f"no samples at {start_seconds} s")
    if not subtype.startswith("PCM_"):  # integers are always valid
        peak = max(float(wave.max()), -float(wave.min()))  # a NaN propagates through both
        if not math.isfinite(peak):
            raise DecodeError("nan", "samples that are not finite")
        if peak > PEAK:
            raise DecodeError("range", f"a sample of magnitude {peak:.3g}: not audio")
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate, quality="HQ")
        if not len(wave):
            raise DecodeError("empty", f"too short to resample from {rate} to {sample_rate} Hz")
    if max_seconds is not None:
        wave = wave[: samples_of(max_seconds, sample_rate)]
    return np.ascontiguousarray(wave, dtype=np.float32)


class _File(soundfile.SoundFile):
    def seekable(self) -> bool:
        # soundfile seeks after every read of a seekable file, which fails at the true end of one
        # whose header has a wrong or no length (FLAC written to a pipe, MP3 without a Xing frame)
        return False


def _open(data: Source) -> _File | AvFile:
    file: _File | AvFile
    try:
        # the absolute path: libsndfile takes "-" for its standard input; its bytes: any name
        source: bytes | io.BytesIO | io.BufferedReader
        if isinstance(data, Path):
            source = os.fsencode(data.absolute())
        else:
            source = data.open() if isinstance(data, FilePart) else io.BytesIO(data)
        file = _File(source)
    except (soundfile.SoundFileError, RuntimeError, TypeError, UnicodeError) as error:
        if not isinstance(data, bytes):
            data.open("rb").close()  # raises the specific error, not "System error"
        try:
            other = open_av(data)
        except RuntimeError as also:
            raise DecodeError("corrupt", f"not a readable audio file: {also}") from also
        if other is None:
            why = _reason(error)
            raise DecodeError("corrupt", f"not a readable audio file: {why}") from error
        file = other
    if not RATES_HZ[0] <= file.samplerate <= RATES_HZ[1]:
        file.close()
        text = f"sample rate {file.samplerate} Hz is outside {RATES_HZ}"
        raise DecodeError("corrupt", text)
    return file


def _check_end(file: _File | AvFile, data: Source) -> None:
    """Raises ``DecodeError`` ("truncated") if the container shows that its end is missing."""
    if isinstance(file, _File) and (why := missing_end(file, data)):
        raise DecodeError("truncated", why)


def _share_read(file: _File | AvFile) -> float:
    """Returns the share of ``max_file_seconds`` that is read of a file without a length: less if
    its seconds hold more samples than those of audio."""
    return min(1.0, NO_LENGTH_HZ / (file.samplerate * file.channels))


def _blocks(file: _File | AvFile, start: int, frames: int) -> Iterator[np.ndarray]:
    """Yields (<= BLOCK_SAMPLES / channels, channels) float32, until ``frames`` or the end."""
    try:
        if start:
            file.seek(start)
        while frames > 0:
            most = min(frames, max(1, BLOCK_SAMPLES // file.channels))
            block = file.read(most, dtype="float32", always_2d=True)
            if not len(block):
                return
            yield block
            frames -= len(block)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DecodeError("corrupt", f"damaged or truncated audio: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns libsndfile's own words, without the BytesIO's address that soundfile adds."""
    return getattr(error, "error_string", "") or str(error)
