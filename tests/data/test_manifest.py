"""The manifest: what it counts, and which it takes for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data.manifest import Manifest
from bat.errors import UserError
from bat.shard.write import write_shards
from bat.tasks.base import Row

RATE = 16_000


def silence(path: Path, *, seconds: float, rate: int, **more: Any) -> Row:
    path.write_bytes(encode(np.zeros(round(seconds * rate)), sample_rate=rate, codec="wav"))
    return Row(path, path.stem, **{"labels": (), **more})


def test_the_manifest_counts(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = [
        {"labels": ("a", "b"), "fold": 1, "split": "train"},
        {"labels": ("b",), "fold": 2, "split": "train"},
        {"labels": (), "split": "test"},
        {"labels": ("b",), "fold": 1},
    ]
    rows = [
        silence(tmp_path / f"{i}.wav", seconds=0.1 * (i + 1), rate=rate, **more)
        for i, (more, rate) in enumerate(zip(said, (8000, 8000, RATE, RATE), strict=True))
    ]
    manifest = write_shards(rows, tmp_path / "s", vocabulary=["c", "b", "a"], shard_bytes=8_000)
    assert manifest.vocabulary == ["c", "b", "a"]
    assert manifest.label_counts == [0, 3, 1]
    assert (manifest.splits, manifest.folds) == ({"test": 1, "train": 2}, {"1": 2, "2": 1})
    assert manifest.rates == {"8000": 2, "16000": 2}
    assert len(manifest.shards) > 1
    assert [s.seconds for s in manifest.shards][-1] == pytest.approx(0.4)
    assert manifest.seconds == pytest.approx(1.0)
    assert Manifest.load(tmp_path / "s") == manifest


def test_an_older_manifest_says_what_to_do(tmp_path: Path) -> None:
    old = {"shards": [], "source": "x", "version": 1, "clips": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="version 1, this bat reads 2: remove it and run bat-shard"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(old | {"version": 2}))
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(tmp_path)
