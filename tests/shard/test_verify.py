"""``verify``: each kind of damage is found, named, and nothing else is."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.manifest import Manifest
from bat.data.table import ShardTable
from bat.errors import UserError
from bat.shard.verify import Report, verify
from bat.shard.write import write_shards
from bat.tasks.base import Row

RATE = 16_000
Members = dict[str, bytes]


def noise(seed: int, seconds: float = 0.2, level: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-level, level, round(seconds * RATE))


def wav(seed: int, **how: float) -> bytes:
    return encode(noise(seed, **how), sample_rate=RATE, codec="wav")


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve clips k0 .. k11 of two classes and two folds in three shards."""
    rows = []
    for i in range(12):
        path = tmp_path / f"in/k{i}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(wav(i))
        rows.append(Row(path, f"k{i}", ("cat",) if i % 2 else ("dog",), fold=1 + i // 6))
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=40_000)
    assert [s.clips for s in manifest.shards] == [4, 4, 4]
    return tmp_path / "s"


def edit(tar: Path, change: Callable[[Members], object]) -> None:
    """Rewrite a tar, and its entry in the manifest and its table, as one who hides it would."""
    members = read_tar(tar)
    change(members)
    write_tar(tar, members)


def meta(members: Members, key: str, **fields: Any) -> None:
    members[f"{key}.json"] = json.dumps(json.loads(members[f"{key}.json"]) | fields).encode()


def found(report: Report, kind: str) -> dict[str, str]:
    return {p.key: p.why for p in report.problems if p.kind == kind}


def test_good_shards_are_fit_whatever_the_number_of_jobs(shards: Path) -> None:
    one, two = verify(shards), verify(shards, jobs=2)
    assert one == two
    assert one.ok
    assert (one.shards, one.hashed, one.clips, one.problems) == (3, 3, 12, [])
    assert one.seconds == pytest.approx(2.4)
    assert sum(one.counts.values()) == 0


@pytest.mark.parametrize("codec", ["flac", "wav", "ogg"])
def test_a_cut_clip_is_corrupt(shards: Path, codec: str) -> None:
    data = encode(noise(1, seconds=2), sample_rate=RATE, codec=codec)  # type: ignore[arg-type]

    def change(m: Members) -> None:
        del m["k1.wav"]
        m[f"k1.{codec}"] = data[: len(data) * 2 // 3]
        meta(m, "k1", num_samples=2 * RATE)

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    assert not report.ok
    kind, _, _ = found(report, "corrupt")["k1"].partition(":")
    assert kind == ("corrupt" if codec == "flac" else "short")
    assert report.counts["label"] == report.counts["silent"] == 0


def test_silent_and_nearly_silent(shards: Path) -> None:
    def change(m: Members) -> None:
        m["k0.wav"] = encode(np.zeros(3200), sample_rate=RATE, codec="wav")
        m["k1.wav"] = wav(1, level=0.0009)
        m["k2.wav"] = wav(2, level=0.0012)
        m["k3.wav"] = m["k0.wav"]  # silence is no duplicate of silence

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    assert list(found(report, "silent")) == ["k0", "k1", "k3"]
    assert found(report, "silent")["k0"] == "peak all zeros"
    assert found(report, "silent")["k1"] == "peak -61 dBFS"
    assert report.counts["duplicate"] == 0


def test_twins_in_another_codec_with_another_label(shards: Path) -> None:
    def change(m: Members) -> None:
        flac = encode(noise(9), sample_rate=RATE, codec="flac")
        del m["k2.wav"]
        m["k2.flac"] = flac  # k9's audio, a cat's; k2 is a dog

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    place = "shard-00000.tar/k2"
    assert found(report, "duplicate") == {"k9": f"the same audio as {place} (leak: folds 1 and 2)"}
    assert found(report, "label") == {"k9": f"labelled cat; {place}, the same audio, has dog"}
    assert not report.ok


def test_wrong_labels_are_named(shards: Path) -> None:
    def change(m: Members) -> None:
        meta(m, "k0", label=["wolf"])
        meta(m, "k1", label_id=[1])
        meta(m, "k2", label=["dog", "cat"], label_id=[1])
        meta(m, "k3", label=[], label_id=[])

    def numbers(m: Members) -> None:
        meta(m, "k4", num_samples=3000)
        meta(m, "k5", sample_rate=8000, num_samples=1600)
        meta(m, "k6", num_samples="many")
        m["k7.json"] = b"no JSON"

    edit(shards / "shard-00000.tar", change)
    edit(shards / "shard-00001.tar", numbers)
    report = verify(shards)
    assert found(report, "label") == {
        "k0": "label 'wolf' is not in the vocabulary",
        "k1": "label_id 1 for 'cat', which is 0",
        "k2": "2 in label, but 1 in label_id",
        "k3": "no label, where most clips have one",
        "k4": "num_samples 3000 in its JSON, 3200 in the file",
        "k5": "sample_rate 8000 in its JSON, 16000 Hz in the file",
        "k6": "num_samples 'many' in its JSON is no count",
        "k7.wav": "its JSON cannot be read: not a JSON object",
    }
    assert report.counts["label"] == 8
    assert report.counts["corrupt"] == 0


def test_a_changed_shard_fails_its_hash(shards: Path) -> None:
    path = shards / "shard-00002.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"RIFF") + 2000
    data[at] ^= 1  # one bit of one sample
    path.write_bytes(data)
    report = verify(shards)
    assert [p[1:] for p in report.problems] == [
        ("shard-00002.tar", "", "its sha256 is not the manifest's: it was changed")
    ]
    assert not report.ok


def test_missing_foreign_and_cut_shards(shards: Path) -> None:
    (shards / "shard-00000.tar").unlink()
    write_tar(shards / "shard-00007.tar", {"x.wav": wav(77)})
    cut = shards / "shard-00001.tar"
    cut.write_bytes(cut.read_bytes()[:20_000])
    (shards / "shard-00002.tar").write_bytes(b"x" * 5000)
    report = verify(shards)
    why = {(p.shard, p.why.split(":")[0]) for p in report.problems if p.kind == "shard"}
    assert why == {
        ("shard-00000.tar", "missing"),
        ("shard-00001.tar", "its sha256 is not the manifest's"),
        ("shard-00001.tar", "no end marker"),
        ("shard-00001.tar", "2 clips, the manifest says 4"),
        ("shard-00002.tar", "its sha256 is not the manifest's"),
        ("shard-00002.tar", f"{shards / 'shard-00002.tar'} is not a tar"),
        ("shard-00007.tar", "the manifest does not list it"),
    }
    assert found(report, "corrupt") == {"k6.wav": "cut short: the tar ends before it"}


def test_a_table_that_lies_is_found(shards: Path) -> None:
    tar = shards / "shard-00000.tar"
    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
    assert table is not None
    table.labels[0] = 1 - table.labels[0]
    table.save(tar.with_suffix(".idx.npz"))
    assert [p[1:] for p in verify(shards).problems] == [
        ("shard-00000.tar", "", "the table beside it (.idx.npz) tells otherwise: remove the table")
    ]


def test_a_manifest_that_lies_is_found(shards: Path) -> None:
    text = (shards / "manifest.json").read_text()
    told = json.loads(text)
    told["label_counts"] = [7, 5]
    told["folds"] = {"1": 12}
    (shards / "manifest.json").write_text(json.dumps(told))
    assert {p.why for p in verify(shards).problems} == {
        "its label_counts are not those of the clips",
        "its folds are not those of the clips",
    }
    (shards / "manifest.json").write_text(text[:-50])
    [problem] = verify(shards).problems
    assert (problem.kind, problem.shard) == ("shard", "manifest.json")
    assert "is damaged" in problem.why


def test_sub_folders_with_one_vocabulary(shards: Path, tmp_path: Path) -> None:
    shutil.move(shards, tmp_path / "all/train")
    other = tmp_path / "b.wav"
    other.write_bytes(wav(50))
    write_shards([Row(other, "b", ("bee",))], tmp_path / "all/test")
    report = verify(tmp_path / "all")
    assert (report.shards, report.clips) == (4, 13)
    assert [(p.shard, p.why) for p in report.problems if p.kind == "shard"] == [
        ("train/manifest.json", "its vocabulary is not that of the other folders")
    ]


def test_nothing_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        verify(tmp_path)


def test_manifest_survives(shards: Path) -> None:
    before = {p.name: p.read_bytes() for p in shards.iterdir()}
    verify(shards)
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == before
    assert Manifest.load(shards) is not None
