"""The local cache of remote shards: one fetch, bounded, patient with what fails."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bat.data.cache import ShardCache


def content(name: str, size: int) -> bytes:
    return (name.encode() * size)[:size]


class Fetches:
    """Fetches that count themselves; those of ``slow`` names wait for ``go``."""

    def __init__(self, size: int, slow: str = "") -> None:
        self.size, self.slow, self.go, self.begun = size, slow, threading.Event(), list[str]()

    def read(self, cache: ShardCache, name: str) -> bytes:
        def fetch(part: Path, again: bool) -> None:
            self.begun.append(name)
            if name in self.slow:
                assert self.go.wait(10)
            part.write_bytes(content(name, self.size))

        fd = cache.open(name, self.size, fetch)
        try:
            return os.pread(fd, self.size, 0)
        finally:
            os.close(fd)


def test_threads_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    cache, fetches = ShardCache(tmp_path, max_bytes=1000), Fetches(100, slow="a")
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(fetches.read, cache, "a") for _ in range(4)]
        time.sleep(0.1)
        fetches.go.set()
        assert [read.result(10) for read in reads] == [content("a", 100)] * 4
    assert fetches.begun == ["a"]


def test_processes_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path, max_bytes=1000), tmp_path / "log"

    def fetch(part: Path, again: bool) -> None:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        part.write_bytes(b"y" * 100)

    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if os.pread(cache.open("a", 100, fetch), 100, 0) == b"y" * 100 else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert log.read_text() == "x"


def test_a_fetch_waits_for_room_that_another_holds(tmp_path: Path) -> None:
    cache, fetches = ShardCache(tmp_path, max_bytes=150), Fetches(100, slow="a")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetches.read, cache, "a")
        while fetches.begun != ["a"]:
            time.sleep(0.01)
        second = pool.submit(fetches.read, cache, "b")
        time.sleep(0.1)
        assert fetches.begun == ["a"]  # b has no room while a arrives
        fetches.go.set()
        assert first.result(10) == content("a", 100)
        assert second.result(10) == content("b", 100)
    assert [p.name for p in tmp_path.glob("*.tar")] == ["b-100.tar"]


def test_a_dead_part_makes_room(tmp_path: Path) -> None:
    (tmp_path / "old-100.part").write_bytes(b"x" * 60)
    cache, fetches = ShardCache(tmp_path, max_bytes=150), Fetches(100)
    assert fetches.read(cache, "b") == content("b", 100)
    assert sorted(p.name for p in tmp_path.glob("*-*")) == ["b-100.tar"]


def test_what_fails_is_left_alone_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("bat.data.cache.time.time", lambda: now)
    cache = ShardCache(tmp_path, max_bytes=1000, hold_seconds=10)
    tries: list[bool] = []

    def fetch(part: Path, again: bool) -> None:
        tries.append(again)
        raise OSError(5, "no answer")

    for later, count in ((0, 1), (9, 1), (11, 2), (19, 2), (21, 3), (39, 3), (41, 4)):
        now = time.time_ns() / 1e9 + later  # the clock of the files goes on by itself
        with pytest.raises(OSError, match="no answer"):
            cache.open("a", 100, fetch)
        assert len(tries) == count, later
    assert tries == [False, True, True, True]


def test_too_large_for_the_cache(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="200 bytes do not fit in a cache of 150"):
        Fetches(200).read(ShardCache(tmp_path, max_bytes=150), "a")
    assert ShardCache(tmp_path, max_bytes=1 << 60).max_bytes < 1 << 50  # no more than the disk has
