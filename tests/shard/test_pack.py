"""What a row becomes: cut, encoded, mixed, left out; and what the manifest counts."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import decode, decode_channels, encode, probe
from bat.data.index import open_index
from bat.errors import UserError
from bat.shard import pack as pack_module
from bat.shard.pack import Packed, Recipe, works_of
from bat.shard.write import write_shards
from bat.tasks.base import Row

RATE = 16_000


def noise(seconds: float, channels: int = 1, rate: int = RATE) -> np.ndarray:
    wave = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 0.1
    grid = (np.rint(wave * 32768) / 32768).astype(np.float32)
    return grid if channels > 1 else grid[:, 0]


def recording(path: Path, wave: np.ndarray, rate: int = RATE, **more: Any) -> Row:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(wave, sample_rate=rate, codec=path.suffix[1:]))  # type: ignore[arg-type]
    return Row(path, path.stem, **{"labels": ("x",), **more})


def clips(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """``{key: (audio, JSON)}`` in order, read as any tar."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                kind = "json" if suffix == "json" else "audio"
                found.setdefault(key, {})[kind] = file.read()
    return {key: (parts["audio"], json.loads(parts["json"])) for key, parts in found.items()}


def in_a_tar(row: Row) -> Row:
    """The same file, as a member of a tar."""
    data, path = row.path.read_bytes(), row.path.with_suffix(".tar")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return replace(row, path=path, span=(512, len(data)), codec=row.suffix)


@pytest.mark.parametrize("inside", [False, True])
def test_a_long_recording_becomes_pieces_and_a_short_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 1.0)  # two pieces a chunk
    wave = noise(2.7)
    long = recording(tmp_path / "in/long.flac", wave, start_seconds=30.0)
    short = recording(tmp_path / "in/short.flac", noise(0.1))
    nearly = recording(tmp_path / "in/nearly.flac", noise(0.505))  # within 2 %: stays whole
    rows = [in_a_tar(row) if inside else row for row in (long, short, nearly)]
    assert [(w.first, w.stop) for w in works_of(rows[0], Recipe(clip_seconds=0.5))] == [
        (0, 2),
        (2, 4),
        (4, 6),
    ]
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


@pytest.mark.filterwarnings("error")
def test_progress_of_one_long_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack_module, "CHUNK_SECONDS", 0.1)
    row = recording(tmp_path / "in/long.flac", noise(0.9))
    write_shards([row], tmp_path / "s", clip_seconds=0.05, progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown


def test_min_seconds_decides_on_rests_and_on_whole_clips(tmp_path: Path) -> None:
    rows = [
        recording(tmp_path / "in/long.flac", noise(1.2)),
        recording(tmp_path / "in/short.flac", noise(0.1)),
    ]
    write_shards(rows, tmp_path / "all", clip_seconds=0.5, min_seconds=0.0)
    assert list(clips(tmp_path / "all")) == ["long_00000", "long_00001", "long_00002", "short"]
    some = write_shards(rows, tmp_path / "some", clip_seconds=0.5, min_seconds=0.2)
    assert list(clips(tmp_path / "some")) == ["long_00000", "long_00001", "long_00002"]
    assert [(e["key"], e["reason"].split(":")[0]) for e in some.left_out] == [("short", "brief")]
    with pytest.raises(UserError, match=r"none of the 2 clips can be read.*brief"):
        write_shards(rows, tmp_path / "none", min_seconds=1.3)


def test_pieces_are_resampled_as_one_recording(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100 * 2) / 44_100)
    row = recording(tmp_path / "in/tone.wav", tone, rate=44_100)
    write_shards([row], tmp_path / "s", clip_seconds=0.5, sample_rate=RATE, codec="wav")
    joined = np.concatenate(
        [decode(data, sample_rate=RATE) for data, _ in clips(tmp_path / "s").values()]
    )
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE * 2) / RATE)
    assert len(joined) == len(wanted)
    assert np.abs(joined - wanted)[500:-500].max() < 1e-3  # no seam


def test_damage_costs_the_pieces_it_is_in(tmp_path: Path) -> None:
    row = recording(tmp_path / "in/r.flac", noise(3.0))
    data = bytearray(row.path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)  # within the frames about 1.5 s
    row.path.write_bytes(data)
    manifest = write_shards([row], tmp_path / "s", clip_seconds=0.2)
    lost = [entry["key"] for entry in manifest.left_out]
    assert 1 <= len(lost) <= 3
    assert {"r_00007"} <= set(lost) | {"r_00006", "r_00008"}
    assert manifest.clips == 15 - len(lost)
    assert all(entry["reason"].startswith("corrupt") for entry in manifest.left_out)


