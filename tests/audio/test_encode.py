"""Encoding: what comes back, that it is the same twice, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from bat.audio.decode import AudioInfo, decode, decode_channels, probe
from bat.audio.encode import OPUS_RATES_HZ, encode, stamp_ogg
from bat.errors import UserError


def noise(frames: int, channels: int = 1) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((frames, channels)) * 0.1
    return (np.rint(x * 32768) / 32768).astype(np.float32)


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_encode__exact_on_the_16_bit_grid(codec: str) -> None:
    wave = noise(16000)[:, 0]
    wave[:2] = [-1.0, 32767 / 32768]
    data = encode(wave, sample_rate=16000, codec=codec)  # type: ignore[arg-type]
    back = decode(data, sample_rate=16000)
    assert back.dtype == np.float32
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, wave)
    assert probe(data) == AudioInfo(16000, 16000, 1, codec)


def test_encode__clips_and_does_not_wrap() -> None:
    wave = np.array([2.0, -2.0, 1.0, 0.0], dtype=np.float32)
    back = decode(encode(wave, sample_rate=16000, codec="flac"), sample_rate=16000)
    np.testing.assert_array_equal(back, np.float32([32767 / 32768, -1.0, 32767 / 32768, 0.0]))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("codec", ["wav", "flac", "ogg", "opus"])
def test_encode__equal_bytes_for_equal_waves(codec: str, channels: int) -> None:
    wave = noise(35000, channels)
    wave = wave[:, 0] if channels == 1 else wave
    first, second = (encode(wave, sample_rate=16000, codec=codec) for _ in range(2))  # type: ignore[arg-type]
    assert first == second
    assert probe(first) == AudioInfo(35000, 16000, channels, codec)
    back = decode_channels(first, sample_rate=16000).reshape(wave.shape)
    loss = np.abs(back - wave).max() if codec in ("wav", "flac") else np.std(back - wave)
    assert loss <= (0 if codec in ("wav", "flac") else 0.1)


@pytest.mark.parametrize("rate", OPUS_RATES_HZ)
def test_encode__opus_keeps_rate_length_and_tone(rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    data = encode(tone, sample_rate=rate, codec="opus")
    assert probe(data) == AudioInfo(rate, rate, 1, "opus")
    assert np.corrcoef(decode(data, sample_rate=rate), tone)[0, 1] > 0.99


def test_stamp_ogg__checksums_are_right() -> None:
    out = io.BytesIO()
    soundfile.write(out, noise(66150), 44100, format="OGG", subtype="VORBIS")
    data = out.getvalue()
    assert stamp_ogg(data, int.from_bytes(data[14:18], "little")) == data
    stamped = stamp_ogg(data, 7)
    assert stamped != data
    np.testing.assert_array_equal(
        decode(stamped, sample_rate=44100), decode(data, sample_rate=44100)
    )


@pytest.mark.parametrize(
    ("wave", "codec", "message"),
    [
        (np.zeros((4, 2, 1)), "flac", r"\(S, channels\)"),
        (np.zeros((4, 9)), "flac", "flac cannot hold 9 channels at 44100 Hz"),
        (np.zeros(0), "flac", "S >= 1"),
        (np.array([np.nan]), "wav", "finite"),
        (np.zeros(4), "opus", "Opus has no 44100 Hz: resample to one of 8000"),
        (np.zeros(4), "mp3", "one of flac, wav, ogg, opus"),
    ],
)
def test_encode__refuses(wave: np.ndarray, codec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode(wave, sample_rate=44100, codec=codec)  # type: ignore[arg-type]
