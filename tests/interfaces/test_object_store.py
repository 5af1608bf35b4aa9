"""Embeddings of shards in a bucket, written to a bucket in parts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.data.parts import Part
from bat.data.store import Store
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.interfaces.embed import embed_files
from bat.shard.write import write_shards
from bat.types import Grid
from tests.shard.files import noise, recording
from tests.stores import BUCKET


@pytest.mark.parametrize("name", ["e.npz", "folder"])
def test_embed__bucket_to_bucket_equals_here(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    encoder = BAT(width=16, depth=1, heads=2, grid=Grid(13, 8)).eval()
    rows = [recording(tmp_path / f"in/{i}.wav", noise(i, 0.2 + i / 10)) for i in range(5)]
    write_shards(rows, f"{BUCKET}/set", shard_bytes=30_000)
    write_shards(rows, tmp_path / "set", shard_bytes=30_000)
    embed_files([tmp_path / "set"], tmp_path / name, checkpoint=encoder, batch=1)
    out = f"{BUCKET}/{name}"
    embed_files([f"{BUCKET}/set"], out, checkpoint=encoder, batch=1, part=Part(2, 2))
    assert Store(f"{out}.parts").sizes()
    with pytest.raises(UserError, match=r"2 of 5 blocks are missing"):
        embed_files([f"{BUCKET}/set"], out, checkpoint=encoder, batch=1, join_only=True)
    embed_files([f"{BUCKET}/set"], out, checkpoint=encoder, batch=1)
    assert not Store(f"{out}.parts").sizes()
    store, here = Store(BUCKET if name == "e.npz" else out), tmp_path / name
    if name == "folder":
        for file in sorted(here.glob("*.npy")):
            assert store.read(file.name) == file.read_bytes()
        assert json.loads(store.read("manifest.json"))["results"] == 5
    else:
        one, other = np.load(here), np.load(io.BytesIO(store.read(name)))
        np.testing.assert_array_equal(one["embedding"], other["embedding"])
    embed_files([f"{BUCKET}/set"], out, checkpoint=encoder, batch=1)  # nothing to do
    with pytest.raises(UserError, match="layer is 1"):
        embed_files([f"{BUCKET}/set"], out, checkpoint=encoder, batch=1, layer=1)
