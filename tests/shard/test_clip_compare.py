"""All clips against each other: twins, leaks, missing labels, labels with two numbers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.shard import verify as verify_module
from bat.shard.verify import Report, verify

Members = dict[str, bytes]


def wav(seed: int) -> bytes:
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, 800)
    return encode(wave, sample_rate=16_000, codec="wav")


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def found(report: Report, kind: str) -> dict[str, str]:
    return {p.key: p.why for p in report.problems if p.kind == kind}


def test_twins_of_one_label_are_reported_and_fit(tmp_path: Path) -> None:
    members = {"a.wav": wav(1), "b.wav": wav(1), "c.wav": wav(1), "d.wav": wav(2)}
    members |= {"a.json": b'{"label": ["x", "y"]}', "b.json": b'{"label": ["y", "x", "y"]}'}
    members["c.json"] = members["d.json"] = members["a.json"]
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert found(report, "duplicate") == dict.fromkeys("bc", "the same audio as s.tar/a")
    assert report.ok
    assert report.hashed == 0


def test_a_key_twice_in_two_splits_leaks(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/s.tar", {"a.wav": wav(1), "b.wav": wav(3)})
    write_tar(tmp_path / "test/s.tar", {"a.wav": wav(2), "b.wav": wav(3)})
    report = verify(tmp_path)
    assert [p[1:] for p in report.problems] == [
        ("train/s.tar", "b", "the same audio as test/s.tar/b (leak: splits test and train)"),
        ("train/s.tar", "a", "the key is taken by test/s.tar/a (leak: splits test and train)"),
    ]


def test_without_a_vocabulary_the_majority_numbers_the_labels(tmp_path: Path) -> None:
    metas = [("a", 0), ("a", 0), ("a", 5), ("b", 1), ("b", 1), ("c", 1), ("d", 3)]
    members: Members = {}
    for i, (label, number) in enumerate(metas):
        members[f"{i}.wav"] = wav(i)
        members[f"{i}.json"] = json.dumps({"label": [label], "label_id": [number]}).encode()
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert found(report, "label") == {
        "2": "label_id 5 for 'a', mostly 0",
        "5": "label_id 1 for 'c' and 'b'",
    }
    assert not report.ok


def test_few_labels_are_no_fault(tmp_path: Path) -> None:
    members = {"a.wav": wav(1), "a.json": b'{"label": "x"}', "b.wav": wav(2), "c.wav": wav(3)}
    write_tar(tmp_path / "s.tar", members)
    assert verify(tmp_path).problems == []


def test_only_the_first_findings_are_kept_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "KEPT", 2)
    same, zeros = wav(1), encode(np.zeros(800), sample_rate=16_000, codec="wav")
    members = {f"a{i}.wav": same for i in range(6)} | {f"z{i}.wav": zeros for i in range(4)}
    write_tar(tmp_path / "s.tar", members)
    report = verify(tmp_path)
    assert (report.counts["duplicate"], report.counts["silent"]) == (5, 4)
    assert list(found(report, "duplicate")) == ["a1", "a2"]
    assert list(found(report, "silent")) == ["z0", "z1"]
    told = json.loads(report.json())
    assert told["counts"]["duplicate"] == 5
    assert len(told["problems"]) == 4
    assert told["ok"] is True
    assert "  ... and 3 more (--json FILE lists them)" in report.text()
