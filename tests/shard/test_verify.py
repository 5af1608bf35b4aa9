"""``verify``: each kind of damage is found and named, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.encode import encode
from bat.data.table import ShardTable
from bat.errors import UserError
from bat.shard import findings
from bat.shard.verify import Report, verify
from bat.shard.write import write_shards
from tests.shard.files import RATE, audio, noise, read_tar, recording, write_tar

Members = dict[str, bytes]
SILENCE = encode(np.zeros(3200), sample_rate=RATE, codec="wav")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve clips k0 .. k11 of two classes and two folds in three shards."""
    rows = [
        recording(
            tmp_path / f"in/k{i}.wav", noise(i), labels=(("dog", "cat")[i % 2],), fold=1 + i // 6
        )
        for i in range(12)
    ]
    manifest = write_shards(rows, tmp_path / "s", shard_bytes=40_000)
    assert [s.clips for s in manifest.shards] == [4, 4, 4]
    return tmp_path / "s"


def edit(tar: Path, change: Callable[[Members], object]) -> None:
    """Rewrites a tar with other members."""
    members = read_tar(tar)
    change(members)
    write_tar(tar, members)


def meta(members: Members, key: str, **fields: Any) -> None:
    members[f"{key}.json"] = json.dumps(json.loads(members[f"{key}.json"]) | fields).encode()


def found(report: Report, kind: str) -> dict[str, str]:
    return {p.key: p.why for p in report.problems if p.kind == kind}


def test_verify__good_shards_are_fit_and_unchanged(shards: Path) -> None:
    before = {p.name: p.read_bytes() for p in shards.iterdir()}
    report = verify(shards)
    assert report == verify(shards, jobs=2)
    assert report.ok
    assert (report.shards, report.hashed, report.clips, report.problems) == (3, 3, 12, [])
    assert report.seconds == pytest.approx(2.4)
    assert sum(report.counts.values()) == 0
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == before


