"""Decoding: what comes back, what is refused, and with which word."""

from __future__ import annotations

import ctypes
import functools
import io
import math
import pickle
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from bat.audio import reader as module
from bat.audio.decode import (
    AudioInfo,
    DecodeError,
    decode,
    decode_channels,
    decode_into,
    probe,
)
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


def sample(codec: str, frames: int = 66150, channels: int = 2) -> bytes:
    container, subtype, rate = FORMATS[codec]
    return file_bytes(noise(frames, channels), rate, container, subtype)


def with_flac_total(data: bytes, total: int) -> bytes:
    """The FLAC with another total in its STREAMINFO (36 bits, from the low half of byte 21)."""
    forged = bytearray(data)
    forged[21] = (forged[21] & 0xF0) | (total >> 32)
    forged[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(forged)


def kind_of(data: bytes, **arguments: object) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, **{"sample_rate": 16000, **arguments})  # type: ignore[arg-type]
    return caught.value.kind


@pytest.mark.parametrize("codec", FORMATS)
def test_every_format_is_read_mixed_and_named(codec: str) -> None:
    data, rate = sample(codec), FORMATS[codec][2]
    assert probe(data) == AudioInfo(66150, rate, 2, codec)
    plain, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    wave = decode(data, sample_rate=rate, expected_frames=66150)
    assert wave.shape == (66150,)
    np.testing.assert_allclose(wave, plain.mean(1), atol=1e-7)


