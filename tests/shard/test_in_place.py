"""Shards of others, indexed where they lie: lengths by probing, manifests, nothing changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.table import ShardTable, read_contents, scan
from bat.errors import UserError
from bat.shard import in_place
from bat.shard.in_place import index_in_place
from bat.shard.info import summarise
from bat.shard.verify import verify


def audio(seed: int, *, frames: int, rate: int = 16_000, codec: str = "wav") -> bytes:
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, frames)
    return encode(wave, sample_rate=rate, codec=codec)  # type: ignore[arg-type]


def write_tar(path: Path, members: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def confit(tmp_path: Path) -> Path:
    """``train/`` (two shards) and ``test/`` as confit publishes them: no lengths."""
    root = tmp_path / "as"
    says = {0: ["Speech"], 1: ["Speech", "Dog"], 2: ["Music"]}
    ids = {"Speech": 0, "Dog": 1, "Music": 3}
    for n, (folder, shard) in enumerate((("train", 0), ("train", 1), ("test", 0))):
        members: dict[str, Any] = {}
        for i, labels in says.items():
            key = f"Y{folder}{shard}{i}"
            codec, rate = (("wav", 16_000), ("flac", 8_000), ("ogg", 44_100))[i]
            members[f"{key}.{codec}"] = audio(
                10 * n + i, frames=1000 * (i + 1) + n, rate=rate, codec=codec
            )
            members[f"{key}.json"] = {
                "id": key,
                "label": labels,
                "label_id": [ids[x] for x in labels],
            }
        write_tar(root / folder / f"shard-{shard:05d}.tar", members)
    return root


def test_lengths_and_rates_are_probed(confit: Path) -> None:
    tar = confit / "train/shard-00001.tar"
    plain, probed = scan(tar), scan(tar, probe=True)
    assert plain.clips["frames"].tolist() == [-1, -1, -1]
    assert probed.clips["frames"].tolist() == [1001, 2001, 3001]
    assert probed.clips["rate"].tolist() == [16_000, 8_000, 44_100]
    assert probed.key_list() == ["Ytrain10", "Ytrain11", "Ytrain12"]


def test_what_the_json_tells_is_kept_and_what_it_lacks_is_asked(tmp_path: Path) -> None:
    wav = audio(0, frames=500, rate=8_000)
    told = [
        {"num_samples": 700, "sample_rate": 16_000},
        {"num_samples": 700},
        {"sample_rate": 1},
        {},
    ]
    members: dict[str, Any] = {}
    for i, meta in enumerate(told):
        members |= {f"{i}.wav": wav, f"{i}.json": meta}
    members |= {"4.wav": b"no audio"}
    clips = scan(write_tar(tmp_path / "s.tar", members), probe=True).clips
    assert clips["frames"].tolist() == [700, 700, 500, 500, -1]
    assert clips["rate"].tolist() == [16_000, 8_000, 8_000, 8_000, 0]


def test_contents_keep_the_json(confit: Path) -> None:
    found = read_contents(confit / "test/shard-00000.tar")
    assert list(found.audio) == list(found.metas) == ["Ytest00", "Ytest01", "Ytest02"]
    assert found.metas["Ytest01"]["label_id"] == [0, 1]
    assert [suffix for _, suffix in found.audio.values()] == ["wav", "flac", "ogg"]


def test_tables_and_manifests_of_sub_folders(confit: Path) -> None:
    before = {p: p.read_bytes() for p in confit.rglob("*.tar")}
    done = index_in_place(confit)
    assert (done.shards, done.clips, done.written, done.unreadable) == (3, 9, 3, [])
    assert done.manifests == [confit / "test/manifest.json", confit / "train/manifest.json"]
    train, test = Manifest.load(confit / "train"), Manifest.load(confit / "test")
    assert train is not None
    assert test is not None
    assert train.vocabulary == test.vocabulary == ["Speech", "Dog", "class 2", "Music"]
    assert (train.label_counts, test.label_counts) == ([4, 2, 0, 2], [2, 1, 0, 1])
    assert (
        train.rates == {"16000": 2, "44100": 2, "8000": 2} or list(train.rates.values()) == [2] * 3
    )
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


def test_same_bytes_for_any_number_of_jobs_and_nothing_the_second_time(
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


def test_a_table_without_lengths_is_completed(confit: Path) -> None:
    open_index(confit)  # makes tables, asks no clip
    tar = confit / "train/shard-00000.tar"
    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
    assert table is not None
    assert table.clips["frames"].max() == -1
    assert index_in_place(confit).written == 3
    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
    assert table is not None
    assert table.clips["frames"].tolist() == [1000, 2000, 3000]
    assert len(table.sha256) == 64


def test_damaged_clips_stay_and_are_listed(tmp_path: Path) -> None:
    members = {"a.wav": audio(0, frames=100), "b.ogg": b"nothing of the kind", "c.m4a": b"x"}
    write_tar(tmp_path / "s/x.tar", members)
    done = index_in_place(tmp_path / "s")
    [entry] = done.unreadable
    assert (entry["key"], entry["file"]) == ("b", "x.tar")
    assert entry["reason"].startswith("corrupt: not a readable audio file")
    assert entry["reason"].endswith("it stays in its shard and is skipped when read")
    manifest = Manifest.load(tmp_path / "s")
    assert manifest is not None
    assert manifest.clips == 2
    assert manifest.left_out == [
        entry,
        {"key": "c", "file": "x.tar/c.m4a", "reason": "no decoder for m4a: convert it with ffmpeg"},
    ]
    assert len(open_index(tmp_path / "s")) == 2


def test_read_only_shards_keep_their_tables_elsewhere(
    confit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(in_place.os, "access", lambda p, mode: mode != os.W_OK and real(p, mode))
    with pytest.raises(UserError, match=r"\(it is read-only\): give --index-dir"):
        index_in_place(confit)
    before = sorted(confit.rglob("*"))
    done = index_in_place(confit, index_dir=tmp_path / "tables")
    assert (done.written, done.manifests) == (3, [])
    assert "no manifest.json: the tables are in" in done.notes[0]
    assert sorted(confit.rglob("*")) == before
    assert len(list((tmp_path / "tables").iterdir())) == 3
    assert summarise(confit).unknown == 9
    assert summarise(confit, index_dir=tmp_path / "tables").unknown == 0
    assert index_in_place(confit, index_dir=tmp_path / "tables").written == 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        index_in_place(confit, index_dir=tmp_path / "file")


def test_other_programs_manifests_are_left_alone(confit: Path) -> None:
    (confit / "train/manifest.json").write_text('{"theirs": 1}')
    done = index_in_place(confit)
    assert done.manifests == [confit / "test/manifest.json"]
    assert "train/manifest.json is another program's: left as it is" in done.notes[0]
    assert (confit / "train/manifest.json").read_text() == '{"theirs": 1}'


def test_a_part_of_a_folder_gets_tables_only(confit: Path) -> None:
    open_index(confit / "train/shard-00000.tar")  # a table that knows no lengths
    done = index_in_place(confit / "train/shard-00000.tar")
    assert (done.shards, done.written, done.manifests) == (1, 1, [])
    assert "not the whole of a folder" in done.notes[0]
    assert sorted(p.name for p in (confit / "train").glob("*.npz")) == ["shard-00000.idx.npz"]
    assert index_in_place(confit / "train/shard-00000.tar").written == 0


def test_a_new_folder_takes_the_vocabulary_of_the_others(confit: Path) -> None:
    index_in_place(confit)
    members = {"z.wav": audio(9, frames=50), "z.json": {"label": ["Dog"], "label_id": [1]}}
    write_tar(confit / "extra/x.tar", members)
    index_in_place(confit)
    manifest = Manifest.load(confit / "extra")
    assert manifest is not None
    assert (manifest.vocabulary[3], manifest.label_counts) == ("Music", [0, 1, 0, 0])
    members["z.json"] = {"label": ["Cat"]}
    write_tar(confit / "odd/x.tar", members)
    with pytest.raises(UserError, match="label 'Cat' is not in the vocabulary"):
        index_in_place(confit)


def test_a_shard_that_changed_since_its_manifest_is_refused(confit: Path) -> None:
    index_in_place(confit)
    write_tar(confit / "test/shard-00000.tar", {"z.wav": audio(9, frames=50_000)})
    with pytest.raises(UserError, match=r"has 102400 bytes, its manifest.json says \d+: copy it"):
        index_in_place(confit)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed: gunzip it first"):
        index_in_place(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_members_that_are_not_utf8(tmp_path: Path, kind: int) -> None:
    short, long = b"caf\xe9", b"\xff" * (120 if kind != tarfile.USTAR_FORMAT else 60)
    with tarfile.open(tmp_path / "x.tar", "w", format=kind, encoding="latin-1") as tar:
        for number, name in enumerate((short, long)):
            for suffix, data in (("m4a", b"x"), ("wav", audio(number, frames=100))):
                info = tarfile.TarInfo(f"{name.decode('latin-1')}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    done = index_in_place(tmp_path)
    assert (done.clips, len(done.unreadable)) == (2, 0)
    index = open_index(tmp_path)
    assert [name.count(".m4a") for name in index.left_out] == [1, 1]
    assert len(index.read(0).data) == len(index.read(1).data) == 244
    assert Manifest.load(tmp_path).clips == 2  # type: ignore[union-attr]