@pytest.mark.parametrize("codec", ["flac", "wav", "ogg"])
def test_verify__cut_clip_is_corrupt(shards: Path, codec: str) -> None:
    data = audio(1, seconds=2, codec=codec)

    def change(m: Members) -> None:
        del m["k1.wav"]
        m[f"k1.{codec}"] = data[: len(data) * 2 // 3]
        meta(m, "k1", num_samples=2 * RATE)

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    assert not report.ok
    kind, _, _ = found(report, "corrupt")["k1"].partition(":")
    assert kind == ("corrupt" if codec == "flac" else "truncated")
    assert report.counts["label"] == report.counts["silent"] == 0


def test_verify__silent_clips_are_reported_and_no_duplicates(shards: Path) -> None:
    def change(m: Members) -> None:
        m["k0.wav"] = m["k3.wav"] = SILENCE
        m["k1.wav"] = audio(1, level=0.0009)
        m["k2.wav"] = audio(2, level=0.0012)

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    assert found(report, "silent") == {
        "k0": "peak all zeros",
        "k1": "peak -61 dBFS",
        "k3": "peak all zeros",
    }
    assert report.counts["duplicate"] == 0


def test_verify__duplicate_in_another_codec_with_another_label(shards: Path) -> None:
    def change(m: Members) -> None:
        del m["k2.wav"]
        m["k2.flac"] = audio(9, codec="flac")  # k9's audio, a cat's; k2 is a dog

    edit(shards / "shard-00000.tar", change)
    report = verify(shards)
    place = "shard-00000.tar/k2"
    assert found(report, "duplicate") == {"k9": f"the same audio as {place} (leak: folds 1 and 2)"}
    assert found(report, "label") == {"k9": f"labelled cat; {place}, the same audio, has dog"}
    assert not report.ok


def test_verify__duplicates_of_one_label_are_fit(tmp_path: Path) -> None:
    members: dict[str, Any] = {f"{key}.wav": audio(1) for key in "abc"} | {"d.wav": audio(2)}
    members |= {f"{key}.json": {"label": ["x", "y"]} for key in "acd"}
    members["b.json"] = {"label": ["y", "x", "y"]}
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert found(report, "duplicate") == dict.fromkeys("bc", "the same audio as s.tar/a")
    assert report.ok
    assert report.hashed == 0


def test_verify__same_key_or_audio_in_two_splits_leaks(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/s.tar", {"a.wav": audio(1), "b.wav": audio(3)})
    write_tar(tmp_path / "test/s.tar", {"a.wav": audio(2), "b.wav": audio(3)})
    assert [p[1:] for p in verify(tmp_path).problems] == [
        ("train/s.tar", "b", "the same audio as test/s.tar/b (leak: splits test and train)"),
        ("train/s.tar", "a", "the key is taken by test/s.tar/a (leak: splits test and train)"),
    ]


def test_verify__wrong_labels_and_lengths_are_named(shards: Path) -> None:
    def labels(m: Members) -> None:
        meta(m, "k0", label=["wolf"])
        meta(m, "k1", label_id=[1])
        meta(m, "k2", label=["dog", "cat"], label_id=[1])
        meta(m, "k3", label=[], label_id=[])

    def lengths(m: Members) -> None:
        meta(m, "k4", num_samples=3000)
        meta(m, "k5", sample_rate=8000, num_samples=1600)
        meta(m, "k6", num_samples="many")
        m["k7.json"] = b"no JSON"

    edit(shards / "shard-00000.tar", labels)
    edit(shards / "shard-00001.tar", lengths)
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


def test_verify__without_vocabulary_the_majority_numbers_the_labels(tmp_path: Path) -> None:
    labels = [("a", 0), ("a", 0), ("a", 5), ("b", 1), ("b", 1), ("c", 1), ("d", 3)]
    members: dict[str, Any] = {}
    for i, (label, number) in enumerate(labels):
        members |= {f"{i}.wav": audio(i), f"{i}.json": {"label": [label], "label_id": [number]}}
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert found(report, "label") == {
        "2": "label_id 5 for 'a', mostly 0",
        "5": "label_id 1 for 'c' and 'b'",
    }
    assert not report.ok


def test_verify__few_labelled_clips_are_no_fault(tmp_path: Path) -> None:
    members = {"a.wav": audio(1), "a.json": {"label": "x"}, "b.wav": audio(2), "c.wav": audio(3)}
    write_tar(tmp_path / "s.tar", members)
    assert verify(tmp_path).problems == []


def test_verify__changed_bit_fails_the_hash(shards: Path) -> None:
    path = shards / "shard-00002.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"RIFF") + 2000] ^= 1
    path.write_bytes(data)
    report = verify(shards)
    assert [p[1:] for p in report.problems] == [
        ("shard-00002.tar", "", "its sha256 is not the manifest's: it was changed")
    ]
    assert not report.ok


def test_verify__missing_unlisted_and_cut_shards_are_named(shards: Path) -> None:
    (shards / "shard-00000.tar").unlink()
    write_tar(shards / "shard-00007.tar", {"x.wav": audio(77)})
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


def test_verify__untrue_table_is_found(shards: Path) -> None:
    tar = shards / "shard-00000.tar"
    table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
    assert table is not None
    table.labels[0] = 1 - table.labels[0]
    table.save(tar.with_suffix(".idx.npz"))
    assert [p[1:] for p in verify(shards).problems] == [
        ("shard-00000.tar", "", "the table beside it (.idx.npz) tells otherwise: remove the table")
    ]


def test_verify__untrue_manifests_are_found(shards: Path, tmp_path: Path) -> None:
    text = (shards / "manifest.json").read_text()
    changed = json.loads(text) | {"label_counts": [7, 5], "folds": {"1": 12}}
    (shards / "manifest.json").write_text(json.dumps(changed))
    assert {p.why for p in verify(shards).problems} == {
        "its label_counts are not those of the clips",
        "its folds are not those of the clips",
    }
    (shards / "manifest.json").write_text(text[:-50])
    [problem] = verify(shards).problems
    assert (problem.kind, problem.shard) == ("shard", "manifest.json")
    assert "is damaged" in problem.why
    (shards / "manifest.json").write_text(text)
    shutil.move(shards, tmp_path / "all/train")
    write_shards([recording(tmp_path / "b.wav", noise(50), labels=("bee",))], tmp_path / "all/test")
    report = verify(tmp_path / "all")
    assert (report.shards, report.clips) == (4, 13)
    assert [(p.shard, p.why) for p in report.problems if p.kind == "shard"] == [
        ("train/manifest.json", "its vocabulary is not that of the other folders")
    ]


def test_verify__folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        verify(tmp_path)


def test_report__keeps_the_first_findings_and_counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "KEPT", 2)
    members = {f"a{i}.wav": audio(1) for i in range(6)} | {f"z{i}.wav": SILENCE for i in range(4)}
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert (report.counts["duplicate"], report.counts["silent"]) == (5, 4)
    assert list(found(report, "duplicate")) == ["a1", "a2"]
    assert list(found(report, "silent")) == ["z0", "z1"]
    read = json.loads(report.json())
    assert (read["counts"]["duplicate"], len(read["problems"]), read["ok"]) == (5, 4, True)
    assert "  ... and 3 more (--json FILE lists them)" in report.text()
