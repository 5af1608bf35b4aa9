"""Files whose end is missing: named by ``decode``, ``probe`` and every command; streams are not."""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.audio.decode import DecodeError, decode, probe
from bat.audio.encode import encode
from bat.audio.part import FilePart
from bat.encoders.bat import BAT
from bat.types import Grid
from bat.weights import export
from tests.audio.test_decode import file_bytes, noise

RATE, SAMPLES = 16_000, 100_000
CONTAINERS = {
    "wav": ("WAV", "PCM_16"), "wav24": ("WAV", "PCM_24"), "wavex": ("WAVEX", "FLOAT"),
    "rf64": ("RF64", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"),
    "w64": ("W64", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"),
}  # fmt: skip


def made(name: str) -> bytes:
    return file_bytes(noise(SAMPLES, 1), RATE, *CONTAINERS[name])


@pytest.mark.parametrize("name", CONTAINERS)
def test_truncated__every_container_is_named_from_bytes_path_and_part(
    name: str, tmp_path: Path
) -> None:
    data = made(name)
    assert len(decode(data, sample_rate=RATE)) == probe(data).frames == SAMPLES
    for share in (0.98, 0.5):
        if name == "mp3" and share > 0.9:
            continue  # within the slack of its header
        cut = data[: int(share * len(data))]
        path = tmp_path / "cut"
        path.write_bytes(cut)
        (tmp_path / "holds").write_bytes(b"before" + cut + b"after")
        for source in (cut, path, FilePart(tmp_path / "holds", 6, len(cut))):
            with pytest.raises(DecodeError) as whole:
                decode(source, sample_rate=RATE)
            assert "truncated" in (whole.value.kind if name != "flac" else str(whole.value))
            if name not in ("mp3", "flac"):  # their ends are read by decoding alone
                with pytest.raises(DecodeError, match=r"states|is cut") as header:
                    probe(source)
                assert header.value.kind == "truncated"


def with_sizes(data: bytes, riff: int, audio: int) -> bytes:
    """The WAV with other sizes of its RIFF and data chunks."""
    forged, at = bytearray(data), data.index(b"data")
    struct.pack_into("<I", forged, 4, riff)
    struct.pack_into("<I", forged, at + 4, audio)
    return bytes(forged)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000])
def test_truncated__a_stream_of_unknown_length_is_whole(size: int) -> None:
    forged = with_sizes(made("wav"), size, size)
    assert len(decode(forged, sample_rate=RATE)) == probe(forged).frames == SAMPLES


def test_truncated__sizes_that_count_a_header_or_lack_one_are_whole() -> None:
    data = made("wav")
    for riff, audio in ((len(data), len(data)), (10**6, 2 * SAMPLES), (2 * SAMPLES, 2 * SAMPLES)):
        assert probe(with_sizes(data, riff, audio)).frames == SAMPLES
    claimed = with_sizes(data, 10**6, 10**6)
    with pytest.raises(DecodeError, match="1000000 bytes of audio, the file holds 200000"):
        probe(claimed)
    # an index knows better
    assert len(decode(claimed, sample_rate=RATE, expected_frames=SAMPLES)) == SAMPLES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six tones of each of two classes, one of them cut; a CSV lists them with folds."""
    lines = ["path,label,fold"]
    (tmp_path / "audio").mkdir()
    for i in range(12):
        wave = 0.3 * np.sin(2 * np.pi * (300 + 900 * (i % 2)) * np.arange(24_000) / RATE)
        data = encode(wave.astype(np.float32), sample_rate=RATE, codec="wav")
        (tmp_path / f"audio/{i:02d}.wav").write_bytes(data[: 20_000 if i == 5 else None])
        lines.append(f"audio/{i:02d}.wav,{'low' if i % 2 else 'high'},{1 + i // 6}")
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


COMMANDS = {
    "embed": "{csv} --checkpoint {encoder} --out {out}",
    "shard": "{csv} {out}",
    "probe": "data.csv={csv} checkpoint={encoder} out={out} hardware=cpu",
    "finetune": "data.csv={csv} checkpoint={encoder} out={out} hardware=cpu",
    "pretrain": "recipe=toy task=folder data.root={audio} out={out} hardware=cpu data.workers=0",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_truncated__every_command_names_and_counts_it(
    command: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of twelve clips is more than data.max_bad, so that nothing is trained."""
    torch.manual_seed(0)
    model = BAT(width=16, depth=1, heads=2, grid=Grid(10, 8))
    made = {"backbone": "bat", "encoder": model.config(), "meta": {}}
    places = {"csv": folder / "clips.csv", "audio": folder / "audio", "out": folder / "out"}
    places["encoder"] = export(folder / "e", weights={"student": model.state_dict()}, **made)
    words = COMMANDS[command].format(**places).split()
    code = importlib.import_module(f"bat.cli.{command}").main(words)
    said = "".join(capfd.readouterr())
    assert code == (0 if command in ("embed", "shard") else 2)
    written = [path for kind in ("json", "csv") for path in (folder / "out").rglob(f"*.{kind}")]
    listed = [path.read_text() for path in written]
    assert any("05.wav" in text and "truncated" in text for text in [said, *listed])
    assert re.search(r"\b1 (of|left out|files)|left out +1 ", said), said
