"""The simulated order is that of real loaders; the simulated cache fetches what it must."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bat.data import draws
from bat.data.index import Index, open_index
from bat.data.loader import Loader
from bat.data.plan import Plan
from bat.data.stream import ClipDataset, PlanSampler
from tests.shard.files import WAV, write_tar

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BATCHES = 4


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "simulate.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("simulate")


@pytest.fixture
def index(tmp_path: Path) -> Index:
    for number in range(5):
        members = {f"Y{number}_{i}.wav": WAV for i in range(7)}
        write_tar(tmp_path / f"set/shard-{number}.tar", members)
    return open_index(tmp_path / "set")


def read(index: Index, plan: Plan, rank: int, world: int, out: Path) -> None:
    """One rank of a run: writes the keys of its micro-batches."""
    dataset = ClipDataset(index, sample_rate=16_000, clip_seconds=0.1, plan=plan)
    sampler = PlanSampler(plan, batch=12 // world, batches=BATCHES, rank=rank, world=world)
    loader = Loader(dataset, sampler, workers=1 if rank == 0 else 0)
    out.write_text(json.dumps([batch.keys for batch in loader]))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shuffle", ["exact", "window", "keyed"])
def test_simulated_order__is_that_of_real_loaders(
    tool: ModuleType, index: Index, tmp_path: Path, world: int, shuffle: str
) -> None:
    window = 10 if shuffle == "window" else None
    plan = Plan(35, seed=3, window=window, shard=index.shard, keyed=shuffle == "keyed")
    outs = [tmp_path / f"{rank}.json" for rank in range(world)]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=read, args=(index, plan, rank, world, out))
        for rank, out in enumerate(outs)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    real = [json.loads(out.read_text()) for out in outs]  # [rank][micro-batch]
    simulated = list(itertools.islice(tool.global_batches(plan, 12), BATCHES))
    for k, batch in enumerate(simulated):
        for rank in range(world):
            assert real[rank][k] == [index.key(clip) for clip in batch[rank::world]]
    keys = sorted(itertools.chain(*itertools.chain(*real)))[: 12 * BATCHES]
    assert set(keys) == {index.key(i) for i in range(35)}  # more than an epoch


def test_order__counts_every_clip_and_notices_one_twice(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["order", "--clips", "9000", "--ranks", "64", "--json", str(tmp_path / "a.json")]
    assert tool.main(words) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["order"]
    assert [row["once an epoch"] for row in rows] == [9000, 9000]
    assert all(row["sampled ranks equal the sampler"] for row in rows)
    original = draws.permuted
    monkeypatch.setattr("bat.data.plan.permuted", lambda *given: original(*given) // 2)
    assert tool.main(words) == 1


def test_fetch__one_node_fetches_once_and_many_nodes_each_everything(tool: ModuleType) -> None:
    shard = np.repeat(np.arange(200, dtype=np.int32), 100)
    plan = Plan(20_000, seed=0, window=1000, shard=shard)

    def fetched(ranks: int, cache_shards: int) -> float:
        batches = 20_000 // (32 * ranks)
        found = tool.follow_node(
            plan, shard, ranks=ranks, cache_shards=cache_shards, batches=batches
        )
        assert 0 < found["of those of an even batch"] <= 1.01
        return float(found["bytes fetched per byte read"])

    assert fetched(8, 30) == pytest.approx(1.0, abs=0.02)
    assert fetched(64, 30) == pytest.approx(8.0, abs=0.4)
    assert fetched(8, 3) > 20  # a cache that does not hold a window


def test_start__opens_a_mapped_index_in_little_memory(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bat.data.columns.MAX_MEMORY_BYTES", 1000)
    tool.write_set(tmp_path / "shards", 30_000, 1000)
    for shuffle in ("auto", "window"):
        row = tool.open_as_rank(tmp_path, 1000, shuffle, 64)
        assert row["private MB"] < 20
    index = open_index(tmp_path / "shards", cache=tmp_path / "cache")
    assert (len(index), index.key(12_345), index.labels(3)) == (30_000, "000012-0345", (3,))
    assert isinstance(index.offset.base, np.memmap)
