"""A worker in the middle of a fetch does not keep the run from ending."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bat.data import ending
from tests.data.http_server import FaultyServer

RUN = """
import multiprocessing, os, signal, sys
from bat.data.remote import stream
from bat.data.sources import Patience

def work(url):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    for _ in stream(url, patience=Patience(5, 300.0)):
        pass

context = multiprocessing.get_context("fork")
workers = [context.Process(target=work, args=(sys.argv[1],), daemon=True) for _ in range(2)]
for worker in workers:
    worker.start()
print(*(worker.pid for worker in workers), flush=True)
sys.stdin.readline()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["at its end", "killed"])
def test_workers_in_a_fetch_end_with_the_run(tmp_path: Path, how: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * 1000)
    with FaultyServer(tmp_path) as server:
        server.faults["a.bin"] = ["stall*"]
        command = [sys.executable, "-c", RUN, f"{server.url}/a.bin", how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, text=True, **pipes) as run:
            assert run.stdin is not None
            assert run.stdout is not None
            workers = [int(pid) for pid in run.stdout.readline().split()]
            assert len(workers) == 2
            until = time.monotonic() + 15
            while server.count("a.bin") < 2:
                assert time.monotonic() < until
                time.sleep(0.02)
            run.stdin.write("\n")
            run.stdin.flush()
            until = time.monotonic() + 8
            while any(alive(pid) for pid in workers):
                if time.monotonic() > until:
                    for pid in (*workers, run.pid):
                        os.kill(pid, 9)
                    pytest.fail("a worker goes on")
                time.sleep(0.05)
            assert run.wait(5) == (0 if how == "at its end" else -9)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_this_run_is_not_ending() -> None:
    ending._tell(os.getpid() + 1)  # as a forked child that exits would
    assert not ending.ending()
    start = time.monotonic()
    ending.pause(0.05)
    assert 0.05 <= time.monotonic() - start < 2
