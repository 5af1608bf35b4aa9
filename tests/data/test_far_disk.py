"""A remote set and the local disk: what is fetched ahead, what goes, what does not fit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bat.data import far, index
from bat.data.index import open_index
from bat.data.sources import Patience
from bat.errors import UserError
from tests.data.http_server import FaultyServer, wave


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "Patience", lambda *_, **__: Patience(3, 0.5, 0.01))


def test_prefetch_fetches_in_the_background_what_the_cache_holds(
    server: FaultyServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(open_index(shards).shard_bytes.max())
    there = open_index(f"{server.url}/set", cache=tmp_path / "c", cache_bytes=3 * size + 100)
    assert not there.fits
    tars = tmp_path / "c/remote"

    def wait_for(name: str) -> None:
        until = time.monotonic() + 10
        while not list(tars.glob(f"{name}*.tar")):
            assert time.monotonic() < until
            time.sleep(0.01)

    jobs: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(there._far._ahead, "want", lambda found: jobs.append(len(found)))
        there.prefetch([3, 2, 1, 0])
        there.prefetch([2, 2])
        there.prefetch([])
    assert jobs == [1, 1, 0]  # half of the cache; each once
    server.faults["set/shard-00003.tar"] = ["500*"]
    for number in (3, 2):  # 3 fails, quietly
        there.prefetch([number])
    wait_for("shard-00002")
    server.requests.clear()
    assert there.read(6).data == wave(6)
    assert server.requests == []
    pid = os.fork()
    if pid == 0:  # a child has no thread of its parent's: it starts its own
        there.prefetch([1])
        wait_for("shard-00001")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert there.read(3).data == wave(3)
    assert server.count("set/shard-00001.tar") == 1


def test_the_least_recently_used_shard_goes(
    server: FaultyServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bat.data.cache.TOUCH_SECONDS", 0.0)
    room = int(np.sort(open_index(shards).shard_bytes)[-2:].sum())
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache", cache_bytes=room)
    for clip in (0, 3, 0, 6):  # shards 0, 1, 0, 2: 1 goes
        there.read(clip)
        time.sleep(0.02)
    kept = sorted(p.name[:11] for p in (tmp_path / "cache/remote").glob("*.tar"))
    assert kept == ["shard-00000", "shard-00002"]
    (damaged,) = (tmp_path / "cache/remote").glob("shard-00000*.tar")
    os.truncate(damaged, 100)
    assert there.read(1).data == wave(1)  # fetched anew


def test_a_cache_disk_that_is_full_says_so(
    server: FaultyServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")

    def full(*_: Any, **__: Any) -> Iterator[bytes]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(far, "stream", full)
        with pytest.raises(OSError, match=r"the disk of the cache .* is full"):
            there.read(0)
    assert there.read(0).data == wave(0)  # not remembered as unreachable


def test_the_disk_does_not_decide_the_order(
    server: FaultyServer,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes, free = open_index(shards).shard_bytes, 1 << 40
    usage = "bat.data.cache.shutil.disk_usage"
    monkeypatch.setattr(usage, lambda _: SimpleNamespace(free=free))
    source = f"{server.url}/set"
    need = 2 * int(sizes.max())
    for free, warns in ((1 << 40, 0), (need, 1)):
        caplog.clear()
        there = open_index(source, cache=tmp_path / "cache")
        assert there.fits
        assert [r.message.count(f"room for {free} bytes") for r in caplog.records] == [1] * warns
    assert not open_index(source, cache=tmp_path / "cache", cache_bytes=need).fits
    free = need - 1
    says = rf"room for {free} bytes, data.cache_gb=100 is more, .* two .*data.cache to a folder"
    with pytest.raises(UserError, match=says):
        open_index(source, cache=tmp_path / "cache")
    one = f"{source}/shard-00000.tar"  # the set itself is smaller
    assert open_index(one, cache=tmp_path / "cache").read(0).data == wave(0)
    free = need - int(sizes[0])  # with what the cache could give back
    assert len(open_index(source, cache=tmp_path / "cache")) == 12


@pytest.mark.parametrize("cache", ["/dev/null", "/dev/null/x", "/proc/x"])
def test_a_cache_that_cannot_be_written_is_named(
    server: FaultyServer, shards: Path, cache: str
) -> None:
    with pytest.raises(UserError, match=rf"{cache}/remote cannot be written .* set data\.cache"):
        open_index(f"{server.url}/set", cache=Path(cache))
