"""Writes the clips of synthetic tasks, which need no audio from elsewhere: 16 kHz, 16 bits."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000


def generator(seed: int, number: int) -> np.random.Generator:
    """Returns the random generator of clip ``number``, which is the same on every machine."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def sound(hz: float, seconds: float) -> np.ndarray:
    """Returns a tone with two harmonics that fades in and out within 10 ms: (S,) in [-1, 1]."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = sum((np.sin(2 * np.pi * hz * k * t) / k for k in (1, 2, 3)), np.zeros(len(t)))
    fade = np.minimum(1.0, np.minimum(t, t[::-1]) / 0.01)
    return tone * fade / 1.9


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write (S,) in [-1, 1] to ``path``; an equal file is not rewritten."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``; an equal file is not rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)
