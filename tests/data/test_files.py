"""Audio files read where they lie: as over shards, read once, and what is noticed of them."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import DecodeError, probe
from bat.data import files
from bat.data.files import FileIndex, index_files, read_row
from bat.data.index import open_index
from bat.data.module import AudioData
from bat.errors import UserError
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks.base import LeftOut, Row, load_task
from bat.tasks.events import Event
from tests.shard.files import noise, recording

RATE = 8_000


def wave_file(path: Path, number: int = 0) -> Path:
    return recording(path, noise(number, 0.1, rate=RATE), RATE).path


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Twelve clips with a key that is escaped, a clip without label, folds and splits."""
    return [
        Row(
            wave_file(tmp_path / f"in/{i}.{codec}", i),
            "song.v3" if i == 5 else f"k{i}",
            ((), ("b",), ("a", "b"))[i % 3],
            fold=1 + i % 2,
            split=("train", "test", None)[i % 3],
        )
        for i, codec in ((i, ("wav", "flac", "ogg")[i % 3]) for i in range(12))
    ]


def index_of(rows: list[Row], cache: Path | None = None) -> FileIndex:
    return index_files(rows, ["a", "b", "never"], cache=cache)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_file_index__same_clips_and_batches_as_over_shards(
    rows: list[Row], tmp_path: Path, workers: int
) -> None:
    write_shards(rows, tmp_path / "s", vocabulary=["a", "b", "never"], shard_bytes=5_000)
    one, two = index_of(rows), open_index(tmp_path / "s")
    for name in ("size", "frames", "rate", "codec", "fold", "split", "label_ids", "label_ptr"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert (one.vocabulary, one.splits) == (two.vocabulary, two.splits)
    for i in range(12):
        here, there = one.read(i), two.read(i)
        assert (here.key, here.data, here.codec, here.labels) == (
            *(there.key, there.data, there.codec, there.labels),
        )
    how: dict[str, Any] = {"batch": 4, "batches": 5, "sample_rate": RATE, "workers": workers}
    made = [
        AudioData(index=index, clip_seconds=0.05, **how).train_dataloader() for index in (one, two)
    ]
    for left, right in zip(*made, strict=True):
        assert left.keys == right.keys
        assert left.waves.equal(right.waves)
        assert left.targets.equal(right.targets)


def test_index_files__headers_are_read_once(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def counted(path: Path, **words: float) -> object:
        asked.append(path)
        return probe(path, **words)

    monkeypatch.setattr(files, "probe", counted)
    cache = tmp_path / "cache/x.json"
    first = index_of(rows, cache)
    assert len(asked) == 12
    stamp = cache.stat().st_mtime_ns
    assert index_of(rows, cache).hash == first.hash
    assert (len(asked), cache.stat().st_mtime_ns) == (12, stamp)
    os.utime(rows[3].path, ns=(0, 1))  # a copy without its times: the same audio
    wave_file(tmp_path / "in/new.wav", 99)
    index_of([*rows, replace(rows[0], path=tmp_path / "in/new.wav", key="new")], cache)
    assert asked[12:] == [rows[3].path, tmp_path / "in/new.wav"]
    assert index_of(rows, cache).hash == first.hash
    cache.write_bytes(b"{")
    assert index_of(rows, cache).hash == first.hash == index_of(rows).hash


def test_hash__other_audio_of_the_same_length_is_another(rows: list[Row], tmp_path: Path) -> None:
    cache = tmp_path / "x.json"
    before = index_of(rows, cache)
    size = rows[0].path.stat().st_size
    wave_file(rows[0].path, 100)
    assert rows[0].path.stat().st_size == size
    assert index_of(rows, cache).hash != before.hash
    with pytest.raises(OSError, match=r"0\.wav was changed since it was indexed"):
        before.read(0)
    os.truncate(rows[3].path, 100)
    with pytest.raises(OSError, match=r"3\.wav was changed since it was indexed"):
        before.read(3)


def test_hash__labels_folds_and_order_count(rows: list[Row]) -> None:
    edits = [
        [replace(rows[0], labels=("a",)), *rows[1:]],
        [replace(rows[0], fold=2), *rows[1:]],
        rows[::-1],
        rows[:-1],
    ]
    assert len({index_of(each).hash for each in [rows, *edits]}) == 5


def test_index_files__what_cannot_be_read_is_left_out_and_listed(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "has_av", lambda: False)
    texts = {"a.wav": b"no audio at all", "b.wav": b"", "c.m4a": b"\0\0\0\x20ftypM4A " + bytes(99)}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "d.wav")  # nobody writes: it must not wait
    bad = [Row(tmp_path / name, name, (), split="test") for name in (*texts, "d.wav", "e.wav")]
    absent = [LeftOut("gone", "gone.wav", "no file")]
    cache = tmp_path / "x.json"
    for _ in range(2):
        index, left_out = index_files([*bad, *rows], ["a", "b"], cache=cache, absent=absent)
        assert len(index) == 12
        assert [(e.key, e.file, e.reason.split(":")[0]) for e in left_out] == [
            ("gone", "gone.wav", "no file"),
            ("a.wav", "a.wav", "corrupt"),
            ("b.wav", "b.wav", "empty"),
            ("c.m4a", "c.m4a", "no decoder for m4a"),
            ("d.wav", "d.wav", "corrupt"),
            ("e.wav", "e.wav", "unreadable"),
        ]
        listed = json.loads(cache.read_text())["left_out"]
        assert listed == [{"key": e.key, "file": e.file, "reason": e.reason} for e in left_out]
    wave_file(tmp_path / "e.wav")  # what was missing is asked for again
    assert len(index_files([*bad, *rows], ["a", "b"], cache=cache)[0]) == 13
    with pytest.raises(UserError, match=r"none of the 4 files can be read .*a\.wav, corrupt"):
        index_files(bad[:4], [], absent=absent)


def test_index_files__members_of_a_tar_and_cells_of_parquet(
    rows: list[Row], tmp_path: Path
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for row in rows:
            tar.add(row.path, row.path.name)
    cells = [{"audio": row.path.read_bytes(), "id": row.key} for row in rows]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet", row_group_size=5)
    for source in ("x.tar", "x.parquet"):
        index = index_of(open_rows(tmp_path / source).rows, tmp_path / f"{source}.json")
        assert [index.shard_name(i) for i in (0, 11)] == [str(tmp_path / source)] * 2
        for i in (11, 0, 7, 3):
            assert index.read(i).data == rows[i].path.read_bytes()
        assert index.shard_bytes.tolist() == [sum(row.path.stat().st_size for row in rows)]


def test_file_index__any_name_of_a_file_and_small_when_sent(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "in")
    for name in (b"caf\xe9/\xff.wav", b"tea/b.wav", b"tea/\xfe.wav"):
        wave_file(Path(os.fsdecode(root + b"/" + name)))
    found, names = load_task("folder").read(tmp_path / "in")
    for _ in range(2):
        index, left_out = index_files(found, names, cache=tmp_path / "x.json")
        assert (len(index), left_out) == (3, [])
    there = pickle.loads(pickle.dumps(index))
    assert there.hash == index.hash
    assert [there.read(i).data for i in range(3)] == [row.path.read_bytes() for row in found]
    assert index.shard_name(0).endswith(r"caf\xe9/\xff.wav")
    many = index_files([replace(found[1], key=f"k{i}") for i in range(3_000)], names)[0]
    grown = len(pickle.dumps(many)) - len(pickle.dumps(index))
    assert grown / 2_997 < 90 + len("k1000")


def test_index_files__labels_are_forgotten_on_demand(rows: list[Row]) -> None:
    index, _ = index_files(rows, None)
    assert (index.classes, index.labels(2)) == (0, ())
    assert index.folds == [1, 2]


def test_index_files__events_and_texts_as_over_shards(rows: list[Row], tmp_path: Path) -> None:
    said = [
        replace(rows[0], events=(Event(0.01, 0.05, ("b",), 7),), text="one two"),
        replace(rows[1], events=()),
        *rows[2:],
    ]
    write_shards(said, tmp_path / "s", vocabulary=["a", "b"])
    there, (here, _) = open_index(tmp_path / "s"), index_files(said, ["a", "b"])
    assert here.texts == there.texts == {0: "one two"}
    assert list(here.events) == list(there.events) == [0, 1]
    assert here.events[0][0][:3] == there.events[0][0][:3] == (0.01, 0.05, ("b",))


def test_index_files__impossible_folds_and_splits(rows: list[Row]) -> None:
    with pytest.raises(UserError, match=r"0\.wav: fold 40000 is not within"):
        index_of([replace(rows[0], fold=40_000)])
    many = [replace(rows[0], key=f"{i}", split=f"s{i}") for i in range(128)]
    with pytest.raises(UserError, match="more than 127 splits"):
        index_of(many)


def test_files__bytes_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"0123456789")
    assert read_row(Row(path, "a", ())) == b"0123456789"
    assert read_row(Row(path, "a", (), span=(2, 5))) == b"23456"
    for row, kind in (
        (Row(path, "a", (), span=(8, 5)), "truncated"),
        (Row(path, "a", (), span=(8, 0)), "empty"),
        (Row(tmp_path, "a", ()), "corrupt"),
    ):
        with pytest.raises(DecodeError) as error:
            read_row(row)
        assert error.value.kind == kind
    os.mkfifo(tmp_path / "pipe.wav")  # nobody writes: it must not wait
    with pytest.raises(DecodeError, match="not a regular file"):
        read_row(Row(tmp_path / "pipe.wav", "a", ()))
    with pytest.raises(FileNotFoundError):
        read_row(Row(tmp_path / "none.wav", "a", ()))
    monkeypatch.setattr(files, "MAX_AUDIO_BYTES", 9)
    with pytest.raises(DecodeError, match="larger than 9 bytes"):
        read_row(Row(path, "a", ()))


def test_files__bytes_of_a_cell(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"audio": b"fLaC", "id": "a"}, {"audio": None, "id": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for source in (tmp_path, tmp_path / "x.parquet", tmp_path / "*.parquet"):
        found = open_rows(source)
        assert (found.kind, [r.key for r in found.rows]) == ("parquet", ["a", "b"])
    assert read_row(found.rows[0]) == b"fLaC"
    with pytest.raises(DecodeError, match="no bytes in this cell"):
        read_row(found.rows[1])
