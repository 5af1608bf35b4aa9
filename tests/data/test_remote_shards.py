"""A remote set as an index: tables, the local cache, faults, workers, prefetching."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from bat.data import index
from bat.data.index import Index, NotIndexable, open_index
from bat.data.remote_shards import ShardCache
from bat.data.sources import RetryPolicy, find
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from tests.data.http_server import FaultyServer, wave
from tests.processes import until
from tests.shard.files import write_tar

QUICK = RetryPolicy(retries=3, timeout_seconds=0.5, backoff_seconds=0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        index, "RetryPolicy", lambda *_, redirects: QUICK._replace(redirects=redirects)
    )


# ---- the cache


class Fetches:
    """Fetches that are recorded; those of ``slow`` names wait for ``go``."""

    def __init__(self, size: int, slow: str = "") -> None:
        self.size, self.slow, self.go, self.begun = size, slow, threading.Event(), list[str]()

    def read(self, cache: ShardCache, name: str) -> bytes:
        def fetch(part: Path) -> None:
            self.begun.append(name)
            if name in self.slow:
                assert self.go.wait(10)
            part.write_bytes(name.encode() * self.size)

        fd = cache.open(name, self.size, fetch)
        try:
            return os.pread(fd, self.size, 0)
        finally:
            os.close(fd)


def test_cache__threads_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    cache, fetches = ShardCache(tmp_path, max_bytes=1000), Fetches(100, slow="a")
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(fetches.read, cache, "a") for _ in range(4)]
        time.sleep(0.1)
        fetches.go.set()
        assert [read.result(10) for read in reads] == [b"a" * 100] * 4
    assert fetches.begun == ["a"]


def test_cache__fetch_waits_for_room_that_another_holds(tmp_path: Path) -> None:
    (tmp_path / "abandoned-100.part").write_bytes(b"x" * 60)
    cache, fetches = ShardCache(tmp_path, max_bytes=150), Fetches(100, slow="a")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetches.read, cache, "a")
        until(lambda: fetches.begun == ["a"])
        second = pool.submit(fetches.read, cache, "b")
        time.sleep(0.1)
        assert fetches.begun == ["a"]  # b has no room while a arrives
        fetches.go.set()
        assert (first.result(10), second.result(10)) == (b"a" * 100, b"b" * 100)
    assert sorted(p.name for p in tmp_path.glob("*-*")) == ["b-100.tar"]
    with pytest.raises(OSError, match="200 bytes do not fit in a cache of 150"):
        Fetches(200).read(cache, "c")


def test_cache__unreachable_shard_is_left_alone_for_a_while(tmp_path: Path) -> None:
    cache, tries = ShardCache(tmp_path, max_bytes=1000, hold_seconds=0.3), list[Path]()

    def fetch(part: Path) -> None:
        tries.append(part)
        raise OSError(5, "no answer")

    for _ in range(3):
        with pytest.raises(OSError, match="no answer; tried again"):
            cache.open("a", 100, fetch)
    assert len(tries) == 1
    time.sleep(0.35)
    with pytest.raises(OSError, match="no answer"):
        cache.open("a", 100, fetch)
    assert len(tries) == 2
    assert not list(tmp_path.glob("*.part"))


def test_cache__full_disk_drops_shards_then_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=250 - sum(p.stat().st_size for p in tmp_path.glob("*-*.*")))

    monkeypatch.setattr("bat.data.remote_shards.shutil.disk_usage", usage)
    cache, fetches = ShardCache(tmp_path, max_bytes=1 << 60), Fetches(100)
    for name in "abcab":
        assert fetches.read(cache, name) == name.encode() * 100
        assert len(list(tmp_path.glob("*.tar"))) <= 2
    (tmp_path / "somebody-elses.bin").write_bytes(b"x" * 180)
    for _ in range(2):  # it is not remembered as unreachable
        with pytest.raises(OSError, match=r"the disk of the cache .* is full .*data\.cache"):
            fetches.read(cache, "d")
    (tmp_path / "somebody-elses.bin").unlink()
    assert fetches.read(cache, "d") == b"d" * 100

    def full(part: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"the disk of the cache .* is full"):
        cache.open("e", 100, full)


# ---- the index of a remote set


def same(here: Index, there: Index) -> bool:
    clips = range(len(here))
    return here.hash == there.hash and all(here.read(i) == there.read(i) for i in clips)


def test_remote_set__is_the_local_one(server: FaultyServer, shards: Path, tmp_path: Path) -> None:
    here = open_index(shards)
    assert len(here.shard_bytes) == 4
    server.requests.clear()
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    assert (there.remote, there.fits, len(there)) == (True, True, 12)
    assert there.vocabulary == here.vocabulary == ["a", "b"]
    asked = {name for name, _ in server.requests}
    assert not any(name.endswith(".tar") for name in asked)  # tables only
    assert same(here, there)
    assert there.shard_name(11) == "shard-00003.tar"
    server.requests.clear()
    again = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    assert same(here, pickle.loads(pickle.dumps(again)))
    assert {name for name, _ in server.requests} == {"set/manifest.json"}


def test_remote_set__without_tables_is_fetched_and_scanned_where_it_fits(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    here = open_index(shards)
    for path in [*shards.glob("*.npz"), shards / "manifest.json"]:
        path.unlink()
    source = f"{server.url}/set/shard-{{00000..00003}}.tar"
    with pytest.raises(NotIndexable, match=r"has no shard-00000.idx.npz of this bat .* the cache"):
        open_index(source, cache=tmp_path / "small", cache_bytes=int(here.shard_bytes[:2].sum()))
    with pytest.raises(NotIndexable, match="does not fit in the cache"):
        open_index(source, cache=tmp_path / "small", cache_bytes=100)
    assert same(here, open_index(source, cache=tmp_path / "cache"))
    server.requests.clear()
    assert same(here, open_index(source, cache=tmp_path / "cache"))
    assert not [name for name, _ in server.requests if name.endswith(".tar")]


def test_find__the_many_ways_to_name_remote_shards(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    def names(source: str) -> list[str]:
        return [str(shard.place).removeprefix(server.url) for shard in find(source, QUICK)]

    four = [f"/set/shard-0000{i}.tar" for i in range(4)]
    assert names(f"{server.url}/set/") == four
    assert names(f"{server.url}/set/shard-{{00001,00003}}.tar") == [four[1], four[3]]
    assert names(f"{server.url}/set/*2.tar") == [four[2]]
    (shards / "manifest.json").unlink()
    assert names(f"{server.url}/set") == four
    assert [s.split for s in find(server.url, QUICK)] == ["set"] * 4
    assert open_index(server.url, cache=tmp_path / "cache").splits == ["set"]
    with pytest.raises(UserError, match=r"no shard at .*none-"):
        names(f"{server.url}/set/none-*.tar")
    with pytest.raises(UserError, match=r"/none has no manifest.json and lists no .tar"):
        names(f"{server.url}/none")
    with pytest.raises(UserError, match=r"no shard at .*/none.tar"):
        open_index(f"{server.url}/none.tar", cache=tmp_path / "cache")
    (shards / "x.tar.gz").touch()
    with pytest.raises(UserError, match=r"set holds shard-00000\.tar and x\.tar\.gz: two kinds"):
        names(f"{server.url}/set")
    (shards / "manifest.json").write_text(json.dumps({"source": 1}))
    with pytest.raises(UserError, match=r"/set/manifest.json is damaged"):
        names(f"{server.url}/set")


def test_remote_set__table_from_elsewhere_is_not_trusted(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    good = ShardTable.load(shards / "shard-00000.idx.npz", shards / "shard-00000.tar")
    assert good is not None
    (shards / "manifest.json").unlink()
    source = f"{server.url}/set/shard-00000.tar"
    open_index(source, cache=tmp_path / "good")
    assert ("set/shard-00000.tar", "") not in server.requests  # the table is used
    for field, value in (("offset", -5), ("offset", 1 << 40), ("size", 1 << 40), ("codec", 99)):
        evil = ShardTable(**vars(good) | {"clips": good.clips.copy()})
        evil.clips[field][0] = value
        evil.save(shards / "shard-00000.idx.npz")
        there = open_index(source, cache=tmp_path / f"{field}{value}")
        assert there.offset.tolist() == good.clips["offset"].tolist()  # scanned instead
        assert there.read(0).data == wave(0)


def test_remote_set__bad_or_unreachable_shard_leaves_the_others(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    tar = shards / "shard-00002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    with pytest.raises(OSError, match=r"shard-00002.tar has another sha256 than its manifest"):
        there.read(6)
    server.faults["set/shard-00001.tar"] = ["500*"]
    for _ in range(20):
        with pytest.raises(OSError, match=r"shard-00001.tar cannot be reached: HTTP 500 \(3 tri"):
            there.read(4)
    assert server.count("set/shard-00001.tar") == 3
    assert [there.read(i).data for i in (0, 9)] == [wave(0), wave(9)]
    assert not list((tmp_path / "cache/remote").glob("*.part"))
    server.faults.clear()
    assert open_index(f"{server.url}/set", cache=tmp_path / "cache").read(3).data == wave(3)


def test_remote_set__shard_without_a_hash_that_changes_is_not_mistaken(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    (shards / "manifest.json").unlink()
    source, tar = f"{server.url}/set/shard-00000.tar", shards / "shard-00000.tar"
    old = open_index(source, cache=tmp_path / "cache")
    data, clip = bytearray(tar.read_bytes()), scan(tar).clips[0]
    data[int(clip["offset"]) : int(clip["offset"] + clip["size"])] = wave(9)
    tar.write_bytes(data)  # same size, same headers, same table
    with pytest.raises(OSError, match=r"shard-00000\.tar was changed on the server: start the run"):
        old.read(0)
    assert open_index(source, cache=tmp_path / "cache").read(0).data == wave(9)


class Reads(Dataset[tuple[int, bytes]]):
    def __init__(self, index: Index) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        return os.getpid(), self.index.read(i).data


def test_remote_set__two_forked_workers_share_a_cache_smaller_than_the_set(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    here = open_index(shards)
    room = int(np.sort(here.shard_bytes)[-2:].sum())
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache", cache_bytes=room)
    there.read(0)  # the parent has used its file system and its locks
    there.prefetch([1, 2])  # and a thread is at work while it forks
    loader = DataLoader(
        Reads(there), batch_size=2, num_workers=2, shuffle=True, collate_fn=list, timeout=60
    )
    seen = [item for _ in range(2) for batch in loader for item in batch]
    assert len({pid for pid, _ in seen}) == 4
    assert sorted(d for _, d in seen) == sorted([wave(i) for i in range(12)] * 2)
    held = sum(p.stat().st_size for p in (tmp_path / "cache/remote").glob("*.tar"))
    assert 0 < held <= room
    assert not list((tmp_path / "cache/remote").glob("*.part"))


def test_remote_set__mixes_with_local_ones(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "more/x.tar", {"mine.wav": wave(50)})
    both = open_index([tmp_path / "more", f"{server.url}/set"], cache=tmp_path / "cache")
    assert both.source.tolist() == [0] + [1] * 12
    assert both.read(0).data == wave(50)
    assert both.read(12).data == wave(11)


def test_remote_set__redirects_are_followed_where_the_index_is_told(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    with FaultyServer(tmp_path / "www") as second:
        for path in shards.iterdir():
            second.redirects[f"set/{path.name}"] = f"{server.url}/set/{path.name}"
        with pytest.raises(UserError, match=r"data\.redirects=\[127\.0\.0\.1\]"):
            open_index(f"{second.url}/set", cache=tmp_path / "cache")
        how: Any = {"cache": tmp_path / "cache", "redirects": ["127.0.0.1"]}
        assert open_index(f"{second.url}/set", **how).read(0).data == wave(0)


def test_remote_set__on_many_nodes_is_read_clip_by_clip(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    room = int(np.sort(open_index(shards).shard_bytes)[-2:].sum())
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache", cache_bytes=room)
    there.share_among(2)
    there.read(0)
    assert server.requests[-1] == ("set/shard-00000.tar", "")  # whole
    server.sends_parts = True
    there.share_among(64)
    there.prefetch([1, 2])
    server.requests.clear()
    assert [there.read(i).data for i in range(12)] == [wave(i) for i in range(12)]
    ranges = [
        (int(there.offset[i]) - 512, int(there.offset[i] + there.size[i]) - 1) for i in (3, 11)
    ]
    asked = [f"bytes={first}-{last}" for first, last in ranges]
    assert (server.requests[0][1], server.requests[-1][1]) == tuple(asked)
    assert len(server.requests) == 9  # shard 0 was in the cache
    server.faults["set/shard-00001.tar"] = ["500*"]
    with pytest.raises(OSError, match=r"shard-00001.tar cannot be reached: HTTP 500 \(3 tri"):
        there.read(4)
    server.faults.clear()
    server.sends_parts = False  # whole files again, and once each
    server.requests.clear()
    assert [there.read(i).data for i in (3, 4, 5)] == [wave(i) for i in (3, 4, 5)]
    assert [name for name, _ in server.requests] == ["set/shard-00001.tar"] * 2
    everything = open_index(f"{server.url}/set", cache=tmp_path / "large")
    everything.share_among(64)  # it fits: whole shards, once
    everything.read(3)
    assert list((tmp_path / "large/remote").glob("shard-00001*.tar"))


def test_prefetch__fetches_in_the_background_what_half_the_cache_holds(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    size = int(open_index(shards).shard_bytes.max())
    there = open_index(f"{server.url}/set", cache=tmp_path / "c", cache_bytes=5 * size // 2)
    assert not there.fits
    tars = tmp_path / "c/remote"
    server.faults["set/shard-00003.tar"] = ["500*"]
    there.prefetch([3])  # fails, quietly
    there.prefetch([2, 2, 1])
    until(lambda: list(tars.glob("shard-00002*.tar")))
    assert server.count("set/shard-00001.tar") == 0
    server.requests.clear()
    assert there.read(6).data == wave(6)
    assert server.requests == []
    pid = os.fork()
    if pid == 0:  # a child has no thread of its parent's: it starts its own
        there.prefetch([1])
        until(lambda: list(tars.glob("shard-00001*.tar")))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert there.read(3).data == wave(3)
    assert server.count("set/shard-00001.tar") == 1


def test_cache__least_recently_used_shard_goes_and_a_damaged_one_is_fetched_anew(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    room = int(np.sort(open_index(shards).shard_bytes)[-2:].sum())
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache", cache_bytes=room)
    for clip in (0, 3, 0, 6):  # shards 0, 1, 0, 2: 1 goes
        there.read(clip)
        time.sleep(0.02)
    kept = sorted(p.name[:11] for p in (tmp_path / "cache/remote").glob("*.tar"))
    assert kept == ["shard-00000", "shard-00002"]
    (damaged,) = (tmp_path / "cache/remote").glob("shard-00000*.tar")
    os.truncate(damaged, 100)
    assert there.read(1).data == wave(1)


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/x"])
def test_cache__that_cannot_be_written_is_named(
    server: FaultyServer, shards: Path, cache: str
) -> None:
    with pytest.raises(UserError, match=rf"{cache}/remote cannot be written .* set data\.cache"):
        open_index(f"{server.url}/set", cache=Path(cache))
