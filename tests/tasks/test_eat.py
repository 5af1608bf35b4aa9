"""EAT manifests as they are published, and as they break."""

from __future__ import annotations

from pathlib import Path

import pytest

from bat.errors import UserError
from bat.tasks import eat
from bat.tasks.base import load_task
from tests.shard.files import lay


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    root, folder = tmp_path / "clips", tmp_path / "manifests"
    files = {
        **dict.fromkeys(("clips/bal/Y1.flac", "clips/bal/Y2.wav", "clips/ev/Y3.wav"), "x"),
        "manifests/train.tsv": f"{root}\nbal/Y1.flac\t160000\nbal/Y2.wav\t159999\n",
        "manifests/train.lbl": "Y2\t/m/0\nbal/Y1\t/m/1,/m/0\n",
        "manifests/eval.tsv": f"{root}\nev/Y3.wav\t160000\n",
        "manifests/eval.lbl": "Y3.wav\t/m/1\n",
        "manifests/label_descriptors.csv": '0,/m/0,"Speech"\n1,/m/1,"A, b"\n',
    }
    lay(tmp_path, files)
    return folder


def test_read__splits_labels_and_paths(manifest: Path) -> None:
    rows, names = load_task("eat").read(manifest)
    assert names == ["Speech", "A, b"]
    assert [(r.key, r.labels, r.mids, r.split) for r in rows] == [
        ("ev__Y3", ("A, b",), ("/m/1",), "eval"),
        ("bal__Y1", ("A, b", "Speech"), ("/m/1", "/m/0"), "train"),
        ("bal__Y2", ("Speech",), ("/m/0",), "train"),
    ]
    assert all(row.path.is_file() for row in rows)
    assert [r.key for r in eat.read(manifest / "eval.tsv").rows] == ["ev__Y3"]
    assert len(eat.read(manifest, split="train").rows) == 2
    with pytest.raises(UserError, match="no split 'test': it has eval, train"):
        eat.read(manifest, split="test")


def test_read__a_root_of_another_machine_is_looked_for_here(manifest: Path) -> None:
    (manifest / "eval.tsv").write_text("/hpc_stor/clips\n../clips/ev/Y3.wav\t1\n")
    found = eat.read(manifest / "eval.tsv")
    assert found.rows[0].path.is_file()
    assert found.notes[0].startswith("eval.tsv: its root /hpc_stor/clips is not here")


def test_read__without_labels_or_with_some_missing(manifest: Path) -> None:
    (manifest / "train.lbl").write_text("Y2\t/m/0\n")
    found = eat.read(manifest, split="train")
    assert [r.labels for r in found.rows] == [(), ("Speech",)]
    assert "train.lbl has no line for 1 of 2 clips: unlabelled" in found.notes
    (manifest / "train.lbl").unlink()
    assert [r.labels for r in eat.read(manifest, split="train").rows] == [(), ()]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.lbl", "Y2 /m/0\n", "'Y2 /m/0' is not 'id<TAB>mid,mid'"),
        ("train.lbl", "other\t/m/0\n", "no line for any clip of train.tsv, as 'Y1.flac'"),
        ("train.lbl", "Y1\t/m/7\nY2\t/m/0\n", "label '/m/7' of Y1.flac is not in label_desc"),
        ("train.tsv", "/\nnowhere/Y1.flac\t1\n", "none of the 1 files .* into its first line"),
        ("train.tsv", "path\tlabel\na.wav\tdog\n", "has no split 'train': it has eval"),
    ],
)
def test_read__damaged_manifests(manifest: Path, name: str, text: str, says: str) -> None:
    (manifest / name).write_text(text)
    with pytest.raises(UserError, match=says):
        eat.read(manifest, split="train")


def test_manifests__other_tables_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("path\tlabel\na.wav\tdog\n")
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\n")
    (tmp_path / "c.tsv").write_text("")
    assert eat.manifests(tmp_path) == []
    with pytest.raises(UserError, match="is no EAT manifest"):
        eat.read(tmp_path)
