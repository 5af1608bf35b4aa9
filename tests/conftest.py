"""Fixtures shared by all tests: golden vectors and real data where they lie, small runs, shards."""

from __future__ import annotations

import base64
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.data.index import Index, open_index
from bat.shard.write import write_shards
from bat.tasks.base import Row
from tests.data.http_server import FaultyServer, wave
from tests.stores import s3, s3_server  # noqa: F401
from tests.toy import make_toy_shards

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # one test process a core: what the tests start gets one thread as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    *("test_two_processes", "test_chaos", "test_many_processes", "test_transcripts", "test_launch"),
    *("test_hybrid_sharding", "test_spawned_processes", "test_onnx", "test_notebook_and_docs"),
    *("test_ray", "test_planted_events", "test_hf", "test_bench", "test_pretrain"),
)
"""Files that take longest, begun first: else one process ends long before the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    last = len(LONGEST)
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, last))


SHARED = Path(__file__).resolve().parents[2] / "shared"
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(autouse=True, scope="session")
def _process() -> None:
    torch.set_num_threads(1 if WORKER else 2)
    gc.freeze()  # what was imported stays: a collection of the rest takes no 0.4 s


BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""


class BlankFigure(MagicMock):
    """Stands for matplotlib's: takes every call, draws nothing, saves ``BLANK``."""

    def subplots(self, rows: int, columns: int, **settings: object) -> np.ndarray:
        axis = MagicMock()
        axis.dataLim.y1 = 1.0
        axis.get_legend_handles_labels.return_value = ([], [])
        axes = np.empty((rows, columns), dtype=object)
        axes.fill(axis)
        return axes

    def savefig(self, path: str | Path) -> None:
        Path(path).write_bytes(BLANK)


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half the time of a small run: only the tests of pictures really draw."""
    if not {"report", "shard"} & set(request.path.parts) and "shard" not in request.path.name:
        import matplotlib.pyplot  # noqa: F401  (others import it: it must find the real Figure)

        what, by = "matplotlib.figure.Figure", BlankFigure
        if "transcripts" in request.path.name:  # drawn nowhere else, but not rendered
            what, by = f"{what}.savefig", BlankFigure.savefig
        monkeypatch.setattr(what, by)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden vectors; tests that need it skip where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden vectors (../shared/golden) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def esc10() -> Path:
    """Folder of ESC-10; tests that need it skip where it is absent."""
    folder = SHARED / "data" / "esc10"
    if not folder.is_dir():
        pytest.skip("ESC-10 (../shared/data/esc10) is not on this machine")
    return folder


@pytest.fixture
def docs_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """``docs_example("add_a_probe.md", "my_probes")`` makes the Python of a page importable as a
    module outside the package, and returns the page."""

    def save(page: str, module: str) -> str:
        if not DOCS.is_dir():
            pytest.skip("docs/ is not here: only a checkout has it")
        text = (DOCS / page).read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        folder = tmp_path / "modules"
        folder.mkdir()
        (folder / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return text

    return save


SMALL = [
    "recipe=toy",
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "objective.decoder_depth=1",
    "objective.mask.views=2",
    "train.steps=6",
    "train.log_every=2",
    "train.save_every=2",
    "train.keep=2",
    "online.every=0",
    "log.progress=false",
]


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pretrain]:
    """``small("key=value", ..., out=folder)`` -> configuration; the toy set is made once."""
    cache = tmp_path_factory.getbasetemp() / "shards"

    def build(*words: str, out: Path) -> Pretrain:
        own = [f"out={out}", f"data.cache={cache}"]
        merged = dict(w.split("=", 1) for w in [*SMALL, *own, *words])
        return compose(Pretrain, "pretrain", [f"{k}={v}" for k, v in merged.items()])

    return build


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_shards(tmp_path_factory.mktemp("toy"), seconds=0.5)


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
