"""Everything that only a GPU can show, in one run of under nine minutes, into one JSON.

    python tools/gpu_check.py --json gpu.json          on a machine with a GPU (meant: one H100)
    python tools/gpu_check.py --self-test              the same program on the CPU, tiny sizes
    python tools/gpu_check.py --items step-S,flash     only these items

The tests under ``tests/gpu``; then the items of ``gpu_items.py``, most wanted first: the parts of
``tools/bench.py`` against plain, attention kernels, compile modes, activation checkpointing, and
the largest batches for 24 and 80 GB. Each item has a bound of its own time; one that is not
expected to fit what is left of ``--minutes`` is skipped and listed. Items run in a child process,
which is replaced when one fails or runs over. The JSON is written after every figure: a timeout
loses nothing. Nine minutes are not expected to be enough for all: the last items usually need a
second call, ``--items checkpointing,eager,cudagraphs,step-S,reliability,laboratory``. Exit 0: the
tests passed and no item, nor a case of one, failed (skipped ones do not count).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where bat is only checked out
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from bench import device_name, versions
from gpu_items import ITEMS

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 30.0
"""To start a child process."""
TEST_SECONDS = 150.0
"""For ``tests/gpu``."""
END_SECONDS = 10.0
"""For a child process to end by itself."""
MINUTES = 9.0
"""For all of it."""


def work(pipe: Connection, settings: dict[str, Any]) -> None:
    """Child process: runs the items it is told, sends their rows as they come."""
    try:
        for name in iter(pipe.recv, None):
            for row in ITEMS[name].run(**settings):
                pipe.send(("row", row))
            pipe.send(("done", None))
    except Exception:
        pipe.send(("failed", traceback.format_exc(limit=-6)))


class Worker:
    """A child process and the pipe to it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, settings), daemon=True)
        self.process.start()
        other.close()

    def ask(self, name: str) -> None:
        with contextlib.suppress(OSError):  # it is gone: ``answer`` says so
            self.pipe.send(name)

    def answer(self, seconds: float) -> tuple[str, Any]:
        """The next message; ``late`` after ``seconds``, ``failed`` where the process is gone."""
        try:
            if not self.pipe.poll(max(0.0, seconds)):
                return "late", f"stopped after its limit of {seconds:.0f} s"
            return self.pipe.recv()
        except (EOFError, OSError):  # the pipe's other end is closed, or reset while it was read
            self.process.join(END_SECONDS)
            return "failed", f"its process died with exit code {self.process.exitcode}"

    def end(self, *, wait_seconds: float = 0.0) -> None:
        """Let it finish if it is idle, kill it otherwise."""
        if wait_seconds:
            with contextlib.suppress(OSError):  # it is gone already
                self.pipe.send(None)
            self.process.join(wait_seconds)
        self.process.kill()
        self.process.join()


class Check:
    """The report, the clock and the child process."""

    def __init__(self, path: Path, *, minutes: float, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.deadline = time.monotonic() + 60 * minutes
        self.worker: Worker | None = None
        self.report: dict[str, Any] = {
            "device": device_name(),
            "self_test": settings["quick"],
            "versions": versions(),
            "tests": None,
            "results": [],
            "seconds": {},
            "skipped": {},
            "failed": {},
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def tests(self) -> None:
        """``tests/gpu``, without a cache folder; of a run stopped early, what it had said."""
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu"]
        limit = min(TEST_SECONDS, self.left())
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            lines = (done.stdout + done.stderr).strip().splitlines()
            wrong = [x for x in lines if x.startswith(("FAILED", "ERROR", "E  "))][:40]
            found = {"exit": done.returncode, "last": lines[-1:], "wrong": wrong}
        except subprocess.TimeoutExpired as stopped:
            said = (stopped.stdout or b"").decode(errors="replace").splitlines()  # bytes, always
            found = {"exit": None, "last": said[-60:], "wrong": [f"stopped after {limit:.0f} s"]}
        self.report["tests"] = found
        self.write()
        print(f"tests/gpu: {found}", flush=True)

    def item(self, name: str) -> None:
        """Run one item within its limit, or say why not."""
        item, began = ITEMS[name], time.monotonic()
        expected = 0.0 if self.settings["quick"] else item.expected_seconds
        if self.left() < expected:
            self.report["skipped"][name] = (
                f"expected {expected:.0f} s, {max(0.0, self.left()):.0f} s were left"
            )
            print(f"{name}: skipped, {self.report['skipped'][name]}", flush=True)
            return self.write()
        if self.worker is None:
            self.worker = Worker(self.settings)
        self.worker.ask(name)
        ends = min(began + item.limit_seconds + START_SECONDS, self.deadline)
        kind = "row"
        while kind == "row":
            kind, what = self.worker.answer(ends - time.monotonic())
            if kind == "row":
                row = {"part": name, **what}
                self.report["results"].append(row)
                if "error" in row:
                    self.report["failed"][f"{name}: {row['case']}"] = row["error"]
                print(json.dumps(row), flush=True)
                self.write()
        if kind != "done":
            self.report["failed"][name] = what
            print(f"{name}: {what}", flush=True)
            self.worker.end()
            self.worker = None
        self.report["seconds"][name] = round(time.monotonic() - began, 1)
        self.write()

    def end(self) -> None:
        if self.worker is not None:
            self.worker.end(wait_seconds=END_SECONDS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--self-test", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="of each case (10)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (9)")
    parser.add_argument("--items", metavar="A,B", help=f"of {', '.join(ITEMS)}; without the tests")
    args = parser.parse_args(argv)
    names = args.items.split(",") if args.items else list(ITEMS)
    for name in names:
        if name not in ITEMS:
            parser.error(f"unknown item '{name}': one of {', '.join(ITEMS)}")
    if args.repeats < 1 or args.minutes <= 0:
        parser.error("--repeats and --minutes: more than nothing")
    import torch

    if not args.self_test and not torch.cuda.is_available():
        print("gpu_check: error: no CUDA device; --self-test runs on the CPU", file=sys.stderr)
        return 2
    repeats = 1 if args.self_test else args.repeats
    settings = {"repeats": repeats, "quick": args.self_test}
    check = Check(args.json, minutes=args.minutes, settings=settings)
    check.write()
    if not args.items:
        check.tests()
    try:
        for name in names:
            check.item(name)
    finally:
        check.end()
    skipped, failed = (list(check.report[key]) for key in ("skipped", "failed"))
    print(f"written: {args.json}; skipped: {skipped}; failed: {failed}", flush=True)
    tests = check.report["tests"]
    passed = tests is None or tests["exit"] in ((0, 5) if args.self_test else (0,))
    return 0 if passed and not check.report["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
