"""Work in the background: in order, each thing once at a time, whatever one of them raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from bat.data.ahead import THREADS, Ahead


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

    ahead = Ahead(do)
    ahead.want(range(2 * THREADS))
    until(lambda: len(done) == 2 * THREADS)
    ahead.want([10, 11])
    until(lambda: len(done) == 2 * THREADS + 2)
    assert sorted(done) == [*range(2 * THREADS), 10, 11]
    assert sum(record.exc_info is not None for record in caplog.records) == 2 * THREADS


def test_a_new_list_replaces_what_waits_and_does_nothing_twice_at_once() -> None:
    begun, go = list[int](), {0: threading.Event(), 1: threading.Event()}

    def do(number: int) -> None:
        begun.append(number)
        if number in go:
            assert go[number].wait(10)

    ahead = Ahead(do)
    ahead.want([0, 1, 2, 3])
    until(lambda: len(begun) == 2)
    ahead.want([0, 1, 5, 6])
    go[1].set()
    until(lambda: len(begun) == 4)  # the other thread is still at 0, this one does not wait for it
    assert begun[2:] == [5, 6]
    go[0].set()
    until(lambda: not ahead._busy)
    ahead.want([1])
    until(lambda: begun.count(1) == 2)
