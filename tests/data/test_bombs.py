"""Files made to kill a reader: each is a counted bad clip, the workers live, the rest is read."""

from __future__ import annotations

import io
import struct
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bat.audio.decode import encode
from bat.data.index import Index, open_index
from bat.data.module import AudioData, eval_loader
from bat.data.sequential_data import SequentialData
from bat.data.stream import ClipDataset
from bat.types import WaveBatch

RATE = 16_000
DAY_SECONDS = 86_400
BAD = {"day": "long", "silence": "long", "forged": "long", "hour": "corrupt", "told": "long"}
KINDS = {"long": 4, "corrupt": 1}
GOOD = [f"good{i}" for i in range(8)]


def wav_header(data_bytes: int, rate: int) -> bytes:
    """Of 8-bit mono PCM."""
    riff = struct.pack("<4sI4s", b"RIFF", 36 + data_bytes, b"WAVE")
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate, 1, 8)
    return riff + fmt + struct.pack("<4sI", b"data", data_bytes)


def silence(hours: float) -> bytes:
    """A FLAC of so many hours, a thousandth of what it decodes to."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(round(hours * 60)):
            file.write(np.zeros(60 * RATE, np.int16))
    return buffer.getvalue()


def forged(flac: bytes, samples: int) -> bytes:
    """STREAMINFO promises so many samples: with 2^36 - 1, 256 GiB to whoever believes it."""
    data = bytearray(flac)
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: eight good clips, a WAV of 24 hours, hours of silence in a few hundred kB,
    lengths forged beyond the bound and within it, and a clip whose JSON says it is too long."""
    folder = tmp_path_factory.mktemp("bombs")
    rng = np.random.default_rng(0)
    good = [encode(rng.uniform(-0.5, 0.5, 4_000), sample_rate=RATE, codec="flac") for _ in GOOD]
    files = {f"{key}.flac": data for key, data in zip(GOOD, good, strict=True)}
    files["silence.flac"] = silence(2)
    files["forged.flac"] = forged(good[0], (1 << 36) - 1)
    files["hour.flac"] = forged(good[0], 3500 * RATE)
    files["told.flac"] = good[0]
    files["told.json"] = b'{"num_samples": 64000000, "sample_rate": 16000}'
    names = list(files)
    for number in range(2):
        with tarfile.open(folder / f"s-{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names[6:] if number else names[:6]:
                info = tarfile.TarInfo(name)
                info.size = len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))
            if number:
                rate = 1_000  # 86 MB that no disk holds: the file is a hole
                info = tarfile.TarInfo("day.wav")
                head = wav_header(DAY_SECONDS * rate, rate)
                info.size = len(head) + DAY_SECONDS * rate
                assert tar.fileobj is not None
                tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT) + head)
                tar.fileobj.seek(-(-(info.size) // 512) * 512 - len(head), 1)
                tar.offset = tar.fileobj.tell()
    return folder


def bad_of(batches: list[WaveBatch]) -> dict[str, str]:
    return {clip.key: clip.kind for batch in batches for clip in batch.skipped}


def test_the_silence_is_a_bomb(bombs: Path) -> None:
    index = open_index(bombs)
    assert sorted(index.key(i) for i in range(len(index))) == sorted([*GOOD, *BAD])
    assert len(silence(1)) * 100 < 3600 * RATE * 2


def test_read_by_two_workers_they_are_counted_and_nobody_dies(bombs: Path) -> None:
    index = open_index(bombs)
    how: dict[str, Any] = {"sample_rate": RATE, "clip_seconds": 0.3}
    data = AudioData(index=index, batch=2, batches=7, workers=2, max_bad=1.0, seed=1, **how)
    batches = list(data.train_dataloader())  # an epoch is 13 clips; the last place is the next's
    assert [len(batch.keys) for batch in batches] == [2] * 7
    assert bad_of(batches) == BAD
    assert {key for batch in batches for key in batch.keys} == set(GOOD)
    for batch in batches:
        data.on_before_batch_transfer(batch, 0)
    met = Counter(clip.key for batch in batches for clip in batch.skipped)
    assert data.bad_clips.seen == 14 + met.total()
    assert data.bad_clips.kinds == {
        kind: sum(n for key, n in met.items() if BAD[key] == kind) for kind in KINDS
    }
    loader = eval_loader(index, batch=4, workers=2, **how)
    batches = list(loader)
    assert sum(len(batch.keys) for batch in batches) == 8
    kinds = Counter(clip.kind for batch in batches for clip in batch.skipped)
    assert kinds == {"long": 4, "short": 1}  # read from its start, where it ends too soon


def test_read_from_front_to_end(bombs: Path) -> None:
    data = SequentialData(
        [bombs], batch=4, workers=2, sample_rate=RATE, clip_seconds=0.3, max_bad=1.0, split="all"
    )
    stream = iter(data.train_dataloader())
    batches = [next(stream) for _ in range(6)]
    assert bad_of(batches) == {key: BAD[key] for key in BAD if key != "told"}  # no JSON is asked


def test_what_the_index_knows_to_be_too_long_is_not_read(bombs: Path, monkeypatch) -> None:
    index = open_index(bombs)
    keys = [index.key(i) for i in range(len(index))]
    read = list[int]()

    def reading(self: Index, i: int, read_it: Any = Index.read) -> Any:
        read.append(i)
        return read_it(self, i)

    monkeypatch.setattr(Index, "read", reading)
    data = ClipDataset(index, sample_rate=RATE, clip_seconds=0.3, crop="start")
    told = keys.index("told")
    assert [clip.kind for clip in data[0, told].skipped] == ["long"]
    assert read == []
    loose = ClipDataset(
        index, sample_rate=RATE, clip_seconds=0.3, crop="start", max_seconds=1.5 * DAY_SECONDS
    )
    assert [clip.kind for clip in loose[0, told].skipped] == ["short"]  # its JSON lies
    assert loose[0, keys.index("day")].keys == ["day"]
    assert loose[0, keys.index("silence")].keys == ["silence"]
    tight = ClipDataset(index, sample_rate=RATE, clip_seconds=0.3, crop="start", max_seconds=0.2)
    assert [clip.kind for clip in tight[0, keys.index("good0")].skipped] == ["long"]