def test_a_long_recording_is_not_held_in_memory(tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "in/day.wav"
    path.parent.mkdir()
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_U8") as file:
        for _ in range(4):
            file.write(np.zeros(8000 * 3600, np.float32) + 0.1)
    row = Row(path, "day", ())
    recipe = Recipe(clip_seconds=60.0)
    tracemalloc.start()
    try:
        works = list(works_of(row, recipe))
        outcomes = pack_module.pack(works[200], recipe=recipe)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(works) == 240
    assert isinstance(outcomes[0], Packed)
    assert (outcomes[0].id, outcomes[0].frames) == ("day_00200", 480_000)
    assert peak < 16 * 2**20  # the file has 115 MB, its samples as float32 460 MB


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
def test_channels(tmp_path: Path, codec: Any, channels: Any, kept: bool, count: int) -> None:
    wave = noise(0.5, channels=2)
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


def test_pieces_keep_their_channels(tmp_path: Path) -> None:
    wave = noise(1.0, channels=2)
    row = recording(tmp_path / "in/a.wav", wave)
    write_shards([row], tmp_path / "s", channels="keep", clip_seconds=0.5)
    second = clips(tmp_path / "s")["a_00001"][0]
    np.testing.assert_array_equal(decode_channels(second, sample_rate=RATE), wave[8000:])


def test_opus_wants_a_rate_it_has(tmp_path: Path) -> None:
    rows = [recording(tmp_path / "in/a.flac", noise(0.2, rate=44_100), rate=44_100)]
    with pytest.raises(UserError, match=r"a.flac: Opus has no 44100 Hz.*sample_rate=48000"):
        write_shards(rows, tmp_path / "s", codec="opus")
    assert not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="Opus has no 44100 Hz"):
        write_shards(rows, tmp_path / "s", codec="opus", sample_rate=44_100)
    write_shards(rows, tmp_path / "s", codec="opus", sample_rate=48_000)
    assert open_index(tmp_path / "s").rate.tolist() == [48_000]


def test_what_a_codec_cannot_hold_is_left_out(tmp_path: Path) -> None:
    rows = [
        recording(tmp_path / "in/many.wav", noise(0.1, channels=9)),
        recording(tmp_path / "in/one.wav", noise(0.1)),
    ]
    manifest = write_shards(rows, tmp_path / "s", codec="flac", channels="keep")
    assert list(clips(tmp_path / "s")) == ["one"]
    assert manifest.left_out[0]["reason"].startswith("unencodable: flac cannot hold 9 channels")


def test_aiff_is_kept_as_it_is(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.aif", noise(0.1), RATE, format="AIFF")
    write_shards([Row(tmp_path / "a.aif", "a", ())], tmp_path / "s")
    assert clips(tmp_path / "s")["a"][0] == (tmp_path / "a.aif").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": "stereo"}, "channels 'stereo': mono or keep"),
        ({"sample_rate": 16}, "sample_rate=16: in Hz"),
        ({"clip_seconds": 0.0}, "clip_seconds=0.0"),
        ({"min_seconds": -1.0}, "min_seconds=-1.0"),
        ({"clip_seconds": 1.0, "min_seconds": 2.0}, "min_seconds=2.0: 0 to 1"),
        ({"jobs": 0}, "jobs=0"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    row = recording(tmp_path / "in/a.wav", noise(0.1))
    with pytest.raises(UserError, match=says):
        write_shards([row], tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_the_tar_is_what_webdataset_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    rows = [
        recording(tmp_path / f"in/{name}", noise(0.1 + 0.01 * len(name)))
        for name in ("a.wav", "bb.flac", "k" * 78 + ".ogg")
    ]
    write_shards(rows, tmp_path / "s")
    theirs = io.BytesIO()
    writer = webdataset.TarWriter(
        theirs, encoder=False, compress=False, mtime=0, user="bat", group="bat", mode=0o644
    )
    with tarfile.open(tmp_path / "s/shard-00000.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    for row in rows:
        names = [f"{row.key}.{suffix}" for suffix in (row.suffix, "json")]
        writer.write({"__key__": row.key, **{n.split(".")[1]: content[n] for n in names}})
    writer.close()
    assert theirs.getvalue() == (tmp_path / "s/shard-00000.tar").read_bytes()
