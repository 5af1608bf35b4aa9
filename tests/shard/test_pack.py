"""Rows become clips: cut, encoded, mixed, left out; and the manifest counts them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bat.audio.decode import decode, decode_channels, probe
from bat.data.index import open_index
from bat.errors import UserError
from bat.shard import pack as pack_module
from bat.shard.pack import Packed, Recipe, pack, works_of
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.shard.files import RATE, clips, recording, write_tar


def grid_noise(seconds: float, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """Noise that 16 bits hold exactly, (S,) or (S, channels)."""
    wave = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 0.1
    grid = (np.rint(wave * 32768) / 32768).astype(np.float32)
    return grid if channels > 1 else grid[:, 0]


def in_a_tar(row: Row) -> Row:
    """The same file, as a member of a tar."""
    data = row.path.read_bytes()
    path = write_tar(row.path.with_suffix(".tar"), {"x": data})
    return replace(row, path=path, span=(512, len(data)), codec=row.suffix)


def damaged(row: Row, begin: float, end: float) -> Row:
    """The same row, its file overwritten by zeros between two fractions of its bytes."""
    data = bytearray(row.path.read_bytes())
    first, last = round(len(data) * begin), round(len(data) * end)
    data[first:last] = bytes(last - first)
    row.path.write_bytes(data)
    return row


def claiming(path: Path, wave: np.ndarray, frames: int) -> Row:
    """A FLAC whose header claims ``frames``."""
    row = recording(path, wave)
    data = bytearray(path.read_bytes())
    rate_to_length = int.from_bytes(data[18:26], "big")  # RFC 9639: 20 + 3 + 5 + 36 bits
    data[18:26] = (rate_to_length >> 36 << 36 | frames).to_bytes(8, "big")
    path.write_bytes(data)
    assert probe(path).frames == frames
    return row


@pytest.mark.parametrize("inside", [False, True])
def test_pack__long_recording_becomes_pieces_and_a_short_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 1.0)  # two pieces a chunk
    wave = grid_noise(2.7)
    long = recording(tmp_path / "in/long.flac", wave, start_seconds=30.0)
    short = recording(tmp_path / "in/short.flac", grid_noise(0.1))
    nearly = recording(tmp_path / "in/nearly.flac", grid_noise(0.505))  # within 2 %: stays whole
    rows = [in_a_tar(row) if inside else row for row in (long, short, nearly)]
    works = works_of(rows[0], Recipe(clip_seconds=0.5))
    assert [(w.first, w.stop) for w in works] == [(0, 2), (2, 4), (4, 6)]
    manifest = write_shards(rows, tmp_path / "s", clip_seconds=0.5)
    found = clips(tmp_path / "s")
    assert list(found) == [*(f"long_{k:05d}" for k in range(5)), "short", "nearly"]
    for k in range(5):
        data, meta = found[f"long_{k:05d}"]
        part = wave[k * 8000 : (k + 1) * 8000]
        np.testing.assert_array_equal(decode(data, sample_rate=RATE), part)
        assert probe(data).codec == "flac"
        assert (meta["num_samples"], meta["start_seconds"]) == (8000, 30.0 + 0.5 * k)
        assert (meta["id"], meta["label"]) == (f"long_{k:05d}", ["x"])
    assert found["short"][0] == short.path.read_bytes()
    assert found["nearly"][0] == nearly.path.read_bytes()
    file = "long.tar/long" if inside else "long.flac"
    why = "brief: the last 0.2 s of the recording, less than 0.25"
    assert manifest.left_out == [{"key": "long_00005", "file": file, "reason": why}]
    assert (manifest.clips, manifest.label_counts) == (7, [7])
    assert manifest.seconds == pytest.approx(2.5 + 0.1 + 0.505, abs=2e-3)


def test_pack__min_seconds_decides_on_rests_and_on_whole_clips(tmp_path: Path) -> None:
    rows = [
        recording(tmp_path / "in/long.flac", grid_noise(1.2)),
        recording(tmp_path / "in/short.flac", grid_noise(0.1)),
    ]
    write_shards(rows, tmp_path / "all", clip_seconds=0.5, min_seconds=0.0)
    assert list(clips(tmp_path / "all")) == ["long_00000", "long_00001", "long_00002", "short"]
    some = write_shards(rows, tmp_path / "some", clip_seconds=0.5, min_seconds=0.2)
    assert list(clips(tmp_path / "some")) == ["long_00000", "long_00001", "long_00002"]
    assert [(e["key"], e["reason"].split(":")[0]) for e in some.left_out] == [("short", "brief")]
    with pytest.raises(UserError, match=r"none of the 2 clips can be read.*brief"):
        write_shards(rows, tmp_path / "none", min_seconds=1.3)


def test_pack__pieces_are_resampled_as_one_recording(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100 * 2) / 44_100)
    row = recording(tmp_path / "in/tone.wav", tone, rate=44_100)
    write_shards([row], tmp_path / "s", clip_seconds=0.5, sample_rate=RATE, codec="wav")
    found = clips(tmp_path / "s").values()
    joined = np.concatenate([decode(data, sample_rate=RATE) for data, _ in found])
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE * 2) / RATE)
    assert len(joined) == len(wanted)
    assert np.abs(joined - wanted)[500:-500].max() < 1e-3  # no seam


@pytest.mark.parametrize(
    ("begin", "end", "least", "most", "kept"),
    [
        (0.5, 0.502, 1, 3, {"r_00000", "r_00011", "r_00018", "r_00029"}),
        (2 / 6, 4 / 6, 9, 13, {"r_00000", "r_00007", "r_00022", "r_00029"}),  # whole chunks
        (0.5, 1.0, 14, 16, {"r_00000", "r_00013"}),  # to the end
    ],
)
def test_pack__damage_costs_the_pieces_it_is_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: float,
    end: float,
    least: int,
    most: int,
    kept: set[str],
) -> None:
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 0.4)
    row = damaged(recording(tmp_path / "in/r.flac", grid_noise(6.0)), begin, end)
    manifest = write_shards([row], tmp_path / "s", clip_seconds=0.2)
    assert kept <= set(clips(tmp_path / "s"))
    assert least <= len(manifest.left_out) <= most
    assert manifest.clips + len(manifest.left_out) == 30
    kinds = {entry["reason"].split(":")[0] for entry in manifest.left_out}
    assert kinds <= {"corrupt", "truncated"}


@pytest.mark.parametrize("clip_seconds", [None, 10.0])
def test_pack__header_that_claims_months_is_one_entry(
    tmp_path: Path, clip_seconds: float | None
) -> None:
    row = claiming(tmp_path / "in/forged.flac", grid_noise(1.0), 2**36 - 1)
    good = recording(tmp_path / "in/good.flac", grid_noise(0.1))
    manifest = write_shards([row, good], tmp_path / "s", clip_seconds=clip_seconds)
    (entry,) = manifest.left_out
    assert (entry["key"], entry["reason"][:6], manifest.clips) == ("forged", "long: ", 1)


def test_pack__two_hours_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(40):
            file.write(np.zeros(8000 * 180, np.int16))
    recipe = Recipe(clip_seconds=60.0)
    tracemalloc.start()
    try:
        works = list(works_of(Row(path, "s", ()), recipe))
        (clip,) = pack(works[-1], recipe=recipe)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(works) == 120
    assert isinstance(clip, Packed)
    assert (clip.id, clip.frames) == ("s_00119", 480_000)
    assert peak < 16 * 2**20  # its samples as float32 are 230 MB


@pytest.mark.parametrize("told", [True, False])
def test_pack__more_than_an_hour_is_kept_whole_or_cut_and_not_encoded_whole(
    tmp_path: Path, told: bool
) -> None:
    row = recording(tmp_path / "in/long.flac", np.zeros(4_000_000, np.float32), 1_000)
    data = row.path.read_bytes()
    if not told:  # the header does not give the length
        data = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
        row.path.write_bytes(data)
    manifest = write_shards([row], tmp_path / "s")
    assert manifest.left_out == []
    audio, meta = clips(tmp_path / "s")["long"]
    assert (audio, meta["num_samples"]) == (data, 4_000_000)
    with pytest.raises(UserError, match=r"4000 s, and 3600 are .* one piece: give --clip-seconds"):
        write_shards([row], tmp_path / "other", codec="wav")
    assert write_shards([row], tmp_path / "cut", codec="wav", clip_seconds=1000).clips == 4


def test_pack__damage_after_the_first_hour_is_seen(tmp_path: Path) -> None:
    row = recording(tmp_path / "in/long.flac", grid_noise(4_000, rate=1_000), 1_000)
    with pytest.raises(UserError, match="corrupt: damaged or truncated audio"):
        write_shards([damaged(row, 0.975, 0.976)], tmp_path / "s")


@pytest.mark.parametrize(
    ("codec", "channels", "kept", "count"),
    [
        ("keep", None, True, 2),
        ("keep", "keep", True, 2),
        ("keep", "mono", False, 1),
        ("flac", None, False, 1),
        ("flac", "keep", True, 2),
        ("wav", "keep", False, 2),
        ("opus", "keep", False, 2),
        ("opus", "mono", False, 1),
    ],
)
def test_pack__codec_and_channels(
    tmp_path: Path, codec: Any, channels: Any, kept: bool, count: int
) -> None:
    wave = grid_noise(0.5, channels=2)
    row = recording(tmp_path / "in/a.flac", wave)
    write_shards([row], tmp_path / "s", codec=codec, channels=channels)
    data, meta = clips(tmp_path / "s")["a"]
    info = probe(data)
    assert (data == row.path.read_bytes()) == kept
    assert info.channels == count
    assert info.codec == ("flac" if codec == "keep" else codec)
    assert (meta["num_samples"], meta["sample_rate"]) == (8000, RATE)
    if codec == "wav":
        np.testing.assert_array_equal(decode_channels(data, sample_rate=RATE), wave)


def test_pack__pieces_keep_their_channels(tmp_path: Path) -> None:
    wave = grid_noise(1.0, channels=2)
    row = recording(tmp_path / "in/a.wav", wave)
    write_shards([row], tmp_path / "s", channels="keep", clip_seconds=0.5)
    second = clips(tmp_path / "s")["a_00001"][0]
    np.testing.assert_array_equal(decode_channels(second, sample_rate=RATE), wave[8000:])


@pytest.mark.parametrize("codec", ["keep", "flac", "wav", "ogg"])
def test_pack__sample_rate(tmp_path: Path, codec: Any) -> None:
    rows = [
        recording(tmp_path / "in/a.wav", grid_noise(1.0, rate=44_100), 44_100),
        recording(tmp_path / "in/b.wav", grid_noise(1.0)),
    ]
    write_shards(rows, tmp_path / "s", codec=codec, sample_rate=RATE)
    index = open_index(tmp_path / "s")
    assert index.rate.tolist() == [RATE, RATE]
    assert index.frames.tolist() == [16_000, 16_000]
    codecs = [probe(index.read(i).data).codec for i in range(2)]
    assert codecs == (["flac", "wav"] if codec == "keep" else [codec, codec])
    assert (index.read(1).data == rows[1].path.read_bytes()) == (codec in ("keep", "wav"))


def test_pack__opus_wants_a_rate_it_has(tmp_path: Path) -> None:
    rows = [recording(tmp_path / "in/a.flac", grid_noise(0.2, rate=44_100), rate=44_100)]
    with pytest.raises(UserError, match=r"a.flac: Opus has no 44100 Hz.*sample_rate=48000"):
        write_shards(rows, tmp_path / "s", codec="opus")
    assert not (tmp_path / "s").exists()
    write_shards(rows, tmp_path / "s", codec="opus", sample_rate=48_000)
    assert open_index(tmp_path / "s").rate.tolist() == [48_000]


def test_pack__channels_that_a_codec_cannot_hold_are_left_out(tmp_path: Path) -> None:
    rows = [
        recording(tmp_path / "in/many.wav", grid_noise(0.1, channels=9)),
        recording(tmp_path / "in/one.wav", grid_noise(0.1)),
    ]
    manifest = write_shards(rows, tmp_path / "s", codec="flac", channels="keep")
    assert list(clips(tmp_path / "s")) == ["one"]
    assert manifest.left_out[0]["reason"].startswith("unencodable: flac cannot hold 9 channels")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codec": "mp3"}, "codec 'mp3': one of keep, flac"),
        ({"codec": "opus", "sample_rate": 44_100}, "Opus has no 44100 Hz"),
        ({"channels": "stereo"}, "channels 'stereo': mono or keep"),
        ({"sample_rate": 16}, "sample_rate=16: in Hz"),
        ({"clip_seconds": 0.0}, "clip_seconds=0.0"),
        ({"min_seconds": -1.0}, "min_seconds=-1.0"),
        ({"clip_seconds": 1.0, "min_seconds": 2.0}, "min_seconds=2.0: 0 to 1"),
    ],
)
def test_recipe__impossible_settings_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Recipe(**options)
