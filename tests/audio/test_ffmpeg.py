"""m4a, aac and wma through PyAV (extra ``av``): lengths, seeks, what is refused, what is said."""

import io
from pathlib import Path

import numpy as np
import pytest

from bat.audio import ffmpeg
from bat.audio.decode import DecodeError, decode, probe
from bat.data.files import index_files
from bat.data.stream import ClipDataset
from bat.data.windows import cut_into_windows
from bat.tasks.base import Row

RATE, SECONDS = 44_100, 7.0
KINDS = {"m4a": ("ipod", "aac"), "aac": ("adts", "aac"), "wma": ("asf", "wmav2")}
KINDS["mka"] = ("matroska", "aac")
CLOCK = {"wma": 60, "mka": 60}
"""Samples by which a position may be off: containers with a clock of milliseconds."""


def encoded(kind: str, seconds: float = SECONDS, channels: int = 1) -> bytes:
    """A tone whose pitch rises with time, so that a segment says where it lies."""
    av = pytest.importorskip("av")
    container, codec = KINDS[kind]
    t = np.arange(round(seconds * RATE)) / RATE
    wave = (0.3 * np.sin(2 * np.pi * (200 * t + 100 * t**2))).astype(np.float32)
    buffer = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=RATE, layout=layout, bit_rate=256_000)
        for at in range(0, len(wave), 2048):
            part = np.repeat(wave[None, at : at + 2048], channels, 0)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", layout)
            frame.sample_rate, frame.pts = RATE, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_decode__segments_are_those_of_the_whole_file(kind: str, channels: int) -> None:
    data = encoded(kind, channels=channels)
    info = probe(data)
    assert (info.sample_rate, info.channels, info.codec) == (RATE, channels, kind)
    assert abs(info.frames / RATE - SECONDS) < 0.2
    whole = decode(data, sample_rate=RATE, expected_frames=info.frames, expected_rate=RATE)
    assert abs(len(whole) - info.frames) <= ffmpeg.SLACK_FRAMES
    assert 0.2 < np.abs(whole).max() < 0.5
    for start in (0.0, 0.3, 2.0, 4.7):
        part = decode(data, sample_rate=RATE, start_seconds=start, max_seconds=1.0)
        assert len(part) == RATE
        near = CLOCK.get(kind, 0) if start else 0
        first = round(start * RATE)
        off = [
            np.abs(part[:4_000] - whole[first + lag :][:4_000]).max()
            for lag in range(-near, near + 1)
        ]
        assert min(off) < 2e-3, (start, min(off))
        assert np.abs(part[:4_000] - whole[first + 200 :][:4_000]).max() > 0.05
    assert len(decode(data, sample_rate=16_000, max_seconds=2.0)) == 32_000


@pytest.mark.parametrize("kind", ["m4a", "wma"])
def test_windows__of_a_long_file_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(encoded(kind, 13.0))
    index, left_out = index_files([Row(path, "x", ())], None, windows=True)
    assert not left_out
    cut_into_windows(index, 2.0)
    dataset = ClipDataset(index, sample_rate=16_000, clip_seconds=2.0)
    batch = dataset.batch([(i, i) for i in range(len(index))])
    assert batch.skipped == []
    assert len(batch.keys) == len(index) == 7
    crossings = (batch.waves[:, 1:] * batch.waves[:, :-1] < 0).sum(1)
    assert (crossings.diff() > 100).all()  # the pitch rises from window to window


def test_open__other_files_stay_corrupt_and_are_never_given_to_ffmpeg() -> None:
    pytest.importorskip("av")
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"
    for data in (playlist, b"ffconcat version 1.0\nfile x.wav\n", b"RIFF\0\0\0\0nonsense", b""):
        assert ffmpeg.container_of(data[:16]) is None
        with pytest.raises(DecodeError) as caught:
            probe(data)
        assert caught.value.kind == "corrupt"
    data = encoded("m4a")
    for cut in (data[:40], data[: len(data) // 2], b"\0\0\0\x18ftypM4A " + b"\0" * 100):
        with pytest.raises(DecodeError):
            decode(cut, sample_rate=RATE, expected_frames=probe(data).frames)


def test_files__without_pyav_name_the_remedy_and_are_read_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "a.m4a", tmp_path / "b.m4a"
    good.write_bytes(encoded("m4a", 1.0) if ffmpeg.has_av() else b"\0\0\0\x18ftypM4A ")
    bad.write_bytes(b"not audio")
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    wav = tmp_path / "d.wav"
    import soundfile

    soundfile.write(wav, np.zeros(800), 8_000)
    rows = [Row(path, path.stem, ()) for path in (good, bad, wav)]
    cache = tmp_path / "cache.json"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        _, left_out = index_files(rows, None, cache=cache)
        assert [entry.key for entry in left_out] == ["a", "b"]
        assert all("bat-audio[av]" in entry.reason for entry in left_out)
    if ffmpeg.has_av():
        _, left_out = index_files(rows, None, cache=cache)
        assert [entry.key for entry in left_out] == ["b"]
        assert "corrupt" in left_out[0].reason
