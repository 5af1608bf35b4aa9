"""Reads audio files safely by libsndfile: returns the requested segment or raises ``DecodeError``.

soundfile (libsndfile) reads WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF and more, from memory or a path
(a day-long recording is read by seeking, never whole). Only the requested segment is read, in
blocks, so the memory for a clip depends on its actual content and never on its header's claims. A
file that is longer than ``max_file_seconds`` is refused by its header; one without a length is not
read further, nor further than as many samples of ``UNTOLD_HZ``: its seconds may be of
8 x 655,350 Hz.

Damaged files. A truncated FLAC raises in libsndfile. A truncated OGG, MP3, Opus or WAV is read
short **without an error**, and for all but MP3 the reported length shrinks with the file. So the
frames that were read are compared with the header, and the header with ``expected_frames``, the
length that an index recorded when the clip was whole.

Departures from plain soundfile: it seeks after every read, which fails at the true end of a file
whose header has a wrong or no length (FLAC written to a pipe, MP3 without a Xing frame; seen with
soundfile 0.13, libsndfile 1.2.2): ``Reader`` reads as if from a pipe. And it makes its callbacks
anew for each file, see ``_Callbacks``.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import soundfile

Kind = Literal["corrupt", "empty", "short", "mismatch", "long", "nan", "range", "rate", "brief"]

BLOCK_SAMPLES = 2**22  # samples (all channels) read at once: 16 MiB
UNKNOWN_FRAMES = 2**62  # libsndfile answers 2^63 - 1 where a header gives no length
MP3_SLACK_FRAMES = 3 * 1152  # encoder delay and padding: decoders count them differently
MAX_FILE_SECONDS = 3600.0  # a longer file is not a clip: see docs/security.md
UNTOLD_HZ = 2 * 192_000  # samples a second (all channels) read of a file without a length
RATES_HZ = (1_000, 768_000)
PEAK = 1e6  # samples beyond this are no audio, and their power would overflow float32


class DecodeError(ValueError):
    """A clip that cannot be used; ``kind`` gives the reason in one word, for counting.

    ``corrupt`` unreadable; ``empty`` no samples (at the requested position); ``short`` fewer frames
    than the header or the index states; ``mismatch`` more frames than the index recorded; ``long``
    beyond ``max_file_seconds`` or ``max_decode_seconds``; ``nan`` samples that are not finite;
    ``range`` beyond 1e6; ``rate`` another sample rate than the index recorded; ``brief`` whole, but
    shorter than requested.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # pickled intact from loader workers


class _Callbacks:
    """Callbacks by which libsndfile reads a file object, made once and reused from file to file.

    soundfile 0.13 makes five of them for each file, at a tenth of the time a FLAC clip takes.
    """

    free: ClassVar[list[_Callbacks]] = []

    def __init__(self) -> None:
        self.file = io.BytesIO()
        ffi: Any = soundfile._ffi
        made = {
            "get_filelen": lambda _: self.file.getbuffer().nbytes,
            "seek": lambda offset, whence, _: self.file.seek(offset, whence),
            "read": lambda to, count, _: self.file.readinto(ffi.buffer(to, count)),
            "write": lambda *_: 0,
            "tell": lambda _: self.file.tell(),
        }
        self._kept = {k: ffi.callback(f"sf_vio_{k}", function) for k, function in made.items()}
        self.struct = ffi.new("SF_VIRTUAL_IO*", self._kept)


