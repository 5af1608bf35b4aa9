"""Windows of long recordings: every one once an epoch, nothing left out, read by seeking."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from bat.data import files
from bat.data.files import FileIndex, index_files
from bat.data.index import open_index
from bat.data.plan import make_plan
from bat.data.stream import ClipDataset
from bat.data.windows import cut_into_windows, spans
from bat.tasks.base import Row, load_task

RATE, CLIP = 16_000, 5.0
LENGTHS = {"short.wav": 0.3, "two.flac": 2.0, "long.wav": 65.0, "hour.flac": 12.0, "edge.ogg": 5.05}


def write(folder: Path) -> Path:
    """Files whose samples count up, so that a window says where it lies."""
    for name, seconds in LENGTHS.items():
        n = round(seconds * RATE)
        soundfile.write(folder / name, np.arange(n) / n * 0.9, RATE)
    return folder


@pytest.fixture
def index(tmp_path: Path) -> FileIndex:
    rows, names = load_task("folder").read(write(tmp_path))
    found, left_out = index_files(rows, names, windows=True)
    assert not left_out
    return cut_into_windows(found, CLIP)


def dataset(index: FileIndex, clip: float = CLIP, **how: object) -> ClipDataset:
    return ClipDataset(index, sample_rate=RATE, clip_seconds=clip, **how)


def test_windows__cover_every_sample_and_are_full(index: FileIndex) -> None:
    spans: dict[str, list[tuple[int, int]]] = {}
    for i in range(len(index)):
        start, frames = int(index.starts[i]), int(index.frames[i])
        spans.setdefault(index.key(i).partition("@")[0], []).append((start, frames))
    assert {key: len(found) for key, found in spans.items()} == {
        "short": 1, "two": 1, "long": 13, "hour": 3, "edge": 1,
    }  # fmt: skip
    n = round(CLIP * RATE)
    for key in ("long", "hour"):
        heard = np.zeros(spans[key][0][1], int)
        for start, _ in spans[key]:
            assert start + n <= len(heard)
            heard[start : start + n] += 1
        assert heard.min() == 1
    assert len({index.key(i) for i in range(len(index))}) == len(index) == 19


def test_windows__each_once_an_epoch_in_an_order_of_seed_and_epoch(index: FileIndex) -> None:
    plan = make_plan(index, seed=3)
    orders = [plan.clips(np.arange(19) + 19 * epoch).tolist() for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(19))
    assert orders[0] == orders[2] != orders[1]
    batch = dataset(index, plan=plan).batch(list(enumerate(orders[0])))
    heard = np.zeros(round(65 * RATE), bool)
    for key, wave in zip(batch.keys, batch.waves.numpy(), strict=True):
        if key.startswith("long"):
            start = int(key.partition("@")[2] or 0)
            assert abs(float(wave[0]) / 0.9 * len(heard) - start) < 60  # they count up, in 16 bits
            heard[start : start + len(wave)] = True
    assert heard.all()


@pytest.mark.parametrize("seeking", [True, False])
def test_windows__are_the_samples_of_the_whole_file(
    index: FileIndex, monkeypatch: pytest.MonkeyPatch, seeking: bool
) -> None:
    monkeypatch.setattr(files, "BY_SEEKING", 0 if seeking else 1 << 40)
    if seeking:
        monkeypatch.setattr(files, "MAX_AUDIO_BYTES", 20_000)  # no file is read whole
    for i in range(len(index)):
        if index.key(i).startswith("long"):
            whole, _ = soundfile.read(index.place(int(index.shard[i])), dtype="float32")
            batch = dataset(index).batch([(i, i)])
            start = int(index.starts[i])
            np.testing.assert_array_equal(
                batch.waves[0].numpy(), whole[start : start + round(CLIP * RATE)]
            )
            assert batch.lengths.tolist() == [80_000]


def test_windows__a_file_that_was_changed_is_not_read(index: FileIndex) -> None:
    i = next(i for i in range(len(index)) if index.key(i).startswith("long"))
    path = index.place(int(index.shard[i]))
    assert path.stat().st_size > files.BY_SEEKING
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"else")
    (skipped,) = dataset(index).batch([(0, i)]).skipped
    assert "changed" in skipped.why


def test_windows__labels_and_identity(tmp_path: Path, toy_shards: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", np.zeros(3 * RATE), RATE)
    rows, names = load_task("folder").read(tmp_path)

    def made(seconds: float | None) -> FileIndex:
        found = index_files(rows, names)[0]
        return found if seconds is None else cut_into_windows(found, seconds)

    index = made(1.0)
    assert [index.labels(i) for i in range(6)] == [(0,)] * 3 + [(1,)] * 3
    assert index.targets(4).tolist() == [0, 1]
    assert made(4.0).hash != made(2.0).hash != index.hash
    plain = open_index(toy_shards)
    before = (plain.hash, make_plan(plain, seed=1).identity(), plain.key(3))
    assert before == (open_index(toy_shards).hash, make_plan(plain, seed=1).identity(), before[2])
    shards = cut_into_windows(open_index(toy_shards), 0.25)
    assert len(shards) == 2 * len(plain)
    clip = dataset(plain, 0.5).batch([(0, 3)]).waves[0].numpy()
    halves = [dataset(shards, 0.25).batch([(0, i)]).waves[0].numpy() for i in (6, 7)]
    np.testing.assert_array_equal(np.concatenate(halves), clip)


def test_files__larger_than_memory_are_left_out_unless_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr(files, "MAX_AUDIO_BYTES", 1_000_000)
    rows = [Row(tmp_path / name, name, ()) for name in LENGTHS]
    cache = tmp_path / "cache.json"
    for windows, gone in ((True, []), (False, ["long.wav"]), (True, [])):
        _, left_out = index_files(rows, None, cache=cache, windows=windows)
        assert [entry.file for entry in left_out] == gone


def test_spans__last_is_shifted_back_or_short() -> None:
    assert spans(25, 10) == [(0, 10), (7.5, 17.5), (15, 25)]
    assert spans(25, 10, 10) == [(0, 10), (10, 20), (20, 25)]
    assert spans(25, 10, 5) == [(0, 10), (5, 15), (10, 20), (15, 25)]
    assert spans(20.1, 10, 10, rest=0.16) == [(0, 10), (10, 20)]
    assert spans(10.1, 10, rest=0.2) == [(0, 10)]
    assert spans(3, 10) == spans(3, 10, 10) == [(0, 3)]
