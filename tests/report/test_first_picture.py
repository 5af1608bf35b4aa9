"""From a folder of 50 files of mixed kinds to pictures, with the commands of README as typed."""

import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from bat.cli import bat, pretrain

README = Path(__file__).parents[2] / "README.md"
COMMAND = "bat-pretrain data.root=recordings/"
QUICK = ["train.steps=3", "train.log_every=1", "log.progress=false", "data.batch=4"]
QUICK += ["model.width=48", "model.depth=2", "model.heads=2", "objective.decoder_depth=1"]
"""What is proposed for two cores (192 wide, 6 blocks, 25 steps of 16 clips) takes minutes there."""


def mixed_clips(root: Path) -> None:
    """Writes 50 files: formats, rates, channels and lengths of all kinds, in nested folders."""
    kinds = [("wav", 16_000, 1), ("wav", 44_100, 2), ("flac", 48_000, 1), ("ogg", 44_100, 1)]
    if "MP3" in soundfile.available_formats():
        kinds.append(("mp3", 44_100, 2))
    for i in range(47):
        suffix, rate, channels = kinds[i % len(kinds)]
        write(root / f"day{i % 3}/site{i % 2}/{i:02d}.{suffix}", 1 + i % 4, rate, channels, i)
    write(root / "short.wav", 0.3, 16_000, 1, 47)
    write(root / "long.wav", 30.0, 44_100, 2, 48)
    (root / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))  # cut short
    (root / "notes.txt").write_text("no audio")


def write(path: Path, seconds: float, rate: int, channels: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(number).standard_normal((len(t), channels))
    tone = np.sin(2 * np.pi * (200 + 60 * number) * t * (1 + t / 9))[:, None]
    soundfile.write(path, 0.3 * tone + 0.03 * noise, rate)


def check_picture(path: Path) -> None:
    """A PNG of at least 400 x 300 pixels with something on it."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 400 <= width <= 4000
    assert 300 <= height <= 4000
    pixels = imread(path)[..., :3]
    assert (pixels.std(axis=(0, 1)) > 0.02).all()
    assert len(np.unique((255 * pixels).astype(int) @ [1, 256, 65536])) > 20  # colours


def test_first_picture__two_commands_on_mixed_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mixed_clips(Path("recordings"))
    assert len([p for p in Path("recordings").rglob("*.*") if p.suffix != ".txt"]) == 50
    if README.is_file():
        assert COMMAND in README.read_text(encoding="utf-8")
    assert pretrain.main([*shlex.split(COMMAND)[1:], *QUICK]) == 0
    said = capsys.readouterr()
    assert "1 files of recordings" in said.err  # left out, and said so
    assert "phone.m4a" in said.err
    assert "49 files" in said.err
    (second,) = re.findall(r"bat runs report \S+", said.out)
    (run,) = Path("runs").glob("pretrain-recordings-*")
    pictures = sorted((run / "plots").glob("*.png"))
    assert [p.name for p in pictures] == ["curves.png", "masks.png"]
    for picture in pictures:
        check_picture(picture)
    assert bat.main(shlex.split(second)[1:]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2
