"""The local cache of remote shards: one fetch, bounded; what is fetched in the background."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from bat.data.cache import THREADS, Prefetcher, ShardCache


def content(name: str, size: int) -> bytes:
    return (name.encode() * size)[:size]


class Fetches:
    """Fetches that count themselves; those of ``slow`` names wait for ``go``."""

    def __init__(self, size: int, slow: str = "") -> None:
        self.size, self.slow, self.go, self.begun = size, slow, threading.Event(), list[str]()

    def read(self, cache: ShardCache, name: str) -> bytes:
        def fetch(part: Path) -> None:
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

    def fetch(part: Path) -> None:
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


def test_too_large_for_the_cache(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="200 bytes do not fit in a cache of 150"):
        Fetches(200).read(ShardCache(tmp_path, max_bytes=150), "a")


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


def disk(folder: Path, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of ``total`` bytes under ``folder``."""

    def free(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=total - sum(p.stat().st_size for p in folder.glob("*-*.*")))

    monkeypatch.setattr("bat.data.cache.shutil.disk_usage", free)


def test_cache__small_disk_makes_shards_go_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(tmp_path, 250, monkeypatch)
    cache, fetches = ShardCache(tmp_path, max_bytes=1 << 60), Fetches(100)
    assert cache.room() == 250
    for name in "abcab":
        assert fetches.read(cache, name) == content(name, 100)
        assert len(list(tmp_path.glob("*.tar"))) <= 2
    assert cache.room() == 250
    (tmp_path / "somebody-elses.bin").write_bytes(b"x" * 180)
    for _ in range(2):  # it is not remembered as unreachable
        with pytest.raises(OSError, match=r"is full \(70 bytes free, a shard has 100\): make room"):
            fetches.read(cache, "d")
    (tmp_path / "somebody-elses.bin").unlink()
    assert fetches.read(cache, "d") == content("d", 100)


def test_cache__disk_that_fills_up_during_a_fetch_is_named(tmp_path: Path) -> None:
    def fetch(part: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"the disk of the cache .* is full .*data\.cache"):
        ShardCache(tmp_path, max_bytes=1000).open("a", 100, fetch)
    assert not list(tmp_path.glob("*.part"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_error_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def do(number: int) -> None:
        done.append(number)
        if number < 2 * THREADS:
            raise ValueError(f"bug {number}")

    prefetcher = Prefetcher(do)
    prefetcher.want(range(2 * THREADS))
    until(lambda: len(done) == 2 * THREADS)
    prefetcher.want([10, 11])
    until(lambda: len(done) == 2 * THREADS + 2)
    assert sorted(done) == [*range(2 * THREADS), 10, 11]
    assert sum(record.exc_info is not None for record in caplog.records) == 2 * THREADS


def test_a_new_list_replaces_what_waits_and_does_nothing_twice_at_once() -> None:
    begun, go = list[int](), {0: threading.Event(), 1: threading.Event()}

    def do(number: int) -> None:
        begun.append(number)
        if number in go:
            assert go[number].wait(10)

    prefetcher = Prefetcher(do)
    prefetcher.want([0, 1, 2, 3])
    until(lambda: len(begun) == 2)
    prefetcher.want([0, 1, 5, 6])
    go[1].set()
    until(lambda: len(begun) == 4)  # the other thread is still at 0, this one does not wait for it
    assert begun[2:] == [5, 6]
    go[0].set()
    until(lambda: not prefetcher._busy)
    prefetcher.want([1])
    until(lambda: begun.count(1) == 2)
