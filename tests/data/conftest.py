"""A toy set in shards, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bat.data.index import Index, open_index
from bat.data.toy import make_toy


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"), seconds=0.5)


@pytest.fixture
def toy_index(toy_shards: Path) -> Index:
    return open_index(toy_shards)
