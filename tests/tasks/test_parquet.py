"""Parquet as the hub publishes it: columns, names, cells; what a damaged one says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bat.errors import UserError
from bat.tasks import parquet
from bat.tasks.base import load_task
from bat.tasks.labels import labels_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, rows: list[dict[str, Any]], *, group: int = 2, features: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if features is not None:
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, path, row_group_size=group)
    return path


def test_read__bytes_with_mids_and_human_labels(tmp_path: Path) -> None:
    columns = ("video_id", "audio", "labels", "human_labels")
    cells = (
        ("a", b"fLaC1", ["/m/1", "/m/0"], ["Z", "Y"]),
        ("b", b"fLaC22", ["/m/0"], ["Y"]),
        ("c", b"fLaC333", [], []),
    )
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    write(tmp_path / "data/eval/00.parquet", rows)
    found, names = load_task("parquet").read(tmp_path)
    assert names == ["Y", "Z"]
    assert [(r.key, r.labels, r.mids, r.split, r.cell, r.suffix) for r in found] == [
        ("a", ("Z", "Y"), ("/m/1", "/m/0"), "test", (0, 0), "flac"),
        ("b", ("Y",), ("/m/0",), "test", (0, 1), "flac"),
        ("c", (), (), "test", (1, 0), "flac"),
    ]
    audio = [parquet.read_cell(r.path, *r.cell) for r in found if r.cell is not None]
    assert audio == [b"fLaC1", b"fLaC22", b"fLaC333"]
    (tmp_path / "n.csv").write_text('0,/m/0,"Speech"\n1,/m/1,"Dog"\n')
    translated = parquet.read(tmp_path, labels_of(tmp_path / "n.csv"))
    assert translated.vocabulary == ["Speech", "Dog"]
    assert translated.rows[0].labels == ("Dog", "Speech")


def test_read__human_labels_that_do_not_fit_are_not_used(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "audio": b"fLaC", "labels": ["/m/1", "/m/0"], "human_labels": ["Z"]},
        {"id": "b", "audio": b"fLaC", "labels": ["/m/0"], "human_labels": ["Y"]},
    ]
    found = parquet.read(write(tmp_path / "x.parquet", rows))
    assert found.vocabulary == ["/m/0", "/m/1"]
    assert "labels are mids" in found.notes[0]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_read__the_hubs_struct_and_class_label(tmp_path: Path, column: str) -> None:
    label: Any = {"names": ["siren", "dog", "rain"], "_type": "ClassLabel"}
    many = column == "labels"
    features = {column: {"feature": label, "_type": "Sequence"} if many else label}
    values: list[Any] = [[2, 0], [1], []] if many else [2, 1, -1]
    rows = [
        {
            "audio": {"bytes": b"RIFF" + bytes([i]), "path": f"dir/c{i}{s}"},
            column: value,
            "fold": i,
        }
        for i, (value, s) in enumerate(zip(values, (".wav", ".ogg", ""), strict=True))
    ]
    path = write(tmp_path / "train-00000-of-00001.parquet", rows, features=features)
    found = parquet.read(path)
    assert found.vocabulary == ["siren", "dog", "rain"]
    assert [r.labels for r in found.rows] == [
        ("rain", "siren") if many else ("rain",),
        ("dog",),
        (),
    ]
    assert [(r.key, r.suffix, r.fold, r.split) for r in found.rows] == [
        ("c0", "wav", 0, "train"),
        ("c1", "ogg", 1, "train"),
        ("c2", "wav", 2, "train"),
    ]
    assert parquet.read_cell(path, 1, 0) == b"RIFF\x02"
    assert found.rows[2].name == "train-00000-of-00001.parquet/c2"


def test_read__names_with_numbers_beside_keep_their_order(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "audio": b"OggS", "label": ["z", "m"], "label_id": [0, 2]},
        {"key": "b", "audio": b"OggS", "label": ["b"], "label_id": [1]},
    ]
    found = parquet.read(write(tmp_path / "a.parquet", rows))
    assert found.vocabulary == ["z", "b", "m"]


def test_read__numbers_alone_and_a_list_of_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"audio": b"\xff\xfb", "label_id": i} for i in (3, 2)])
    assert parquet.read(path).vocabulary == ["class 0", "class 1", "2", "3"]  # as in shards
    path = write(tmp_path / "a.parquet", [{"audio": b"\xff\xfb", "label": i} for i in (10, 9)])
    found = parquet.read(path)
    assert found.vocabulary == ["9", "10"]
    assert [(r.key, r.suffix) for r in found.rows] == [("a-0-0", "mp3"), ("a-0-1", "mp3")]
    (tmp_path / "n.txt").write_text("\n".join(f"c{i}" for i in range(11)))
    found = parquet.read(path, labels_of(tmp_path / "n.txt"))
    assert [r.labels for r in found.rows] == [("c10",), ("c9",)]
    assert len(found.vocabulary) == 11


def test_read_cell__any_order_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 40)  # a few cells at once
    rows = [{"audio": {"bytes": b"x" * i if i else None, "path": "a"}} for i in range(9)]
    path = write(tmp_path / "a.parquet", rows, group=5)
    for n in (0, 1, 4, 3, 8, 0, 7, 7, 5, 2):
        data = parquet.read_cell(path, n // 5, n % 5)
        assert data == (b"x" * n if n else None)
    assert len(parquet._cells) == 1
    for group, row in ((0, 5), (2, 0)):
        with pytest.raises(OSError, match=f"no cell {row} of row group {group}"):
            parquet.read_cell(path, group, row)
    assert parquet.read_cell(path, 1, 1) == b"x" * 6


def test_read__mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no \.parquet file"):
        parquet.read(tmp_path)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="is not a readable parquet file"):
        parquet.read(path)
    features = {"label": {"names": ["x"], "_type": "ClassLabel"}}
    for row, said in (
        ({"sound": b"x"}, "lacks column 'audio'; it has: sound"),
        ({"audio": [0.0, 0.1]}, r"column 'audio' is list<.*double>: encoded files"),
        ({"audio": b"ID3", "label": 1}, "label 1 is not among its 1 classes"),
    ):
        with pytest.raises(UserError, match=said):
            parquet.read(write(path, [row], features=features))
    with pytest.raises(OSError, match="No such file"):
        parquet.read_cell(tmp_path / "none.parquet", 0, 0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'bat-audio\[parquet\]'"):
        parquet.read(path)


def test_read__labels_that_are_lists_in_text_floats_or_missing(tmp_path: Path) -> None:
    texts = ["['dog', 'cat']", "nan", "dog"]
    rows = [{"id": str(i), "audio": b"fLaC", "label": text} for i, text in enumerate(texts)]
    found = parquet.read(write(tmp_path / "text.parquet", rows))
    assert [row.labels for row in found.rows] == [("dog", "cat"), (), ("dog",)]
    numbers = [10.0, float("nan"), 9.0]
    rows = [{"id": str(i), "audio": b"fLaC", "label": x} for i, x in enumerate(numbers)]
    found = parquet.read(write(tmp_path / "float.parquet", rows))
    assert [row.labels for row in found.rows] == [("10",), (), ("9",)]
    assert found.vocabulary == ["9", "10"]
