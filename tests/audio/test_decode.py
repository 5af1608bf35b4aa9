"""Decoding: values, segments, and what is refused with which kind of error."""

from __future__ import annotations

import functools
import io
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

import bat.audio.decode as module
from bat.audio.decode import AudioInfo, DecodeError, decode, decode_channels, decode_into, probe
from bat.errors import UserError

FORMATS = {  # codec -> libsndfile's format, subtype, rate
    "wav": ("WAV", "PCM_16", 44100),
    "flac": ("FLAC", "PCM_16", 44100),
    "ogg": ("OGG", "VORBIS", 44100),
    "opus": ("OGG", "OPUS", 48000),
    "mp3": ("MP3", None, 44100),
}


def file_bytes(
    wave: np.ndarray, rate: int, container: str = "WAV", subtype: str | None = None
) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=container, subtype=subtype)
    return out.getvalue()


def noise(frames: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((frames, channels)) * 0.1
    return (np.rint(x * 32768) / 32768).astype(np.float32)


@functools.cache
def sample(codec: str, frames: int = 66150, channels: int = 2) -> bytes:
    container, subtype, rate = FORMATS[codec]
    return file_bytes(noise(frames, channels), rate, container, subtype)


def with_flac_total(data: bytes, total: int) -> bytes:
    """The FLAC with another total in its STREAMINFO (36 bits, from the low half of byte 21)."""
    forged = bytearray(data)
    forged[21] = (forged[21] & 0xF0) | (total >> 32)
    forged[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(forged)


@functools.cache
def silent_flac(frames: int) -> bytes:
    """Frames of silence at 8 kHz: 12 bytes each 4,096."""
    return file_bytes(np.zeros(frames, np.float32), 8_000, "FLAC", "PCM_16")


def kind_of(data: bytes | Path, read: Any = decode, **arguments: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        read(data, **{"sample_rate": 16000, **arguments})
    return caught.value.kind


@pytest.mark.parametrize("codec", FORMATS)
def test_decode__every_format_from_bytes_and_path_and_its_segments(
    codec: str, tmp_path: Path
) -> None:
    data, rate, path = sample(codec), FORMATS[codec][2], tmp_path / "ü -.x"
    path.write_bytes(data)
    assert probe(data) == probe(path) == AudioInfo(66150, rate, 2, codec)
    plain, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    wave = decode(data, sample_rate=rate, expected_frames=66150)
    assert wave.shape == (66150,)
    np.testing.assert_allclose(wave, plain.mean(1), atol=1e-7)
    part = decode(data, sample_rate=rate, start_seconds=0.5, max_seconds=0.25)
    np.testing.assert_allclose(part, wave[rate // 2 : rate // 2 + rate // 4], atol=1e-6)
    rest = decode(data, sample_rate=rate, start_seconds=0.5, max_seconds=100.0)
    assert len(rest) == 66150 - rate // 2
    for more in ({}, {"start_seconds": 0.7, "max_seconds": 0.3}):
        np.testing.assert_array_equal(
            decode(path, sample_rate=16000, **more),  # type: ignore[arg-type]
            decode(data, sample_rate=16000, **more),  # type: ignore[arg-type]
        )


def test_decode__blocks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(sample("wav"), sample_rate=44100)
    monkeypatch.setattr(module, "BLOCK_SAMPLES", 1000)
    np.testing.assert_array_equal(decode(sample("wav"), sample_rate=44100), whole)


def test_decode__resampling_keeps_a_tone_and_removes_aliases() -> None:
    time = np.arange(44100 * 2) / 44100
    tone = file_bytes(0.5 * np.sin(2 * np.pi * 1000 * time), 44100, subtype="FLOAT")
    wave = decode(tone, sample_rate=16000)
    assert wave.shape == (32000,)
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
    assert np.abs(wave - wanted)[1000:-1000].max() < 1e-4
    high = file_bytes(0.5 * np.sin(2 * np.pi * 12000 * time), 44100, subtype="FLOAT")
    assert np.abs(decode(high, sample_rate=16000)[1000:-1000]).max() < 0.5 * 10 ** (-80 / 20)


@pytest.mark.parametrize(("seconds", "samples"), [(10.23, 163680), (0.1, 1600), (1 / 3, 5334)])
def test_decode__max_seconds_in_samples(seconds: float, samples: int) -> None:
    data = file_bytes(np.zeros(16000 * 11, dtype=np.float32), 16000)
    assert len(decode(data, sample_rate=16000, max_seconds=seconds)) == samples


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", bytes(5000), b"RIFF" + bytes(99), b"fLaC" + bytes(50), b"ID3" + bytes(500)],
)
def test_decode__junk_is_corrupt(data: bytes) -> None:
    assert kind_of(data) == "corrupt"
    with pytest.raises(DecodeError, match="not a readable audio file"):
        probe(data)


def test_decode__no_samples_are_empty() -> None:
    assert decode(file_bytes(np.ones(1) * 0.5, 16000), sample_rate=16000).tolist() == [0.5]
    assert kind_of(file_bytes(np.ones(1), 44100)) == "empty"  # a third of a sample at 16 kHz
    assert kind_of(file_bytes(np.zeros(0, dtype=np.float32), 16000), min_seconds=1.0) == "empty"
    assert kind_of(file_bytes(np.zeros(16000), 16000), start_seconds=1.0) == "empty"


@pytest.mark.parametrize(
    ("bad", "kind"), [(np.nan, "nan"), (np.inf, "nan"), (-np.inf, "nan"), (-1e9, "range")]
)
def test_decode__samples_that_are_no_audio(bad: float, kind: str) -> None:
    wave = np.zeros((1000, 2), dtype=np.float32)
    wave[500, 1] = bad
    data = file_bytes(wave, 16000, subtype="FLOAT")
    assert kind_of(data) == kind
    assert len(decode(data, sample_rate=16000, max_seconds=0.03)) == 480  # before the bad one


@pytest.mark.parametrize("codec", ["wav", "ogg", "opus", "mp3"])
def test_decode__silent_truncation_is_named(codec: str) -> None:
    data, rate = sample(codec, frames=132300), FORMATS[codec][2]
    cut = data[: len(data) // 2]
    assert kind_of(cut, sample_rate=rate) == "truncated"
    assert kind_of(cut, sample_rate=rate, expected_frames=132300) == "truncated"


@pytest.mark.parametrize("codec", FORMATS)
def test_decode__damage_raises_decode_error_or_nothing(codec: str) -> None:
    whole, rng = sample(codec, frames=132300), np.random.default_rng(3)
    middle = len(whole) // 2
    if codec == "flac":
        assert kind_of(whole[:middle], expected_frames=132300) == "corrupt"
    elif codec != "wav":
        damaged = whole[:middle] + rng.bytes(2000) + whole[middle + 2000 :]
        assert kind_of(damaged) in ("truncated", "corrupt")
    data = sample(codec, frames=8000)
    for _ in range(25):
        bad = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(bad), 8):
            bad[place] = rng.integers(256)
        try:
            wave = decode(bytes(bad), sample_rate=16000, max_decode_seconds=60)
        except DecodeError:
            continue
        assert np.isfinite(wave).all()
        assert len(wave)


@pytest.mark.parametrize(("codec", "slack"), [("flac", 0), ("mp3", 3 * 1152)])
def test_decode__expected_frames_and_rate(codec: str, slack: int) -> None:
    data = sample(codec)
    for off in (-slack, slack):
        assert len(decode(data, sample_rate=44100, expected_frames=66150 + off)) == 66150
    assert kind_of(data, expected_frames=66150 + slack + 1) == "truncated"
    assert kind_of(data, expected_frames=66150 - slack - 1) == "mismatch"
    assert len(decode(data, sample_rate=44100, expected_rate=44100)) == 66150
    assert kind_of(data, expected_rate=16000, expected_frames=24000) == "rate"


@pytest.mark.parametrize("total", [2**36 - 1, 10**6])
def test_decode__forged_length_allocates_nothing_and_is_short(total: int) -> None:
    data = with_flac_total(sample("flac", channels=1), total)
    tracemalloc.start()
    try:
        assert kind_of(data, max_file_seconds=math.inf) == "truncated"
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # bytes; the header says 256 GiB
    finally:
        tracemalloc.stop()
    part = decode(data, sample_rate=44100, max_seconds=0.5, max_file_seconds=math.inf)
    assert len(part) == 22050
    assert kind_of(data) == ("long" if total > 3600 * 44100 else "truncated")


def test_decode__file_without_length_is_read_to_its_end() -> None:
    whole = sample("flac")
    data = with_flac_total(whole, 0)
    assert probe(data).frames == 66150
    wanted = decode(whole, sample_rate=44100)
    np.testing.assert_array_equal(decode(data, sample_rate=44100), wanted)
    part = decode(data, sample_rate=44100, start_seconds=1.0)
    np.testing.assert_array_equal(part, wanted[44100:])
    assert kind_of(data, expected_frames=70000) == "truncated"


@pytest.mark.parametrize("total", [66150, 0])  # 0: a FLAC without a length in its header
def test_decode__min_seconds_are_of_the_whole_clip(total: int) -> None:
    data = with_flac_total(sample("flac"), total)
    assert len(decode(data, sample_rate=44100, min_seconds=1.5)) == 66150
    assert kind_of(data, min_seconds=1.501) == "brief"
    assert kind_of(data, min_seconds=1.501, start_seconds=1.0) == "brief"
    assert kind_of(data, min_seconds=1.501, expected_frames=88200) == "truncated"  # not so brief
    assert len(decode(data, sample_rate=44100, min_seconds=1.5, max_seconds=0.5)) == 22050


def test_decode__paths_that_are_no_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b"not audio, and not the standard input")
    assert kind_of(Path("-")) == "corrupt"
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "no.wav", sample_rate=16000)
    with pytest.raises(IsADirectoryError):
        probe(tmp_path)


@pytest.mark.parametrize("rate", [44100, 16000])
def test_decode_channels__their_mean_is_the_mix(rate: int) -> None:
    segment: Any = {"sample_rate": rate, "start_seconds": 0.5, "max_seconds": 0.5}
    both = decode_channels(sample("flac"), **segment)
    assert both.shape == (rate // 2, 2)
    assert (both.dtype, both.flags.c_contiguous) == (np.float32, True)
    mixed = decode(sample("flac"), **segment)
    np.testing.assert_allclose(both @ np.float32([0.5, 0.5]), mixed, atol=1e-6)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.1


def test_decode__max_decode_seconds_bounds_what_is_read() -> None:
    data = sample("flac")
    assert kind_of(data, max_decode_seconds=1.0) == "long"
    assert len(decode(data, sample_rate=44100, max_decode_seconds=1.0, max_seconds=1.0)) == 44100
    assert len(decode(data, sample_rate=44100, max_decode_seconds=1.5)) == 66150


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sample_rate", 0),
        ("start_seconds", -1.0),
        ("max_seconds", 0.0),
        ("max_decode_seconds", 0.0),
        ("max_file_seconds", 0),
    ],
)
def test_decode__impossible_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{argument}={value}"):
        decode(b"", **{"sample_rate": 16000, argument: value})  # type: ignore[arg-type]


def test_decode_error__survives_pickling() -> None:
    back = pickle.loads(pickle.dumps(DecodeError("truncated", "3 of 4")))
    assert (back.kind, str(back)) == ("truncated", "3 of 4")


def test_decode__esc10_clip(esc10: Path) -> None:
    data = (esc10 / "audio" / "1-100032-A.ogg").read_bytes()
    info = probe(data)
    assert info == AudioInfo(info.frames, 44100, 1, "ogg")
    plain, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    wave = decode(data, sample_rate=16000, expected_frames=info.frames)
    np.testing.assert_array_equal(wave, soxr.resample(plain, 44100, 16000, quality="HQ"))


@pytest.mark.parametrize("codec", ["flac", "mp3"])
@pytest.mark.parametrize("rate", [44100, 16000])
def test_decode_into__row_holds_the_rolled_wave(codec: str, rate: int) -> None:
    segment: Any = {"sample_rate": rate, "start_seconds": 0.3, "max_seconds": 0.2}
    wave = decode(sample(codec), **segment)
    for roll in (0, 777):
        row = np.full(12_000, 7.0, np.float32)
        place = {len(wave): (5, roll)}.__getitem__
        assert decode_into(row, sample(codec), place=place, **segment) == (5, len(wave))
        np.testing.assert_array_equal(row[5 : 5 + len(wave)], np.roll(wave, roll))
        assert (row[:5] == 7).all()
        assert (row[5 + len(wave) :] == 7).all()
    short = np.zeros(600, np.float32)
    assert decode_into(short, sample(codec), place=lambda n: (0, 0), **segment) == (0, 600)
    np.testing.assert_array_equal(short, wave[:600])


@pytest.mark.parametrize("where", ["decode", "into", "channels", "at a path"])
def test_decode__file_of_a_day_is_long_before_anything_is_decoded(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "day.wav"
    with path.open("wb") as file:  # sparse: 24 h of 8 kHz in 16 bits
        head = bytearray(file_bytes(np.zeros(0, np.float32), 8_000, subtype="PCM_16"))
        head[4:8] = (len(head) - 8 + 86_400 * 16_000).to_bytes(4, "little")
        head[-4:] = (86_400 * 16_000).to_bytes(4, "little")
        file.write(head)
        file.truncate(len(head) + 86_400 * 16_000)
    assert probe(path).frames == 86_400 * 8_000
    part: Any = {"sample_rate": 8_000, "start_seconds": 5.0, "max_seconds": 1.0}
    assert len(decode(path, **part, max_file_seconds=86_400.0)) == 8_000
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # whoever reads fails
    data = path if where == "at a path" else silent_flac(3_601 * 8_000)
    into = functools.partial(decode_into, np.zeros(8_000, np.float32), place=lambda n: (0, 0))
    read = {"into": into, "channels": decode_channels}.get(where, decode)
    assert kind_of(data, read, **part) == "long"


def test_decode__max_file_seconds_to_the_sample() -> None:
    data = silent_flac(16_000)
    assert len(decode(data, sample_rate=8_000, max_file_seconds=2.0)) == 16_000
    assert kind_of(data, sample_rate=8_000, max_file_seconds=2.0 - 1 / 8_000) == "long"


def test_decode__file_without_length_is_read_no_further_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = with_flac_total(silent_flac(80_000), 0)  # 10 s, and the header does not say so
    read: list[int] = []
    plain = soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int, **arguments: Any) -> np.ndarray:
        read.append(frames)
        return plain(self, frames, **arguments)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    assert kind_of(data, sample_rate=8_000, max_file_seconds=4.0) == "long"
    assert kind_of(data, sample_rate=8_000, start_seconds=5.0, max_file_seconds=4.0) == "long"
    assert read == [32_001]
    with pytest.raises(DecodeError, match=r"max_file_seconds=4"):
        probe(data, max_file_seconds=4.0)
    assert read == [32_001, 32_001]
    assert probe(data, max_file_seconds=10.0).frames == 80_000
    assert len(decode(data, sample_rate=8_000, max_seconds=1.0, max_file_seconds=4.0)) == 8_000
    assert len(decode(data, sample_rate=8_000, max_file_seconds=10.0)) == 80_000


def test_decode__file_without_length_of_many_samples_a_second_is_read_less_far() -> None:
    """Seconds of 8 x 655,350 Hz hold 14 times as many samples as those of audio at most."""
    rate, frames = 655_350, 100_000  # 0.15 s
    data = file_bytes(np.zeros((frames, 8), np.float32), rate, "FLAC", "PCM_16")
    streamed = with_flac_total(data, 0)
    just = frames * 8 / module.NO_LENGTH_HZ  # 2.08 s of audio have as many samples
    assert probe(streamed, max_file_seconds=just + 1e-3).frames == frames
    whole = decode(streamed, sample_rate=48_000, max_file_seconds=just + 1e-3)
    assert whole.size == frames * 48_000 // rate
    bound: Any = {"sample_rate": 48_000, "max_file_seconds": just - 1e-2}
    assert kind_of(streamed, **bound) == "long"
    assert kind_of(streamed, **bound, start_seconds=0.152) == "long"
    with pytest.raises(DecodeError, match="longer than max_file_seconds"):
        probe(streamed, max_file_seconds=just - 1e-2)
    assert decode(data, sample_rate=48_000, max_file_seconds=0.16).size == whole.size
