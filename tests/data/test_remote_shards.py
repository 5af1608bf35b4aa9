"""A remote set as an index: tables, the local cache, faults, workers."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from bat.data import index
from bat.data.index import Index, NotIndexable, open_index
from bat.data.sources import Patience, find
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from tests.data.http_server import FaultyServer, wave
from tests.data.test_index import tar_of

QUICK = Patience(retries=3, timeout_seconds=0.5, backoff_seconds=0.01)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        index, "Patience", lambda *_, redirects: QUICK._replace(redirects=redirects)
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
    assert {asked for _, asked in server.requests} <= {"bytes=0-0", ""}
    assert all(name.endswith(".tar") for name, asked in server.requests if asked)


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


def test_a_shard_out_of_reach_is_left_alone_for_a_while(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00001.tar"] = ["500*"]
    with pytest.raises(OSError, match=r"shard-00001.tar cannot be reached: HTTP 500 \(3 tries\)"):
        there.read(3)
    assert server.count("set/shard-00001.tar") == 3
    start = time.perf_counter()
    for _ in range(20):
        with pytest.raises(OSError, match="cannot be reached: HTTP 500"):
            there.read(4)
    other = pickle.loads(pickle.dumps(there))  # another process of this machine
    with pytest.raises(OSError, match="cannot be reached: HTTP 500"):
        other.read(5)
    assert time.perf_counter() - start < 0.5
    assert server.count("set/shard-00001.tar") == 3
    assert [there.read(i).data for i in (0, 6, 9)] == [wave(0), wave(6), wave(9)]
    there._far.cache.hold_seconds = 0  # later: one try, not three
    with pytest.raises(OSError, match=r"HTTP 500 \(1 tries\)"):
        there.read(3)
    server.faults.clear()
    assert there.read(3).data == wave(3)
    assert not list((tmp_path / "cache/remote/failed").iterdir())


def test_a_new_run_asks_the_server_anew(server: FaultyServer, shards: Path, tmp_path: Path) -> None:
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00001.tar"] = ["500*"]
    with pytest.raises(OSError, match=r"HTTP 500 \(3 tries\); tried again after 60 s, or by the"):
        there.read(3)
    server.faults.clear()
    with pytest.raises(OSError, match="HTTP 500"):
        there.read(3)
    assert open_index(f"{server.url}/set", cache=tmp_path / "cache").read(3).data == wave(3)


def test_a_fetch_that_was_cut_off_goes_on_in_another_run(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00000.tar"] = ["drop:4000", "500*"]
    with pytest.raises(OSError, match="cannot be reached"):
        there.read(0)
    (part,) = (tmp_path / "cache/remote").glob("*.part")
    assert part.stat().st_size == 4000
    server.faults.clear()
    server.requests.clear()
    later = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    later._far.cache.hold_seconds = 0
    assert later.read(0).data == wave(0)
    assert ("set/shard-00000.tar", "bytes=4000-") in server.requests


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


def test_a_shard_that_changes_between_two_requests_is_fetched_from_the_start(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    """The manifest tells the hash of the new one."""
    tar = shards / "shard-00000.tar"
    right, wrong = tar.read_bytes(), another(tar)
    tar.write_bytes(wrong)
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00000.tar"] = ["drop:4000"]
    server.requests.clear()
    server.before[2] = lambda: tar.write_bytes(right)
    assert there.read(0).data == wave(0)


def test_the_beginning_of_another_version_from_an_earlier_run_is_thrown_away(
    server: FaultyServer, shards: Path, tmp_path: Path
) -> None:
    tar = shards / "shard-00000.tar"
    right = tar.read_bytes()
    tar.write_bytes(another(tar))
    there = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    server.faults["set/shard-00000.tar"] = ["drop:4000", "500*"]
    with pytest.raises(OSError, match="cannot be reached"):
        there.read(0)
    server.faults.clear()
    tar.write_bytes(right)
    later = open_index(f"{server.url}/set", cache=tmp_path / "cache")
    assert later.read(0).data == wave(0)


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
