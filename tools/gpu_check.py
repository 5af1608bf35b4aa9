"""Everything that only a GPU can show, in one run of under nine minutes, into one JSON.

    python tools/gpu_check.py --json gpu.json          on a machine with a GPU (meant: one H100)
    python tools/gpu_check.py --self-test              the same program on the CPU, tiny sizes
    python tools/gpu_check.py --items step-S,flash     only these items

The tests under ``tests/gpu``; then the items of ``gpu_items.py``, most wanted first: the parts of
``tools/bench.py`` against plain, attention kernels, compile modes, activation checkpointing, and
the largest batches for 24 and 80 GB. Each item is a process of its own and has a bound of its own
time; one that is not expected to fit what is left of ``--minutes`` is skipped and listed. The rows
an item had written before it failed or ran over are kept, and the JSON is written after each item.
Nine minutes are not expected to be enough for all: the last items usually need a second call,
``--items checkpointing,eager,cudagraphs,step-S,reliability,laboratory``. Exit 0: the tests passed
and no item, nor a case of one, failed (skipped ones do not count).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where bat is only checked out
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from bench import device_name, versions
from gpu_items import ITEMS

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 30.0
"""To start the process of an item."""
TEST_SECONDS = 150.0
"""For ``tests/gpu``."""
MINUTES = 9.0
"""For all of it."""


def run(command: list[str], seconds: float) -> tuple[int | None, list[str], list[str]]:
    """Runs ``command``; returns exit code, None if stopped after ``seconds``, stdout and stderr."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            words = {"cwd": ROOT, "stdout": out, "stderr": err, "timeout": max(0.0, seconds)}
            code = subprocess.run([sys.executable, *command], **words).returncode
        except subprocess.TimeoutExpired:
            code = None
        for file in (out, err):
            file.seek(0)
        return code, out.read().splitlines(), err.read().splitlines()


def rows_of(name: str, **settings: Any) -> None:
    """Prints the rows of one item as JSON lines, as they come: the work of an item's process."""
    for row in ITEMS[name].run(**settings):
        print(json.dumps({"part": name, **row}), flush=True)


class Check:
    """The report and the clock."""

    def __init__(self, path: Path, *, minutes: float, repeats: int, quick: bool) -> None:
        self.path, self.repeats, self.quick = path, repeats, quick
        self.deadline = time.monotonic() + 60 * minutes
        self.report: dict[str, Any] = {
            "device": device_name(),
            "self_test": quick,
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
        """Runs ``tests/gpu``, without a cache folder."""
        limit = min(TEST_SECONDS, self.left())
        command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu"]
        code, out, err = run(command, limit)
        lines = out + err
        wrong = [x for x in lines if x.startswith(("FAILED", "ERROR", "E  "))][:40]
        if code is None:
            wrong = [f"stopped after {limit:.0f} s"]
        last = lines[-60:] if code is None else lines[-1:]
        self.report["tests"] = {"exit": code, "last": last, "wrong": wrong}
        self.write()
        print(f"tests/gpu: {self.report['tests']}", flush=True)

    def item(self, name: str) -> None:
        """Runs one item within its limit, or says why not."""
        item, began = ITEMS[name], time.monotonic()
        expected = 0.0 if self.quick else item.expected_seconds
        if self.left() < expected:
            why = f"expected {expected:.0f} s, {max(0.0, self.left()):.0f} s were left"
            self.report["skipped"][name] = why
            print(f"{name}: skipped, {why}", flush=True)
            return self.write()
        limit = min(item.limit_seconds + START_SECONDS, self.left())
        command = [__file__, "--rows-of", name, "--repeats", str(self.repeats)]
        code, out, err = run([*command, *["--self-test"] * self.quick], limit)
        failed = self.report["failed"]
        for line in out:
            if line.startswith('{"part": '):  # no remark of a library
                row = json.loads(line)
                self.report["results"].append(row)
                if "error" in row:
                    failed[f"{name}: {row['case']}"] = row["error"]
                print(line, flush=True)
        if code is None:
            failed[name] = f"stopped after its limit of {limit:.0f} s"
        elif code:
            failed[name] = "\n".join([f"exit code {code}", *err[-12:]])
        if name in failed:
            print(f"{name}: {failed[name]}", flush=True)
        self.report["seconds"][name] = round(time.monotonic() - began, 1)
        self.write()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--self-test", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="of each case (10)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (9)")
    parser.add_argument("--items", metavar="A,B", help=f"of {', '.join(ITEMS)}; without the tests")
    parser.add_argument("--rows-of", metavar="ITEM", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows_of:
        rows_of(args.rows_of, repeats=args.repeats, quick=args.self_test)
        return 0
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
    check = Check(args.json, minutes=args.minutes, repeats=repeats, quick=args.self_test)
    if not args.items:
        check.tests()
    for name in names:
        check.item(name)
    skipped, failed = (list(check.report[key]) for key in ("skipped", "failed"))
    print(f"written: {args.json}; skipped: {skipped}; failed: {failed}", flush=True)
    tests = check.report["tests"]
    passed = tests is None or tests["exit"] in ((0, 5) if args.self_test else (0,))
    return 0 if passed and not check.report["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
