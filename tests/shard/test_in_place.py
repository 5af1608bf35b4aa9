"""``index_in_place``: foreign shards get tables and manifests, and are not changed."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from bat.shard import in_place
from bat.shard.in_place import index_in_place
from bat.shard.info import summarise
from bat.shard.verify import verify
from tests.shard.files import audio, write_tar


def manifest_of(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    assert manifest is not None
    return manifest


@pytest.fixture
def confit(tmp_path: Path) -> Path:
    """``train/`` (two shards) and ``test/`` as confit publishes them: no lengths."""
    root = tmp_path / "as"
    label_ids = {"Speech": 0, "Dog": 1, "Music": 3}
    for n, (folder, shard) in enumerate((("train", 0), ("train", 1), ("test", 0))):
        members: dict[str, Any] = {}
        for i, labels in enumerate((["Speech"], ["Speech", "Dog"], ["Music"])):
            key = f"Y{folder}{shard}{i}"
            codec, rate = (("wav", 16_000), ("flac", 8_000), ("ogg", 44_100))[i]
            seconds = (1000 * (i + 1) + n) / rate
            members[f"{key}.{codec}"] = audio(10 * n + i, seconds=seconds, rate=rate, codec=codec)
            ids = [label_ids[label] for label in labels]
            members[f"{key}.json"] = {"id": key, "label": labels, "label_id": ids}
        write_tar(root / folder / f"shard-{shard:05d}.tar", members)
    return root


def test_scan__probe_reads_what_the_json_lacks(tmp_path: Path) -> None:
    members: dict[str, Any] = {"4.wav": b"no audio"}
    for i, meta in enumerate(
        ({"num_samples": 700, "sample_rate": 16_000}, {"num_samples": 700}, {"sample_rate": 1}, {})
    ):
        members |= {f"{i}.wav": audio(0, seconds=0.0625, rate=8_000), f"{i}.json": meta}
    tar = write_tar(tmp_path / "s.tar", members)
    assert scan(tar).clips["frames"].tolist() == [-1, 700, 700, -1, -1]
    clips = scan(tar, probe=True).clips
    assert clips["frames"].tolist() == [-1, 700, 700, 500, 500]
    assert clips["rate"].tolist() == [0, 16_000, 8_000, 8_000, 8_000]


def test_index_in_place__writes_tables_and_manifests_of_sub_folders(confit: Path) -> None:
    before = {p: p.read_bytes() for p in confit.rglob("*.tar")}
    done = index_in_place(confit)
    assert (done.shards, done.clips, done.written, done.unreadable) == (3, 9, 3, [])
    assert done.manifests == [confit / "test/manifest.json", confit / "train/manifest.json"]
    train, test = manifest_of(confit / "train"), manifest_of(confit / "test")
    assert train.vocabulary == test.vocabulary == ["Speech", "Dog", "class 2", "Music"]
    assert (train.label_counts, test.label_counts) == ([4, 2, 0, 2], [2, 1, 0, 1])
    assert train.rates == {"16000": 2, "44100": 2, "8000": 2}
    assert (train.clips, train.left_out) == (6, [])
    seconds = [(1000 + n) / 16_000 + (2000 + n) / 8_000 + (3000 + n) / 44_100 for n in range(3)]
    assert train.seconds == pytest.approx(seconds[0] + seconds[1], abs=2e-3)
    assert test.seconds == pytest.approx(seconds[2], abs=1e-3)
    for shard in train.shards:
        data = (confit / "train" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert {p: p.read_bytes() for p in confit.rglob("*.tar")} == before
    index = open_index(confit)
    assert index.frames.tolist() == [1002, 2002, 3002, 1000, 2000, 3000, 1001, 2001, 3001]
    assert index.splits == ["test", "train"]
    assert index.vocabulary == train.vocabulary
    assert verify(confit).problems == []


def test_index_in_place__same_bytes_for_any_jobs_and_nothing_the_second_time(
    confit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_in_place(confit, jobs=2)
    made = {p: p.read_bytes() for p in confit.rglob("*.*")}
    for path in [*confit.rglob("*.npz"), *confit.rglob("manifest.json")]:
        path.unlink()
    index_in_place(confit)
    assert {p: p.read_bytes() for p in confit.rglob("*.*")} == made
    monkeypatch.setattr(in_place, "scan", None)  # not called again
    monkeypatch.setattr(hashlib, "file_digest", None)
    again = index_in_place(confit)
    assert (again.clips, again.written, again.manifests) == (9, 0, [])


def test_index_in_place__table_without_lengths_is_completed(confit: Path) -> None:
    open_index(confit)  # makes tables, asks no clip
    tar = confit / "train/shard-00000.tar"
    assert index_in_place(confit).written == 3
    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
    assert table is not None
    assert table.clips["frames"].tolist() == [1000, 2000, 3000]
    assert len(table.sha256) == 64


def test_index_in_place__damaged_clips_stay_and_are_listed(tmp_path: Path) -> None:
    members = {"a.wav": audio(0), "b.ogg": b"nothing of the kind", "c.m4a": b"x"}
    write_tar(tmp_path / "s/x.tar", members)
    [entry] = index_in_place(tmp_path / "s").unreadable
    assert (entry["key"], entry["file"]) == ("b", "x.tar")
    assert entry["reason"].startswith("corrupt: not a readable audio file")
    assert entry["reason"].endswith("it stays in its shard and is skipped when read")
    manifest = manifest_of(tmp_path / "s")
    assert manifest.clips == len(open_index(tmp_path / "s")) == 2
    why = "no decoder for m4a: convert it with ffmpeg"
    assert manifest.left_out == [entry, {"key": "c", "file": "x.tar/c.m4a", "reason": why}]


def test_index_in_place__read_only_shards_keep_their_tables_elsewhere(
    confit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(in_place.os, "access", lambda p, mode: mode != os.W_OK and real(p, mode))
    with pytest.raises(UserError, match=r"\(it is read-only\): give --index-dir"):
        index_in_place(confit)
    before, tables = sorted(confit.rglob("*")), tmp_path / "tables"
    done = index_in_place(confit, index_dir=tables)
    assert (done.written, done.manifests) == (3, [])
    assert "no manifest.json: the tables are in" in done.notes[0]
    assert sorted(confit.rglob("*")) == before
    assert len(list(tables.iterdir())) == 3
    assert summarise(confit).unknown == 9
    assert summarise(confit, index_dir=tables).unknown == 0
    assert index_in_place(confit, index_dir=tables).written == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        index_in_place(confit, index_dir=tmp_path / "file")


def test_index_in_place__leaves_other_programs_manifests_alone(confit: Path) -> None:
    (confit / "train/manifest.json").write_text('{"theirs": 1}')
    done = index_in_place(confit)
    assert done.manifests == [confit / "test/manifest.json"]
    assert "train/manifest.json is another program's: left as it is" in done.notes[0]
    assert (confit / "train/manifest.json").read_text() == '{"theirs": 1}'


def test_index_in_place__part_of_a_folder_gets_tables_only(confit: Path) -> None:
    tar = confit / "train/shard-00000.tar"
    open_index(tar)  # a table that knows no lengths
    done = index_in_place(tar)
    assert (done.shards, done.written, done.manifests) == (1, 1, [])
    assert "not the whole of a folder" in done.notes[0]
    assert sorted(p.name for p in (confit / "train").glob("*.npz")) == ["shard-00000.idx.npz"]
    assert index_in_place(tar).written == 0


def test_index_in_place__new_folder_takes_the_vocabulary_of_the_others(confit: Path) -> None:
    index_in_place(confit)
    write_tar(confit / "extra/x.tar", {"z.wav": audio(9), "z.json": {"label": ["Dog"]}})
    index_in_place(confit)
    manifest = manifest_of(confit / "extra")
    assert (manifest.vocabulary[3], manifest.label_counts) == ("Music", [0, 1, 0, 0])
    write_tar(confit / "odd/x.tar", {"z.wav": audio(9), "z.json": {"label": ["Cat"]}})
    with pytest.raises(UserError, match="label 'Cat' is not in the vocabulary"):
        index_in_place(confit)


def test_index_in_place__refuses_shards_that_changed_or_are_compressed(confit: Path) -> None:
    index_in_place(confit)
    tar = confit / "test/shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[-12_000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"was changed since its manifest.json was written"):
        index_in_place(confit)
    write_tar(tar, {"z.wav": audio(9, seconds=3.1)})
    with pytest.raises(UserError, match=r"has \d+ bytes, its manifest.json says \d+: copy it"):
        index_in_place(confit)
    (confit / "gz").mkdir()
    (confit / "gz/x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed: gunzip it first"):
        index_in_place(confit / "gz")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_index_in_place__takes_names_that_are_not_utf8(tmp_path: Path, kind: int) -> None:
    short, long = b"caf\xe9", b"\xff" * (120 if kind != tarfile.USTAR_FORMAT else 60)
    with tarfile.open(tmp_path / "x.tar", "w", format=kind, encoding="latin-1") as tar:
        for number, name in enumerate((short, long)):
            for suffix, data in (("m4a", b"x"), ("wav", audio(number, seconds=0.00625))):
                info = tarfile.TarInfo(f"{name.decode('latin-1')}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    done = index_in_place(tmp_path)
    assert (done.clips, len(done.unreadable)) == (2, 0)
    index = open_index(tmp_path)
    assert [name.count(".m4a") for name in index.left_out] == [1, 1]
    assert len(index.read(0).data) == len(index.read(1).data) == 244
    assert manifest_of(tmp_path).clips == 2