class _Hushed:
    """Context manager that discards what C libraries write to their ``stderr``.

    libmpg123 writes a line for every damaged frame of an MP3, and libsndfile has no switch for
    that. Within the context, the variable ``stderr`` of C points to ``/dev/null``; file descriptor
    2, which Python writes to, is not touched. If the C library has no such variable, nothing is
    discarded.
    """

    def __init__(self) -> None:
        try:
            c = ctypes.CDLL(None)
            self._stderr = ctypes.c_void_p.in_dll(c, "stderr")
            c.fopen.restype = ctypes.c_void_p
            self._null = c.fopen(os.fsencode(os.devnull), b"w")
        except (OSError, ValueError, AttributeError):
            self._null = None
        self._loud = self._stderr.value if self._null else None
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # threads inside do not survive a fork

    def _begin(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._point_to(self._loud)

    def _point_to(self, file: int | None) -> None:
        if self._null:
            self._stderr.value = file

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self._point_to(self._null)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._point_to(self._loud)


_hushed = _Hushed()


class Reader(soundfile.SoundFile):
    _lent: _Callbacks | None = None

    def __init__(self, file: bytes | io.BytesIO) -> None:
        with _hushed:
            super().__init__(file)

    def read(self, *args: Any, **how: Any) -> Any:
        with _hushed:
            return super().read(*args, **how)

    def seek(self, *args: Any) -> int:
        with _hushed:
            return int(super().seek(*args))

    def seekable(self) -> bool:
        return False  # no seek after each read: see the module's departures

    def _init_virtual_io(self, file: io.BytesIO) -> Any:
        try:
            self._lent = _Callbacks.free.pop()  # atomic: no two files share one
        except IndexError:
            self._lent = _Callbacks()
        self._lent.file = file
        return self._lent.struct

    def close(self) -> None:
        super().close()
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.file = io.BytesIO()
            _Callbacks.free.append(lent)


def open_reader(data: bytes | Path) -> Reader:
    try:
        # the absolute path: libsndfile takes "-" for its standard input; its bytes: any name
        if isinstance(data, Path):
            file = Reader(os.fsencode(os.path.abspath(data)))
        else:
            file = Reader(io.BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError, TypeError, UnicodeError) as error:
        if isinstance(data, Path):
            data.open("rb").close()  # raises the specific error, not "System error"
        raise DecodeError("corrupt", f"not a readable audio file: {reason(error)}") from error
    if not RATES_HZ[0] <= file.samplerate <= RATES_HZ[1]:
        rate = file.samplerate
        file.close()
        raise DecodeError("corrupt", f"sample rate {rate} Hz is outside {RATES_HZ}")
    return file


def read_segment(
    file: Reader,
    start_seconds: float,
    max_seconds: float | None,
    max_decode_seconds: float,
    expected: tuple[int | None, int | None, float, float],
    read: Callable[[Reader, int, int], np.ndarray],
) -> np.ndarray:
    """Applies ``read(file, first frame, frames)`` to the segment, at the file's own rate, with
    checks.

    ``expected``: frames and rate that the index recorded; shortest and longest file in seconds.
    """
    rate = file.samplerate
    frames, _, min_seconds, max_file_seconds = expected
    if expected[1] is not None and rate != expected[1]:
        raise DecodeError("rate", f"{rate} Hz, but {expected[1]} Hz when it was indexed")
    slack = MP3_SLACK_FRAMES if file.format == "MP3" else 0
    total, note = file.frames if file.frames < UNKNOWN_FRAMES else None, ""
    if total is not None:
        check_length(total, rate, max_file_seconds)
        _check_total(total, frames, slack)
    start = round(start_seconds * rate)
    if total == 0 or (total is not None and start >= total):
        raise DecodeError("empty", f"no samples at {start_seconds} s of {total} frames")
    if total is None:
        max_file_seconds, note = untold_seconds(file, max_file_seconds)
        check_length(start, rate, max_file_seconds, note)
        wanted = frames_within(max_file_seconds, rate) + 1 - start  # one more shows an excess
    else:
        _check_brief(total, rate, min_seconds)
        wanted = total - start
    if max_seconds is not None:
        wanted = min(wanted, samples_of(max_seconds, rate))
    cap = samples_of(max_decode_seconds, rate)
    wave = read(file, start, min(wanted, cap))
    check_length(start + len(wave), rate, max_file_seconds, note)
    if wanted > cap and len(wave) == cap:
        raise DecodeError(
            "long",
            f"more than max_decode_seconds={max_decode_seconds:g} to read: cut the file, ask for "
            "max_seconds, or raise the bound",
        )
    if total is None and len(wave) < wanted and (len(wave) or not start):
        _check_total(start + len(wave), frames, slack)  # read to the end: now the length is known
        if len(wave):
            _check_brief(start + len(wave), rate, min_seconds)
    elif total is not None and len(wave) < min(wanted, cap) - slack:
        raise DecodeError("short", f"only {len(wave)} of {min(wanted, cap)} frames decode")
    if not len(wave):
        raise DecodeError("empty", f"no samples at {start_seconds} s")
    return wave


def mixed(file: Reader, start: int, frames: int) -> np.ndarray:
    return _read(file, start, frames, mix=True)


def apart(file: Reader, start: int, frames: int) -> np.ndarray:
    return _read(file, start, frames, mix=False)


def _read(file: Reader, start: int, frames: int, *, mix: bool) -> np.ndarray:
    """Reads up to ``frames`` frames from ``start`` on, float32: mixed (n,), or (n, channels)."""
    channels = file.channels
    found = blocks(file, start, frames)
    parts = [channel_mean(block) for block in found] if mix else list(found)
    if len(parts) == 1:
        return parts[0]
    empty = np.zeros(0 if mix else (0, channels), dtype=np.float32)
    return np.concatenate(parts) if parts else empty


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


def blocks(file: Reader, start: int, frames: int) -> Iterator[np.ndarray]:
    """Yields (<= BLOCK_SAMPLES / channels, channels) float32, until ``frames`` or the end."""
    try:
        if start:
            file.seek(start)
        while frames > 0:
            ask = min(frames, max(1, BLOCK_SAMPLES // file.channels))
            block = file.read(ask, dtype="float32", always_2d=True)
            if not len(block):
                return
            yield block
            frames -= len(block)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DecodeError("corrupt", f"damaged audio: {reason(error)}") from error


def samples_of(seconds: float, rate: int) -> int:
    return math.ceil(seconds * rate - 1e-6)  # no extra sample for a rounding error of the product


def _check_total(total: int, expected: int | None, slack: int) -> None:
    if expected is not None and total < expected - slack:
        raise DecodeError("short", f"{total} frames, but {expected} when it was indexed: cut short")
    if expected is not None and total > expected + slack:
        raise DecodeError("mismatch", f"{total} frames, but {expected} when it was indexed")


def frames_within(seconds: float, rate: int) -> int:
    """Returns the frames of a file that lasts ``seconds``, which may be ``inf``."""
    return samples_of(seconds, rate) if seconds < UNKNOWN_FRAMES / rate else UNKNOWN_FRAMES


def untold_seconds(file: Reader, max_file_seconds: float) -> tuple[float, str]:
    """Returns ``max_file_seconds`` of a file whose header gives no length, and a note if it is
    reduced: ``UNTOLD_HZ`` samples for each requested second."""
    samples = file.samplerate * file.channels
    if samples <= UNTOLD_HZ:
        return max_file_seconds, ""
    note = f", less for {samples} samples a second and no length in its header"
    return max_file_seconds * UNTOLD_HZ / samples, note


def check_length(frames: int, rate: int, max_file_seconds: float, note: str = "") -> None:
    """Raise ``DecodeError`` ("long") for a file with too many frames."""
    if frames > frames_within(max_file_seconds, rate):
        raise DecodeError(
            "long",
            f"a file of {frames / rate:.6g} s or more: longer than max_file_seconds="
            f"{max_file_seconds:g}{note}",
        )


def _check_brief(total: int, rate: int, min_seconds: float) -> None:
    if total < min_seconds * rate - 1e-6:
        raise DecodeError("brief", f"{total / rate:g} s, shorter than min_seconds={min_seconds:g}")


def check_samples(wave: np.ndarray, subtype: str = "") -> None:
    """Raise ``DecodeError`` for invalid samples; integers (``PCM_16``) are always valid."""
    if subtype.startswith("PCM_"):
        return
    peak = max(float(wave.max()), -float(wave.min()))  # a NaN propagates through both
    if not math.isfinite(peak):
        raise DecodeError("nan", "samples that are not finite")
    if peak > PEAK:
        raise DecodeError("range", f"a sample of magnitude {peak:.3g}: not audio")


def reason(error: Exception) -> str:
    """Returns libsndfile's own words, without the BytesIO's address that soundfile adds."""
    return getattr(error, "error_string", "") or str(error)
