"""How a loader's workers end, and what the training process hears of it."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from bat.data.index import Index
from bat.data.loader import RESTARTS, LastingLoader, Restarts
from bat.data.module import eval_loader
from bat.data.workers import kill_workers
from bat.errors import UserError
from tests.data.test_loader import echo, kill, numbers


def result_queue() -> Any:
    """Where torch's loop, in this process, puts its batches."""
    frame: Any = sys._getframe()
    while "data_queue" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["data_queue"]


def test_one_that_dies_inside_a_message_while_younger_loaders_live() -> None:
    """Their workers are forked with the queue of the older ones: its reader must not wait for
    them."""
    once, go = torch.zeros(1).share_memory_(), torch.zeros(1).share_memory_()

    def half(items: list[Any]) -> None:
        if items[0][0] == 5 and not once:
            once.fill_(1)
            while not go:
                time.sleep(0.01)
            head = struct.pack("!i", 100_000)  # as ``Connection.send_bytes`` begins
            os.write(result_queue()._writer.fileno(), head + b"and no more")
            os.kill(os.getpid(), signal.SIGKILL)

    older: Any = iter(echo(12, workers=1, act=half))
    assert numbers(itertools.islice(older, 2)) == [0, 1]
    younger: Any = iter(echo(12, workers=1))
    assert numbers(itertools.islice(younger, 1)) == [0]
    go.fill_(1)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    signal.alarm(20)
    try:
        assert numbers(older) == list(range(2, 12))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert older.loader.restarts.count == 1
    assert numbers(younger) == list(range(1, 12))
    assert younger.loader.restarts.count == 0


def test_one_that_ends_as_if_all_were_well_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    once = torch.zeros(1).share_memory_()

    def leaving(items: list[Any]) -> None:
        if items[0][0] == 5 and not once:
            once.fill_(1)
            raise SystemExit  # as a library might

    batches: Any = iter(echo(act=leaving))
    assert numbers(batches) == list(range(12))
    assert batches.loader.restarts.count == 1
    assert "ended with exit code 0" in caplog.text


class Few(torch.utils.data.IterableDataset[Any]):
    """Two batches of each worker, which then ends, having nothing more."""

    def __iter__(self) -> Any:
        return iter([([0], b""), ([1], b"")])


def test_one_that_has_no_more_is_not() -> None:
    batches: Any = iter(LastingLoader(Few(), workers=2, restarts=Restarts(0)))
    got = numbers(itertools.islice(batches, 3))
    time.sleep(0.3)
    assert sorted(got + numbers(batches)) == [0, 0, 1, 1]
    assert batches.loader.restarts.count == 0


def refusing(items: list[Any]) -> None:
    if items[0][0] == 3:
        raise UserError("label 'dog' is not in the vocabulary:\ngive one") from KeyError("dog")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_comes_through_in_its_own_words(workers: int) -> None:
    batches: Any = iter(echo(act=refusing, workers=workers))
    assert numbers(itertools.islice(batches, 3)) == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "label 'dog' is not in the vocabulary:\ngive one"
    assert batches.loader.restarts.count == 0
    kill_workers()  # torch would wait 10 s for them


def test_loaders_of_evaluation_name_no_setting_that_is_not_theirs(toy_index: Index) -> None:
    loader = eval_loader(
        toy_index, np.arange(4), batch=2, sample_rate=16_000, clip_seconds=0.5, workers=1
    )
    batches: Any = iter(loader)
    for _ in range(RESTARTS):
        loader.restarts.died([(0, -9)])
    kill(batches)
    with pytest.raises(UserError, match=rf"more than {RESTARTS}\. Most likely") as caught:
        list(batches)
    assert "health." not in str(caught.value)


SMALL = """
from bat.data.board import Board
from bat.data.collate import BatchRows
from bat.data.loader import LastingLoader, Restarts
from bat.types import UserError

class Rows:
    def __getitems__(self, items):
        return BatchRows(10, 100_000).tensors()

loader = LastingLoader(Rows(), [[(0, 0)]], workers=1, restarts=Restarts())
for act in (lambda: next(iter(loader)), lambda: [Board(1) for _ in range(99)]):
    try:
        act()
    except UserError as error:
        print("told", error)
"""


def test_a_small_shared_memory_is_told() -> None:
    """A ``/dev/shm`` of 64 kB, in a mount namespace of its own."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm && "
    call = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*call, mount + "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    command = mount + 'exec "$0" -c "$1"'
    done = subprocess.run(
        [*call, command, sys.executable, SMALL],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count("told shared memory is full") == 2, done.stderr
    assert done.stdout.count("--shm-size") == done.stdout.count("data.workers=0") == 2
