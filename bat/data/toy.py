"""Makes the toy set: seeded synthetic sounds of five kinds, for a first run and for tests.

On disk it is a small ESC-10 (``audio/*.flac`` + ``meta.csv``, which ``task=toy`` reads). Clip i is
of kind ``i % 5`` and fold ``i // 5 % 2 + 1``: ten clips hold every kind once in each fold. 16 kHz,
16 bits; amplitude at most 0.8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bat.audio.decode import encode
from bat.errors import UserError
from bat.io import write_atomic

SAMPLE_RATE = 16_000
KINDS = ("tone", "chirp", "noise", "clicks", "mixture")


def toy_wave(kind: str, *, seed: int, number: int, seconds: float) -> np.ndarray:
    """Returns a sound of ``kind``; pitch, rate, timing drawn from (seed, number): (S,) float32."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    samples = round(seconds * SAMPLE_RATE)
    t = np.arange(samples) / SAMPLE_RATE  # (S,) seconds

    def tone() -> np.ndarray:
        pitch_hz = 220.0 * 2.0 ** rng.uniform(0, 2)
        harmonics = (np.sin(2 * np.pi * pitch_hz * k * t) / k for k in (1, 2, 3))
        return sum(harmonics, np.zeros(samples)) * (1 + 0.3 * np.sin(2 * np.pi * 4 * t))

    def chirp() -> np.ndarray:
        low_hz, octaves = rng.uniform(150, 400), rng.uniform(3, 4)
        sweep = t * rng.uniform(1.0, 2.0) % 1.0  # (S,) place within a sweep
        hz = low_hz * 2.0 ** (octaves * sweep)
        return np.sin(2 * np.pi * np.cumsum(hz) / SAMPLE_RATE)

    def noise() -> np.ndarray:
        bursts = np.sin(2 * np.pi * rng.uniform(1, 3) * t + rng.uniform(0, 6)) > 0.2
        return rng.standard_normal(samples) * bursts / 3

    def clicks() -> np.ndarray:
        train = np.zeros(samples)
        train[:: round(SAMPLE_RATE / rng.uniform(6, 14))] = 1.0
        decay = np.exp(-np.arange(400) / 40) * np.cos(np.arange(400) * rng.uniform(0.5, 1.5))
        return np.convolve(train, decay)[:samples]

    def mixture() -> np.ndarray:
        return tone() / 2 + clicks() + noise() / 2

    makers = {"tone": tone, "chirp": chirp, "noise": noise, "clicks": clicks, "mixture": mixture}
    wave = makers[kind]() + 1e-3 * rng.standard_normal(samples)
    return (0.8 * wave / np.abs(wave).max()).astype(np.float32)


def make_toy(root: str | Path, *, clips: int = 10, seed: int = 0, seconds: float = 2.0) -> Path:
    """Write the toy set to ``root`` (unless it is there), and return ``root``.

    Raises:
        UserError: fewer than 10 clips or no multiple of 5, or clips under a tenth of a second; a
            folder that cannot be written.
    """
    if clips < 10 or clips % 5 or seconds < 0.1:
        raise UserError(f"clips={clips}, seconds={seconds}: 10, 15, 20, ... clips of 0.1 s or more")
    root = Path(root)
    audio = root / "audio"
    try:
        audio.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror}): set data.cache to another folder"
        ) from error
    lines = ["filename,fold,target,category"]
    for i in range(clips):
        kind, fold = KINDS[i % 5], i // 5 % 2 + 1
        name = f"{kind}-{seed}-{i:02d}.flac"
        wave = toy_wave(kind, seed=seed, number=i, seconds=seconds)
        data = encode(wave, sample_rate=SAMPLE_RATE, codec="flac")
        if not (audio / name).is_file() or (audio / name).read_bytes() != data:
            write_atomic(audio / name, data)
        lines.append(f"{name},{fold},{i % 5},{kind}")
    write_atomic(root / "meta.csv", ("\n".join(lines) + "\n").encode())
    return root
