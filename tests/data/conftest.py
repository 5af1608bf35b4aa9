"""A toy set in shards, made once; a small set on a server of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bat.data.index import Index, open_index
from bat.shard.toy import make_toy
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.data.http_server import FaultyServer, wave


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"), seconds=0.5)


@pytest.fixture
def toy_index(toy_shards: Path) -> Index:
    return open_index(toy_shards)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "www").mkdir()
    with FaultyServer(tmp_path / "www") as running:
        yield running


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """12 clips in 4 shards, ours, in the server's ``set``; the index as it is here."""
    (tmp_path / "files").mkdir()
    rows = []
    for i in range(12):
        path = tmp_path / f"files/{i}.wav"
        path.write_bytes(wave(i))
        rows.append(Row(path, f"k{i:02d}", ("ab"[i % 2],)))
    write_shards(rows, tmp_path / "www/set", shard_bytes=17_000)
    return tmp_path / "www/set"