@pytest.mark.parametrize("codec", FORMATS)
def test_segment_is_the_slice_of_the_whole(codec: str) -> None:
    data, rate = sample(codec), FORMATS[codec][2]
    whole = decode(data, sample_rate=rate)
    part = decode(data, sample_rate=rate, start_seconds=0.5, max_seconds=0.25)
    np.testing.assert_allclose(part, whole[rate // 2 : rate // 2 + rate // 4], atol=1e-6)
    rest = decode(data, sample_rate=rate, start_seconds=0.5, max_seconds=100.0)
    assert len(rest) == 66150 - rate // 2


def test_blocks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sample("wav")
    whole = decode(data, sample_rate=44100)
    monkeypatch.setattr(module, "BLOCK_SAMPLES", 1000)
    np.testing.assert_array_equal(decode(data, sample_rate=44100), whole)


def test_resampling_keeps_a_tone_and_removes_what_would_alias() -> None:
    time = np.arange(44100 * 2) / 44100
    tone = file_bytes(0.5 * np.sin(2 * np.pi * 1000 * time), 44100, subtype="FLOAT")
    wave = decode(tone, sample_rate=16000)
    assert wave.shape == (32000,)
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
    assert np.abs(wave - wanted)[1000:-1000].max() < 1e-4
    high = file_bytes(0.5 * np.sin(2 * np.pi * 12000 * time), 44100, subtype="FLOAT")
    assert np.abs(decode(high, sample_rate=16000)[1000:-1000]).max() < 0.5 * 10 ** (-80 / 20)


@pytest.mark.parametrize(("seconds", "samples"), [(10.23, 163680), (0.1, 1600), (1 / 3, 5334)])
def test_max_seconds_in_samples(seconds: float, samples: int) -> None:
    data = file_bytes(np.zeros(16000 * 11, dtype=np.float32), 16000)
    assert len(decode(data, sample_rate=16000, max_seconds=seconds)) == samples


def test_one_sample_is_a_clip() -> None:
    assert decode(file_bytes(np.ones(1) * 0.5, 16000), sample_rate=16000).tolist() == [0.5]
    assert kind_of(file_bytes(np.ones(1), 44100)) == "empty"  # a third of a sample at 16 kHz


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", bytes(5000), b"RIFF" + bytes(99), b"fLaC" + bytes(50), b"ID3" + bytes(500)],
)
def test_junk_is_corrupt(data: bytes) -> None:
    assert kind_of(data) == "corrupt"
    with pytest.raises(DecodeError, match="not a readable audio file"):
        probe(data)


def test_empty() -> None:
    assert kind_of(file_bytes(np.zeros(0, dtype=np.float32), 16000)) == "empty"
    assert kind_of(file_bytes(np.zeros(16000), 16000), start_seconds=1.0) == "empty"


@pytest.mark.parametrize(
    ("bad", "kind"), [(np.nan, "nan"), (np.inf, "nan"), (-np.inf, "nan"), (-1e9, "range")]
)
def test_samples_that_are_no_audio(bad: float, kind: str) -> None:
    wave = np.zeros((1000, 2), dtype=np.float32)
    wave[500, 1] = bad
    data = file_bytes(wave, 16000, subtype="FLOAT")
    assert kind_of(data) == kind
    assert len(decode(data, sample_rate=16000, max_seconds=0.03)) == 480  # before the bad one


@pytest.mark.parametrize("codec", ["wav", "ogg", "opus", "mp3"])
def test_silent_truncation_is_found(codec: str) -> None:
    data, rate = sample(codec, frames=132300), FORMATS[codec][2]
    cut = data[: len(data) // 2]
    if codec != "mp3":  # mp3 keeps its length in the header; the others pass unless one knows
        assert 0 < len(decode(cut, sample_rate=rate)) < 80000
    assert kind_of(cut, sample_rate=rate, expected_frames=132300) == "short"


def test_truncated_flac_is_corrupt() -> None:
    data = sample("flac")
    assert kind_of(data[: len(data) // 2], expected_frames=66150) == "corrupt"


@pytest.mark.parametrize("codec", ["ogg", "opus", "mp3"])
def test_damage_in_the_middle_is_found(codec: str) -> None:
    data = bytearray(sample(codec, frames=132300))
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(1).bytes(2000)
    assert kind_of(bytes(data)) in ("short", "corrupt")


def test_damaged_mp3_files_are_not_commented_on_stderr(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, rng = sample("mp3", frames=132300), np.random.default_rng(1)
    for _ in range(10):
        data = bytearray(whole)
        for place in rng.integers(500, len(data), 30):
            data[place] = rng.integers(256)
        (tmp_path / "x.mp3").write_bytes(data)
        for source in (bytes(data), tmp_path / "x.mp3"):
            with suppress(DecodeError):
                decode(source, sample_rate=16000)
            with suppress(DecodeError):
                decode(source, sample_rate=16000, start_seconds=1.0)
    c = ctypes.CDLL(None)
    c.fputs(b"another library\n", ctypes.c_void_p.in_dll(c, "stderr"))
    print("Python", file=sys.__stderr__, flush=True)
    assert capfd.readouterr().err == "another library\nPython\n"


@pytest.mark.parametrize(("codec", "slack"), [("flac", 0), ("mp3", 3 * 1152)])
def test_expected_frames_slack(codec: str, slack: int) -> None:
    data = sample(codec)
    for off in (-slack, slack):
        assert len(decode(data, sample_rate=44100, expected_frames=66150 + off)) == 66150
    assert kind_of(data, expected_frames=66150 + slack + 1) == "short"
    assert kind_of(data, expected_frames=66150 - slack - 1) == "mismatch"


@pytest.mark.parametrize("total", [2**36 - 1, 10**6])
def test_forged_flac_length_allocates_nothing_and_is_short(total: int) -> None:
    data = with_flac_total(sample("flac", channels=1), total)
    tracemalloc.start()
    try:
        assert kind_of(data, max_file_seconds=math.inf) == "short"
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # bytes; the header says 256 GiB
    finally:
        tracemalloc.stop()
    part = decode(data, sample_rate=44100, max_seconds=0.5, max_file_seconds=math.inf)
    assert len(part) == 22050


def test_flac_without_length_is_read_to_its_end() -> None:
    whole = sample("flac")
    data = with_flac_total(whole, 0)
    assert probe(data).frames == 66150
    wanted = decode(whole, sample_rate=44100)
    np.testing.assert_array_equal(decode(data, sample_rate=44100), wanted)
    part = decode(data, sample_rate=44100, start_seconds=1.0)
    np.testing.assert_array_equal(part, wanted[44100:])
    assert kind_of(data, expected_frames=70000) == "short"


def test_another_rate_than_the_index_knows() -> None:
    data = sample("flac")
    assert len(decode(data, sample_rate=44100, expected_rate=44100)) == 66150
    assert kind_of(data, expected_rate=16000, expected_frames=24000) == "rate"


@pytest.mark.parametrize("total", [66150, 0])  # 0: a FLAC that does not say how long it is
def test_briefer_than_asked(total: int) -> None:
    data = with_flac_total(sample("flac"), total)
    assert len(decode(data, sample_rate=44100, min_seconds=1.5)) == 66150
    assert kind_of(data, min_seconds=1.501) == "brief"
    assert kind_of(data, min_seconds=1.501, start_seconds=1.0) == "brief"
    assert kind_of(data, min_seconds=1.501, expected_frames=88200) == "short"  # it was not so brief
    part = decode(data, sample_rate=44100, min_seconds=1.5, max_seconds=0.5)
    assert len(part) == 22050  # of the whole clip, not of the segment
    assert kind_of(file_bytes(np.zeros(0), 16000), min_seconds=1.0) == "empty"


@pytest.mark.parametrize("codec", FORMATS)
def test_a_path_is_read_as_its_bytes_are(codec: str, tmp_path: Path) -> None:
    data, path = sample(codec), tmp_path / "ü -.x"
    path.write_bytes(data)
    assert probe(path) == probe(data)
    for more in ({}, {"start_seconds": 0.7, "max_seconds": 0.3}):
        np.testing.assert_array_equal(
            decode(path, sample_rate=16000, **more), decode(data, sample_rate=16000, **more)
        )


def test_paths_that_are_no_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b"not audio, and not the standard input")
    assert kind_of(Path("-")) == "corrupt"  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "no.wav", sample_rate=16000)
    with pytest.raises(IsADirectoryError):
        probe(tmp_path)


@pytest.mark.parametrize("rate", [44100, 16000])
def test_channels_are_kept_and_their_mean_is_the_mix(rate: int) -> None:
    data = sample("flac")
    both = decode_channels(data, sample_rate=rate, start_seconds=0.5, max_seconds=0.5)
    assert both.shape == (rate // 2, 2)
    assert (both.dtype, both.flags.c_contiguous) == (np.float32, True)
    mixed = decode(data, sample_rate=rate, start_seconds=0.5, max_seconds=0.5)
    np.testing.assert_allclose(both @ np.float32([0.5, 0.5]), mixed, atol=1e-6)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.1


def test_longer_than_the_bound() -> None:
    data = sample("flac")
    assert kind_of(data, max_decode_seconds=1.0) == "long"
    assert len(decode(data, sample_rate=44100, max_decode_seconds=1.0, max_seconds=1.0)) == 44100
    assert len(decode(data, sample_rate=44100, max_decode_seconds=1.5)) == 66150


@pytest.mark.parametrize("codec", FORMATS)
def test_random_damage_raises_decode_error_or_nothing(codec: str) -> None:
    data, random = sample(codec, frames=8000), np.random.default_rng(3)
    for _ in range(25):
        bad = bytearray(data[: random.integers(1, len(data) + 1)])
        for place in random.integers(0, len(bad), 8):
            bad[place] = random.integers(256)
        try:
            wave = decode(bytes(bad), sample_rate=16000, max_decode_seconds=60)
        except DecodeError:
            continue
        assert np.isfinite(wave).all()
        assert len(wave)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_rate": 0}, "sample_rate=0"),
        ({"start_seconds": -1.0}, "start_seconds=-1"),
        ({"max_seconds": 0.0}, "max_seconds=0"),
        ({"max_decode_seconds": 0.0}, "max_decode_seconds=0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(b"", **{"sample_rate": 16000, **arguments})  # type: ignore[arg-type]


def test_error_survives_pickling() -> None:
    back = pickle.loads(pickle.dumps(DecodeError("short", "3 of 4")))
    assert (back.kind, str(back)) == ("short", "3 of 4")


def test_esc10_clip(esc10: Path) -> None:
    data = (esc10 / "audio" / "1-100032-A.ogg").read_bytes()
    info = probe(data)
    assert info == AudioInfo(info.frames, 44100, 1, "ogg")
    plain, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    wave = decode(data, sample_rate=16000, expected_frames=info.frames)
    np.testing.assert_array_equal(wave, soxr.resample(plain, 44100, 16000, quality="HQ"))


# ---- into a row


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", ["own", 16_000])
@pytest.mark.parametrize("start_seconds", [0.0, 0.3])
def test_into_a_row_is_the_rolled_wave(
    codec: str, channels: int, rate: str | int, start_seconds: float
) -> None:
    data = sample(codec, frames=24_000, channels=channels)
    sample_rate = FORMATS[codec][2] if rate == "own" else int(rate)
    how = {"sample_rate": sample_rate, "start_seconds": start_seconds, "max_seconds": 0.2}
    wave = decode(data, **how)  # type: ignore[arg-type]
    for roll in (0, 1, 777):
        row, asked = np.full(12_000, 7.0, np.float32), []

        def place(samples: int, roll: int = roll, asked: list[int] = asked) -> tuple[int, int]:
            asked.append(samples)
            return 5, roll

        assert decode_into(row, data, place=place, **how) == (5, len(wave))  # type: ignore[arg-type]
        assert asked == [len(wave)]
        np.testing.assert_array_equal(row[5 : 5 + len(wave)], np.roll(wave, roll))
        assert (row[:5] == 7).all()
        assert (row[5 + len(wave) :] == 7).all()


def test_into_a_row_that_is_too_short_the_wave_is_cut_and_damage_is_noticed() -> None:
    data = file_bytes(noise(1_000), 16_000, "FLAC", "PCM_16")
    whole = decode(data, sample_rate=16_000)
    row = np.zeros(600, np.float32)
    assert decode_into(row, data, sample_rate=16_000, place=lambda n: (0, 0)) == (0, 600)
    np.testing.assert_array_equal(row, whole[:600])
    row = np.zeros(2_000, np.float32)
    for spoilt, kind in (
        (data[: len(data) // 2], "corrupt"),
        (file_bytes(np.array([0.1, np.nan]), 16_000, subtype="FLOAT"), "nan"),
        (file_bytes(np.array([0.1, 1e9]), 16_000, subtype="DOUBLE"), "range"),
    ):
        with pytest.raises(DecodeError) as caught:
            decode_into(row, spoilt, sample_rate=16_000, place=lambda n: (0, n // 2))
        assert caught.value.kind == kind
    with pytest.raises(DecodeError, match="but 5000 when it was indexed"):
        decode_into(row, data, sample_rate=16_000, place=lambda n: (0, 0), expected_frames=5_000)


def test_open_files_share_no_callbacks_and_closed_ones_lend_theirs() -> None:
    one, two = sample("flac", channels=1), sample("wav", frames=5_000, channels=1)
    first, second = module.open_reader(one), module.open_reader(two)
    lent = {first._lent, second._lent}
    assert len(lent) == 2
    parts = [first.read(1_000, dtype="float32"), second.read(1_000, dtype="float32")]
    parts += [first.read(1_000, dtype="float32"), second.read(1_000, dtype="float32")]
    for data, heard in ((one, parts[::2]), (two, parts[1::2])):
        whole = decode(data, sample_rate=44_100)
        np.testing.assert_array_equal(np.concatenate(heard), whole[:2_000])
    first.close()
    second.close()
    with module.open_reader(two) as third:
        assert third._lent in lent


def flac_bomb(frames: int) -> bytes:
    """So many frames of silence: 12 bytes each 4,096."""
    return file_bytes(np.zeros(frames, np.float32), 8_000, "FLAC", "PCM_16")


@pytest.mark.parametrize("where", ["decode", "into", "channels", "at a path"])
def test_a_file_of_a_day_is_long_before_anything_is_decoded(
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
    row = np.zeros(8_000, np.float32)
    part = {"sample_rate": 8_000, "start_seconds": 5.0, "max_seconds": 1.0}
    assert len(decode(path, **part, max_file_seconds=86_400.0)) == 8_000  # type: ignore[arg-type]
    monkeypatch.setattr(module.Reader, "read", None)  # whoever reads fails
    data = path if where == "at a path" else flac_bomb(3_601 * 8_000)
    into = functools.partial(decode_into, row, place=lambda n: (0, 0))
    read = {"into": into, "channels": decode_channels}.get(where, decode)
    with pytest.raises(DecodeError, match="longer than max_file_seconds=3600") as caught:
        read(data, **part)
    assert caught.value.kind == "long"


def test_a_file_of_the_greatest_length_is_read() -> None:
    data = flac_bomb(16_000)
    assert len(decode(data, sample_rate=8_000, max_file_seconds=2.0)) == 16_000
    assert kind_of(data, sample_rate=8_000, max_file_seconds=2.0 - 1 / 8_000) == "long"
    with pytest.raises(UserError, match="max_file_seconds=0"):
        decode(data, sample_rate=8_000, max_file_seconds=0)


def test_a_streamed_file_is_read_no_further_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_flac_total(flac_bomb(80_000), 0)  # 10 s, and the header does not say so
    read: list[int] = []
    plain = module.Reader.read

    def counting(self: module.Reader, frames: int, **arguments: object) -> np.ndarray:
        read.append(frames)
        return plain(self, frames, **arguments)

    monkeypatch.setattr(module.Reader, "read", counting)
    assert kind_of(data, sample_rate=8_000, max_file_seconds=4.0) == "long"
    assert read == [32_001]
    assert kind_of(data, sample_rate=8_000, start_seconds=5.0, max_file_seconds=4.0) == "long"
    with pytest.raises(DecodeError, match=r"max_file_seconds=4") as caught:
        probe(data, max_file_seconds=4.0)
    assert caught.value.kind == "long"
    assert sum(read) == 2 * 32_001
    assert probe(data, max_file_seconds=10.0).frames == 80_000
    assert len(decode(data, sample_rate=8_000, max_seconds=1.0, max_file_seconds=4.0)) == 8_000
    assert len(decode(data, sample_rate=8_000, max_file_seconds=10.0)) == 80_000


def test_a_streamed_file_of_many_samples_a_second_is_read_less_far() -> None:
    """Seconds of 8 x 655,350 Hz hold 300 times as many samples as those of audio."""
    rate, frames = 655_350, 100_000
    data = file_bytes(np.zeros((frames, 8), np.float32), rate, "FLAC", "PCM_16")
    streamed = with_flac_total(data, 0)
    just = frames * 8 / module.UNTOLD_HZ  # 2.08 s of the most that audio has; it lasts 0.15 s
    assert probe(streamed, max_file_seconds=just + 1e-3).frames == frames
    whole = decode(streamed, sample_rate=48_000, max_file_seconds=just + 1e-3)
    assert whole.size == frames * 48_000 // rate
    asking: tuple[functools.partial[object], ...] = (
        functools.partial(probe, streamed),
        functools.partial(decode, streamed, sample_rate=48_000),
        functools.partial(decode, streamed, sample_rate=48_000, start_seconds=0.152),
    )
    for ask in asking:
        with pytest.raises(DecodeError, match="less for 5242800 samples a second") as caught:
            ask(max_file_seconds=just - 1e-2)
        assert caught.value.kind == "long"
    assert probe(data, max_file_seconds=0.16).frames == frames  # its header tells: nothing is read
    assert decode(data, sample_rate=48_000, max_file_seconds=0.16).size == whole.size


@pytest.mark.parametrize(("total", "kind"), [(40_000_000, "long"), (20_000_000, "short")])
def test_a_forged_length_is_refused(total: int, kind: str) -> None:
    data = with_flac_total(flac_bomb(80_000), total)
    assert kind_of(data, sample_rate=8_000) == kind
