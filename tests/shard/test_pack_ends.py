"""Recordings that end before their header says so, and damage that is not an end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import probe
from bat.errors import UserError
from bat.shard import pack as pack_module
from bat.shard.pack import Packed, Recipe, works_of
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.shard.test_pack import clips, noise, recording


def claiming(path: Path, wave: np.ndarray, frames: int) -> Row:
    """A FLAC whose header claims ``frames``."""
    row = recording(path, wave)
    data = bytearray(path.read_bytes())
    rate_to_length = int.from_bytes(data[18:26], "big")  # RFC 9639: 20 + 3 + 5 + 36 bits
    data[18:26] = (rate_to_length >> 36 << 36 | frames).to_bytes(8, "big")
    path.write_bytes(data)
    assert probe(path).frames == frames
    return row


@pytest.mark.parametrize("clip_seconds", [None, 10.0])
def test_a_length_that_the_file_cannot_hold_is_one_entry(
    tmp_path: Path, clip_seconds: float | None
) -> None:
    row = claiming(tmp_path / "in/forged.flac", noise(1.0), 2**36 - 1)
    good = recording(tmp_path / "in/good.flac", noise(0.1))
    assert len(list(works_of(row, Recipe(clip_seconds=10.0)))) == 1
    manifest = write_shards([row, good], tmp_path / "s", clip_seconds=clip_seconds)
    (entry,) = manifest.left_out
    size = row.path.stat().st_size
    why = f"corrupt: its header claims {2**36 - 1} frames, more than {size} bytes can hold"
    assert (entry["key"], entry["reason"], manifest.clips) == ("forged", why, 1)


def test_damage_of_a_whole_chunk_is_not_taken_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 0.4)
    row = recording(tmp_path / "in/r.flac", noise(6.0))
    data = bytearray(row.path.read_bytes())
    data[len(data) * 2 // 6 : len(data) * 4 // 6] = bytes(len(data) * 4 // 6 - len(data) * 2 // 6)
    row.path.write_bytes(data)
    manifest = write_shards([row], tmp_path / "s", clip_seconds=0.2)
    found = list(clips(tmp_path / "s"))
    assert {"r_00000", "r_00007", "r_00022", "r_00029"} <= set(found)
    assert len(found) + len(manifest.left_out) == 30  # one by one
    assert 9 <= len(manifest.left_out) <= 13


def test_hours_of_silence_are_no_forgery(tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "in/silence.flac"
    path.parent.mkdir()
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(40):
            file.write(np.zeros(8000 * 180, np.int16))
    assert 8000 * 7200 / path.stat().st_size > 250  # frames a byte
    recipe = Recipe(clip_seconds=60.0)
    works = list(works_of(Row(path, "s", ()), recipe))
    assert len(works) == 120
    (last,) = pack_module.pack(works[-1], recipe=recipe)
    assert isinstance(last, Packed)
    assert last.frames == 480_000


@pytest.mark.parametrize("told", [True, False])
def test_a_recording_of_more_than_an_hour_is_kept_whole(tmp_path: Path, told: bool) -> None:
    """As ``bat-shard recordings/ shards/`` takes it; its header may not tell how long it is."""
    row = recording(tmp_path / "in/long.flac", np.zeros(4_000_000, np.float32), 1_000)
    data = row.path.read_bytes()
    if not told:
        data = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
        row.path.write_bytes(data)
    manifest = write_shards([row], tmp_path / "s")
    assert manifest.left_out == []
    audio, meta = clips(tmp_path / "s")["long"]
    assert (audio, meta["num_samples"]) == (data, 4_000_000)
    with pytest.raises(UserError, match=r"4000 s, and 3600 are .* one piece: give --clip-seconds"):
        write_shards([row], tmp_path / "other", codec="wav")
    manifest = write_shards([row], tmp_path / "cut", codec="wav", clip_seconds=1000)
    assert manifest.clips == 4


def test_damage_behind_the_first_hour_is_seen(tmp_path: Path) -> None:
    row = recording(tmp_path / "in/long.flac", noise(4_000, rate=1_000), 1_000)
    data = bytearray(row.path.read_bytes())
    at = len(data) * 39 // 40
    data[at : at + 2000] = bytes(2000)
    row.path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt: damaged audio"):
        write_shards([row], tmp_path / "s")
