"""The local cache of remote shards: one fetch, bounded, patient with what fails."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

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


class Disk:
    """A disk of ``total`` bytes under ``folder``: fetches of 1 to 100 bytes of a shard each fail
    once it is full."""

    def __init__(self, folder: Path, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.total, self.lock, self.full = folder, total, threading.Lock(), 0
        monkeypatch.setattr(
            "bat.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=self.free())
        )

    def free(self) -> int:
        sizes = []
        for path in self.folder.glob("*-*.*"):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return self.total - sum(sizes)

    def fetch(self, part: Path, again: bool) -> None:
        name, _, size = part.stem.rpartition("-")
        while (at := part.stat().st_size) < int(size):
            with self.lock:
                if self.free() < 10:
                    self.full += 1
                    raise OSError(errno.ENOSPC, "No space left on device")
                with part.open("ab") as file:
                    file.write(content(name, int(size))[at : at + 10])
            time.sleep(0.001)

    def read(self, cache: ShardCache, name: str, size: int) -> bytes:
        fd = cache.open(name, size, self.fetch)
        try:
            return os.pread(fd, size, 0)
        finally:
            os.close(fd)


def test_a_disk_smaller_than_the_cache_may_be_makes_shards_go_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 250, monkeypatch)
    cache = ShardCache(tmp_path, max_bytes=1 << 60)
    assert (cache.max_bytes, cache.room()) == (1 << 60, 250)  # what is promised; what there is
    for name in "abcab":
        assert disk.read(cache, name, 100) == content(name, 100)
        assert disk.free() >= 50
    assert cache.room() == 250
    assert disk.full == 0  # room was made before
    (tmp_path / "somebody-elses.bin").write_bytes(b"x" * 180)
    with pytest.raises(OSError, match=r"is full \(0 bytes free, a shard has 100\): make room"):
        disk.read(cache, "d", 100)
    assert not list((tmp_path / "failed").iterdir())  # no fault of the server


def test_a_disk_that_fills_up_during_a_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 300, monkeypatch)
    cache = ShardCache(tmp_path, max_bytes=1 << 60)
    disk.read(cache, "a", 100)
    begun: list[int] = []

    def fetch(part: Path, again: bool) -> None:
        begun.append(part.stat().st_size)
        disk.total = 150  # somebody else's
        disk.fetch(part, again)

    os.close(cache.open("b", 100, fetch))
    assert begun == [0, 50]  # a went, b went on
    assert [p.name for p in tmp_path.glob("*.tar")] == ["b-100.tar"]


def test_fetches_that_share_a_full_disk_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, cache = Disk(tmp_path, 150, monkeypatch), ShardCache(tmp_path, max_bytes=1 << 60)
    with ThreadPoolExecutor(3) as pool:
        reads = {name: pool.submit(disk.read, cache, name, 100) for name in "abc"}
        for name, read in reads.items():
            assert read.result(20) == content(name, 100)


def test_a_new_run_tries_anew_what_failed(tmp_path: Path) -> None:
    tries: list[bool] = []

    def fetch(part: Path, again: bool) -> None:
        tries.append(again)
        raise OSError(5, "no answer")

    cache = ShardCache(tmp_path, max_bytes=1000, hold_seconds=90)
    with pytest.raises(OSError, match="no answer; tried again after 90 s, or by the next run"):
        cache.open("a", 100, fetch)
    with pytest.raises(OSError, match=r"no answer; tried again after (90|89) s, or"):
        cache.open("a", 100, fetch)
    cache.forgive(["b"])
    with pytest.raises(OSError, match="no answer"):
        cache.open("a", 100, fetch)
    assert tries == [False]
    cache.forgive(["a", "b"])
    with pytest.raises(OSError, match="no answer; tried again after 90 s"):
        cache.open("a", 100, fetch)
    assert tries == [False, False]


def test_an_ending_run_waits_for_nothing_and_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetches = ShardCache(tmp_path, max_bytes=150), Fetches(100, slow="a")

    def fetch(part: Path, again: bool) -> None:
        raise OSError(errno.ECANCELED, "the run is ending")

    with pytest.raises(OSError, match="the run is ending"):
        cache.open("b", 100, fetch)
    assert not list((tmp_path / "failed").iterdir())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetches.read, cache, "a")
        while not fetches.begun:
            time.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr("bat.data.ending.ending", lambda: True)
            for name in "ab":  # its lock; its room
                with pytest.raises(OSError, match="the run is ending"):
                    fetches.read(cache, name)
        fetches.go.set()
        assert first.result(10) == content("a", 100)
