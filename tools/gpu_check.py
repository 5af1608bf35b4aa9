"""Everything that only a GPU can show, in one run of under ten minutes, into one JSON.

    python tools/gpu_check.py --json gpu.json               on a machine with a GPU, nine minutes
    python tools/gpu_check.py --minutes 8 --items step,cgp  only these items
    python tools/gpu_check.py --device cpu --size test      a dry run of all items, tiny, on a CPU

The items of ``gpu_items.py`` run most wanted first, in one process, each within a bound of its own
time and of what is left of ``--minutes``. An item that runs over, fails or takes the process with
it costs only itself: the next one gets a new process. The JSON is replaced atomically after every
row, so nothing is lost when this program is cut off, by SIGTERM or SIGKILL: ``complete`` is false
then, and ``not_run`` names the items that are missing. Exit 0: all items ran and no case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where bat is only checked out
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from gpu_items import ITEMS

START_SECONDS = 90.0
"""To start a process, beside an item's own limit."""
LEAST_SECONDS = 15.0
"""What must be left for another item to begin."""
MINUTES = 9.0


def machine() -> dict[str, Any]:
    """Returns device, peak and versions, as loaded in this process."""
    import torch
    from bench import device_name, versions
    from benchmarks.flops import peak_flops

    gpu = torch.cuda.is_available()
    name, peak = device_name(), peak_flops()
    loaded = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if gpu else None}
    return {
        "device": name,
        "gpu": gpu,
        "peak_tflops": None if peak is None else peak / 1e12,
        "versions": versions() | loaded,
    }


def work(names: list[str], *, repeats: int, quick: bool) -> None:
    """Runs items and prints what happens as JSON lines; ends after the first with an error, since
    an error of the device stays in its process."""
    print(json.dumps({"machine": machine()}), flush=True)
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        failed = False
        try:
            for row in ITEMS[name].run(repeats=repeats, quick=quick):
                failed |= "error" in row
                print(json.dumps({"row": {"part": name, **row}}), flush=True)
        except Exception as error:
            failed = True
            row = {"part": name, "case": name, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"row": row}), flush=True)
        print(json.dumps({"end": name}), flush=True)
        if failed:
            return


def command_of(names: list[str], args: argparse.Namespace) -> list[str]:
    """Returns the command of a process that runs items."""
    words = ["--work", ",".join(names), "--size", args.size, "--repeats", str(args.repeats)]
    return [sys.executable, __file__, *words, "--device", args.device]


class Worker:
    """A process that runs items, in a session of its own, and its messages."""

    def __init__(self, names: list[str], args: argparse.Namespace) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
        self.process = subprocess.Popen(
            command_of(names, args),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | hidden,
        )
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(('{"machine": ', '{"begin": ', '{"row": ', '{"end": ')):
                self.messages.put(json.loads(line))  # else: a remark of a library
        self.messages.put(None)

    def kill(self) -> int:
        """Ends the process with all that it started; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Check:
    """The report and the clock."""

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        self.args, self.left_over = args, list(names)
        self.deadline = time.monotonic() + 60 * args.minutes
        self.worker: Worker | None = None
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "platform": platform.platform(),
            "size": args.size,
            "complete": False,
            "cut_off": None,
            "not_run": list(names),
            "failed": {},
            "seconds": {},
            "results": [],
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        file = self.args.json.with_name(self.args.json.name + ".part")
        file.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        file.replace(self.args.json)

    def run(self) -> None:
        """Runs all items, with a new process after one that failed or ran over."""
        self.write()
        try:
            while self.left_over and self.left() > LEAST_SECONDS:
                self.worker = Worker(self.left_over, self.args)
                started = START_SECONDS
                while self.left_over and self.left() > LEAST_SECONDS:
                    if self._follow(self.left_over[0], started):
                        break
                    started = 0.0
                self.worker.kill()
            if self.left_over:
                self.report["cut_off"] = f"{self.args.minutes:g} minutes were over"
        except (KeyboardInterrupt, SystemExit) as stopped:
            self.report["cut_off"] = str(stopped) or "interrupted"
        finally:
            if self.worker is not None:
                self.worker.kill()
            self.report["not_run"] = self.left_over
            self.report["complete"] = not self.left_over and self.report["cut_off"] is None
            self.write()

    def _follow(self, name: str, started: float) -> bool:
        """Records the rows of one item until its end; True if its process is of no more use."""
        assert self.worker is not None
        began, failed = time.monotonic(), self.report["failed"]
        limit = self.left()
        if self.args.size == "real":  # the limits are those of a GPU
            limit = min(limit, ITEMS[name].limit_seconds + started)
        over = ended = False
        while not ended:
            try:
                message = self.worker.messages.get(
                    timeout=max(0.0, began + limit - time.monotonic())
                )
            except queue.Empty:
                failed[name] = f"stopped after its limit of {limit:.0f} s"
                over = True
                break
            if message is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.worker.process.wait(timeout=5)
                failed[name] = f"its process ended with {self.worker.kill()}"
                over = True
                break
            if "machine" in message:
                self.report |= message["machine"]
                if self.args.device == "cuda" and not self.report["gpu"]:
                    raise SystemExit("no CUDA device; --device cpu --size test runs on the CPU")
            elif "row" in message:
                row = message["row"]
                self.report["results"].append(row)
                if "error" in row:
                    failed[f"{name}: {row['case']}"] = row["error"]
                    over = True
                print(json.dumps(row), flush=True)
                self.write()
            ended = "end" in message
        self.left_over.remove(name)
        self.report["not_run"] = self.left_over
        self.report["seconds"][name] = round(time.monotonic() - began, 1)
        print(f"{name}: {failed.get(name, 'done')}, {self.left():.0f} s left", flush=True)
        self.write()
        return over


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("real", "test"), default="real")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="of each case (10)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (9)")
    parser.add_argument("--items", metavar="A,B", help=f"of {', '.join(ITEMS)}")
    parser.add_argument("--work", metavar="A,B", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = (args.work or args.items or ",".join(ITEMS)).split(",")
    for name in names:
        if name not in ITEMS:
            parser.error(f"unknown item '{name}': one of {', '.join(ITEMS)}")
    if args.repeats < 1 or args.minutes <= 0:
        parser.error("--repeats and --minutes: more than nothing")
    if args.device == "cpu" and args.size != "test":
        parser.error("--device cpu is for a dry run: add --size test")
    if args.work:
        work(names, repeats=args.repeats, quick=args.size == "test")
        return 0
    if args.size == "test":
        args.repeats = 1
    signal.signal(signal.SIGTERM, _stop)
    check = Check(args, names)
    check.run()
    report = check.report
    print(
        f"written: {args.json}; complete: {report['complete']} ({report['cut_off'] or 'all ran'}); "
        f"not run: {report['not_run']}; failed: {list(report['failed'])}",
        flush=True,
    )
    return 0 if report["complete"] and not report["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
