"""A remote set as an index: tables, the local cache, faults, workers."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from bat.data import index
from bat.data.index import Index, NotIndexable, open_index
from bat.data.sources import RetryPolicy, find
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from tests.data.http_server import FaultyServer, wave
from tests.data.test_index import tar_of

QUICK = RetryPolicy(retries=3, timeout_seconds=0.5, backoff_seconds=0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        index, "RetryPolicy", lambda *_, redirects: QUICK._replace(redirects=redirects)
    )


def same(here: Index, there: Index) -> bool:
    clips = range(len(here))
    return here.hash == there.hash and all(here.read(i) == there.read(i) for i in clips)


def test_a_remote_set_is_the_local_one(server: FaultyServer, shards: Path, tmp_path: Path) -> None:
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


def test_a_set_without_tables_is_fetched_and_scanned_where_it_fits(
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
    there = open_index(source, cache=tmp_path / "cache")
    assert same(here, there)
    server.requests.clear()
    assert same(here, open_index(source, cache=tmp_path / "cache"))
    assert not [name for name, _ in server.requests if name.endswith(".tar")]


def test_the_many_ways_to_name_remote_shards(
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
    (shards / "manifest.json").write_text(json.dumps({"source": 1}))
    with pytest.raises(UserError, match=r"/set/manifest.json is damaged"):
        names(f"{server.url}/set")


def test_a_table_from_elsewhere_is_not_trusted(
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
        cache = tmp_path / f"{field}{value}"
        there = open_index(source, cache=cache)
        assert there.offset.tolist() == good.clips["offset"].tolist()  # scanned instead
        assert there.read(0).data == wave(0)


def test_what_the_manifest_says_is_checked(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    tar = shards / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    with pytest.raises(OSError, match=r"shard-00001.tar has another sha256 than its manifest"):
        there.read(3)
    assert there.read(0).data == wave(0)
    assert not list((tmp_path / "cache/remote").glob("*.part"))


def test_remote_shards__one_out_of_reach_leaves_the_others(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00001.tar"] = ["500*"]
    for _ in range(20):
        with pytest.raises(OSError, match=r"shard-00001.tar cannot be reached: HTTP 500 \(3 tri"):
            there.read(4)
    assert server.count("set/shard-00001.tar") == 3
    assert [there.read(i).data for i in (0, 6, 9)] == [wave(0), wave(6), wave(9)]
    server.faults.clear()
    later = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    assert later.read(3).data == wave(3)


def test_a_shard_that_changed_is_not_mistaken_for_the_old_one(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    (shards / "manifest.json").unlink()
    source, tar = f"{server.url}/set/shard-00000.tar", shards / "shard-00000.tar"
    old = open_index(source, cache=tmp_path / "cache")
    assert old.read(0).data == wave(0)
    data, at = bytearray(tar.read_bytes()), int(old.offset[0])
    data[at : at + len(wave(9))] = wave(9)
    tar.write_bytes(data)  # same size, same table
    assert open_index(source, cache=tmp_path / "cache").read(0).data == wave(9)


class Reads(Dataset[tuple[int, bytes]]):
    def __init__(self, index: Index) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        return os.getpid(), self.index.read(i).data


def test_two_forked_workers_share_a_cache_smaller_than_the_set(
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
    seen = [item for _ in range(3) for batch in loader for item in batch]
    assert len({pid for pid, _ in seen}) == 6
    assert sorted(d for _, d in seen) == sorted([wave(i) for i in range(12)] * 3)
    held = sum(p.stat().st_size for p in (tmp_path / "cache/remote").glob("*.tar"))
    assert 0 < held <= room
    assert not list((tmp_path / "cache/remote").glob("*.part"))


def test_local_and_remote_sets_mix(server: FaultyServer, shards: Path, tmp_path: Path) -> None:
    tar_of(tmp_path / "more/x.tar", {"mine.wav": wave(50)})
    both = open_index([tmp_path / "more", f"{server.url}/set"], cache=tmp_path / "cache")
    assert both.source.tolist() == [0] + [1] * 12
    assert both.read(0).data == wave(50)
    assert both.read(12).data == wave(11)


def another(tar: Path) -> bytes:
    """Its bytes with the samples of every clip turned upside down: the same size and headers."""
    data = bytearray(tar.read_bytes())
    for clip in scan(tar).clips:
        samples = slice(int(clip["offset"]) + 44, int(clip["offset"] + clip["size"]))
        data[samples] = bytes(255 - byte for byte in data[samples])
    return bytes(data)


def test_a_shard_without_a_hash_that_changes_is_not_read(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    (shards / "manifest.json").unlink()
    tar = shards / "shard-00000.tar"
    there = open_index(f"{server.url}/set/shard-00000.tar", cache=tmp_path / "cache")
    tar.write_bytes(another(tar))
    with pytest.raises(OSError, match=r"shard-00000\.tar was changed on the server: start the run"):
        there.read(0)


def test_redirects_are_followed_where_the_index_is_told(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    with FaultyServer(tmp_path / "www") as second:
        for path in shards.iterdir():
            second.redirects[f"set/{path.name}"] = f"{server.url}/set/{path.name}"
        with pytest.raises(UserError, match=r"data\.redirects=\[127\.0\.0\.1\]"):
            open_index(f"{second.url}/set", cache=tmp_path / "cache")
        how: Any = {"cache": tmp_path / "cache", "redirects": ["127.0.0.1"]}
        assert open_index(f"{second.url}/set", **how).read(0).data == wave(0)


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
        prefetcher = there._remote_shards._prefetcher
        patch.setattr(prefetcher, "want", lambda found: jobs.append(len(found)))
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
