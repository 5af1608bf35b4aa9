"""Reads m4a, aac, wma and other containers that libsndfile does not know, by PyAV (extra ``av``).

PyAV carries its own FFmpeg. A file is opened with the demuxer that its first bytes name, from an
allow-list of containers that hold their audio themselves: playlists and other formats that would
have FFmpeg open further files or addresses are never tried.

``open_av`` returns an object with the part of ``soundfile.SoundFile``'s interface that
``bat.audio.decode`` uses. Positions are those of the decoded samples: a seek goes to a packet
``PREROLL_SECONDS`` before, since the first packets after a seek lack their overlap, and drops
samples up to the one asked for, by the container's clock (a millisecond in Matroska and ASF). A
container states its length to a few packets; ADTS (``.aac``)
states none and is counted by decoding.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from bat.audio.part import FilePart

PREROLL_SECONDS = 0.5
SLACK_FRAMES = 3 * 2048
"""Samples by which the length in a header may differ from what decodes (encoder delay, padding)."""
READ = ("m4a", "m4b", "mp4", "3gp", "aac", "wma", "asf", "mka", "mkv", "weba", "webm", "amr")
"""Suffixes of the containers read."""


def has_av() -> bool:
    """Returns True if PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def container_of(head: bytes) -> tuple[str, str] | None:
    """Returns FFmpeg's demuxer and a suffix for a file that begins with ``head``; None: no other
    container than these is opened."""
    if head[4:8] == b"ftyp":
        return "mov", "m4a"
    if head[:8] == bytes.fromhex("3026b2758e66cf11"):
        return "asf", "wma"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska", "mka"
    if head[:5] == b"#!AMR":
        return "amr", "amr"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac", "aac"
    return None


def open_av(data: bytes | Path | FilePart) -> AvFile | None:
    """Opens a file (its bytes or its path); None without PyAV, or if it is none of the containers.

    Raises ``RuntimeError`` if it is damaged or has no audio, ``OSError`` if it cannot be opened.
    """
    if not has_av():
        return None
    file: BinaryIO = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    found = container_of(file.read(16))
    file.seek(0)
    if found is None:
        file.close()
        return None
    try:
        return AvFile(file, *found)
    except Exception:
        file.close()
        raise


class AvFile:
    """An open file. Attributes: ``samplerate`` (Hz), ``channels``, ``frames`` (``2 ** 63 - 1`` if
    the header gives no length), ``format`` and ``subtype``."""

    subtype = "AV"

    def __init__(self, file: BinaryIO, demuxer: str, suffix: str) -> None:
        av: Any = importlib.import_module("av")
        self._errors: Any = (av.FFmpegError, ValueError, EOFError)
        self._file, self.format = file, suffix.upper()
        try:
            self._container = av.open(file, format=demuxer)
            self._stream = next(iter(self._container.streams.audio), None)
        except self._errors as error:
            raise RuntimeError(str(error)) from error
        if self._stream is None or not self._stream.rate:
            raise RuntimeError("no audio in it")
        self.samplerate, self.channels = int(self._stream.rate), int(self._stream.channels)
        self._resampler = av.AudioResampler(format="fltp")
        length = self._stream.duration if demuxer != "aac" else None
        seconds = None if length is None else float(length * self._stream.time_base)
        if seconds is None and demuxer != "aac" and self._container.duration:
            seconds = self._container.duration / av.time_base
        self.frames = (1 << 63) - 1 if seconds is None else round(seconds * self.samplerate)
        self._rest = np.zeros((0, self.channels), np.float32)
        self._began: float | None = None
        self._blocks = self._decoded(0)

    def seek(self, frame: int) -> None:
        """Moves to sample ``frame`` of the audio."""
        self._blocks = self._decoded(frame)
        self._rest = self._rest[:0]

    def read(self, frames: int, *, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Returns the next samples, (at most ``frames``, channels) float32; none at the end."""
        assert dtype == "float32"
        assert always_2d
        parts, have = [self._rest], len(self._rest)
        try:
            while have < frames:
                parts.append(next(self._blocks))
                have += len(parts[-1])
        except StopIteration:
            pass
        except self._errors as error:
            raise RuntimeError(str(error)) from error
        whole = np.concatenate(parts)
        self._rest = whole[frames:]
        return whole[:frames]

    def _decoded(self, first: int) -> Iterator[np.ndarray]:
        """Yields the samples from ``first`` on, (n, channels) float32."""
        stream: Any = self._stream
        if first:
            if self._began is None:  # the first samples need not be at the stream's start time
                frame = next(self._container.decode(stream))
                self._began = _seconds(frame)
            seconds = max(0.0, first / self.samplerate - PREROLL_SECONDS) + self._began
            self._container.seek(int(seconds / stream.time_base), stream=stream)
        at: int | None = None
        for frame in self._container.decode(stream):
            if at is None:
                time = _seconds(frame) - self._began if self._began is not None else 0.0
                at = round(time * self.samplerate)
            frame.pts = None
            for part in self._resampler.resample(frame):
                block = part.to_ndarray().T  # (n, channels)
                if block.shape[1] != self.channels:
                    raise ValueError("the number of channels changes within the file")
                skip = min(max(0, first - at), len(block))
                at += len(block)
                if skip < len(block):
                    yield np.ascontiguousarray(block[skip:], np.float32)

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seconds(frame: Any) -> float:
    """Returns the time of a decoded frame by its container."""
    return 0.0 if frame.pts is None else float(frame.pts * frame.time_base)
