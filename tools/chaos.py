"""Faults on a pre-training run: after all of them it must end as one that was left alone.

    python tools/chaos.py [--faults 10] [--seed 0] [--steps 80] [--json FILE] [key=value ...]

A toy run in a child process is killed, asked to end, starved of disk, robbed of its newest
checkpoint and of its loader workers, at moments that the seed decides, and started again by the
same command each time. Then its weights must be those of an undisturbed run bit for bit, each step
in its metrics once with the same loss, and each clip of the stream used once.

kill        SIGKILL of the run
term        SIGTERM: it must exit with 75, saved
group       SIGTERM of its whole process group, loader workers too: the same
disk        a limit on the size of its files, as on a full disk: it must exit with 2 and say so
truncate    SIGKILL, and the newest checkpoint cut short
flip        SIGKILL, and a bit of the newest checkpoint flipped
worker      SIGKILL of a loader worker: it must exit with 75, saved
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where bat is only checked out

from bat.io import read_jsonl

KINDS = ("flip", "group", "worker", "disk", "truncate", "kill", "term")
"""The first ones are the most telling."""
PATIENCE = 120.0
"""Seconds that anything may take."""

WORDS = [
    "recipe=toy",
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "model.drop_path=0.1",
    "objective.decoder_depth=1",
    "objective.mask.views=2",
    "data.batch=2",
    "data.workers=1",
    "train.accumulate=2",
    "train.log_every=1",
    "train.save_every=4",
    "train.keep=3",
    "online.every=0",
    "health.collapse_every=20",
    "log.progress=false",
]


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    asked_step: int
    """It is due once so many steps are done."""
    step: int = 0
    """Steps done when it came."""
    exit_code: int | None = None
    resume_seconds: float = 0.0
    """From the next start to the first step that had not been done before."""
    steps_again: int = 0
    """Steps that were done twice."""


EXIT_CODES = {"worker": 75, "term": 75, "group": 75, "disk": 2}
"""Of faults that a run answers; the others kill it."""


class Chaos:
    """A run, its faults, and what they cost."""

    def __init__(self, folder: Path, *, faults: int, seed: int, steps: int, words: list[str]):
        self.folder, self.steps = folder, steps
        self.random = random.Random(seed)
        kinds = [KINDS[i % len(KINDS)] for i in range(faults)]
        self.random.shuffle(kinds)
        self.faults = []
        for i, kind in enumerate(kinds):  # one in each stretch of the run
            first, last = 1 + i * (steps - 4) // faults, (i + 1) * (steps - 4) // faults
            self.faults.append(Fault(kind, self.random.randint(first, max(first, last - 1))))
        own = [*WORDS, f"train.steps={steps}", f"data.cache={folder / 'shards'}", *words]
        merged = dict(word.split("=", 1) for word in own)  # the last of a key counts
        self.words = [f"{key}={value}" for key, value in merged.items()]
        self.out = folder / "out" / "run"

    def start(self, out: Path) -> subprocess.Popen:
        """The command of a user, in a process group of its own."""
        command = [sys.executable, "-m", "bat.cli.pretrain", *self.words, f"out={out}"]
        with open(self.folder / "said.txt", "a") as said:
            return subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                start_new_session=True,
                cwd=Path(__file__).resolve().parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def run(self) -> dict[str, Any]:
        """Runs all of it; ``AssertionError`` with the run's last words where something is lost."""
        whole = self.start(self.folder / "whole")
        self.check(whole.wait(PATIENCE * 2) == 0, "the undisturbed run failed")
        process = self.start(self.out)
        try:
            for fault in self.faults:
                self.wait_for(process, fault.asked_step)
                time.sleep(self.random.uniform(0, 0.1))
                self.check(process.poll() is None, f"the run had ended before the fault {fault}")
                self.inject(fault, process)
                done, began = self.step(), time.monotonic()
                process = self.start(self.out)
                self.wait_for(process, min(done + 1, self.steps))
                fault.resume_seconds = round(time.monotonic() - began, 2)
                fault.steps_again = max(0, done - self.resumed_at())
            self.check(process.wait(PATIENCE * 2) == 0, "the run did not end well")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return self.compare()

    def inject(self, fault: Fault, process: subprocess.Popen) -> None:
        """Does ``fault`` to the run and waits for its end."""
        fault.step = self.step()
        if fault.kind == "worker":
            workers = _workers(process.pid)
            self.check(bool(workers), "no loader worker found")
            os.kill(self.random.choice(workers), signal.SIGKILL)
        elif fault.kind == "disk":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        elif fault.kind == "group":
            os.killpg(process.pid, signal.SIGTERM)
        elif fault.kind == "term":
            process.terminate()
        else:
            process.kill()
        fault.exit_code = process.wait(PATIENCE)
        wanted = EXIT_CODES.get(fault.kind, -signal.SIGKILL)
        said = f"{fault.kind}: exit code {fault.exit_code}, not {wanted}"
        self.check(fault.exit_code == wanted, said)
        if fault.kind == "disk":
            self.check("cannot write checkpoint" in self.said(), "a full disk was not named")
        self.damage(fault.kind)

    def damage(self, kind: str) -> None:
        """Cuts the newest checkpoint short, or flips a bit of it; never the only one."""
        found = sorted((self.out / "checkpoints").glob("step-*.ckpt"))
        if kind not in ("truncate", "flip") or len(found) < 2:
            return
        content = bytearray(found[-1].read_bytes())
        at = self.random.randrange(len(content))
        if kind == "truncate":
            content = content[:at]
        else:
            content[at] ^= 1
        found[-1].unlink()  # `last.ckpt` may be the same file
        found[-1].write_bytes(content)

    def step(self) -> int:
        """Steps done, by the metrics."""
        return max((r["step"] for r in self.rows(self.out)), default=0)

    def rows(self, out: Path) -> list[dict[str, Any]]:
        """Lines of metrics of training steps."""
        return [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]

    def wait_for(self, process: subprocess.Popen, step: int) -> None:
        until = time.monotonic() + PATIENCE
        while self.step() < step:
            code = process.poll()
            ended = code is not None and self.step() < step
            self.check(not ended, f"the run ended with {code} at step {self.step()} of {step}")
            self.check(time.monotonic() < until, f"step {step} did not come")
            time.sleep(0.01)

    def resumed_at(self) -> int:
        lines = [line for line in self.said().splitlines() if "continuing from" in line]
        return int(lines[-1].rpartition("step-")[2].partition(".")[0]) if lines else 0

    def said(self) -> str:
        file = self.folder / "said.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def check(self, right: bool, what: str) -> None:
        if not right:
            raise AssertionError(f"{what}\n{self.said()[-3000:]}")

    def compare(self) -> dict[str, Any]:
        """The disturbed run against the undisturbed one."""
        import torch
        from safetensors.torch import load_file

        whole = self.folder / "whole"
        ours, theirs = (load_file(o / "export/model.safetensors") for o in (self.out, whole))
        self.check(_same(ours, theirs), "weights differ")
        last = [
            torch.load(o / "checkpoints/last.ckpt", weights_only=True) for o in (self.out, whole)
        ]
        self.check(_same(*(c["optimizer_states"] for c in last)), "the optimiser's states differ")
        steps = [[(r["step"], r["loss"], r["lr"]) for r in self.rows(o)] for o in (self.out, whole)]
        self.check(steps[0] == steps[1], "metrics differ")
        self.check([s for s, _, _ in steps[0]] == list(range(1, self.steps + 1)), "steps missing")
        seen = [
            json.loads((o / "summary.json").read_text())["bad_clips"]["seen"]
            for o in (self.out, whole)
        ]
        self.check(seen[0] == seen[1], f"{seen[0]} clips used, not {seen[1]}")
        resumes = sorted(f.resume_seconds for f in self.faults if f.resume_seconds)
        return {
            "faults": len(self.faults),
            "clips_used": seen[0],
            "clips_lost": seen[1] - seen[0],
            "resume_seconds_median": resumes[len(resumes) // 2] if resumes else None,
            "steps_again": sum(f.steps_again for f in self.faults),
            "each": [asdict(f) for f in self.faults],
        }


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _workers(pid: int) -> list[int]:
    """Loader workers among the children of ``pid``."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"bat.cli.pretrain" in command:  # forked: the same command
                found.append(int(child))
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--faults", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--json", type=Path, help="write the numbers there")
    p.add_argument("words", nargs="*", help="key=value of the run")
    options = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bat-chaos-") as folder:
        chaos = Chaos(
            Path(folder),
            faults=options.faults,
            seed=options.seed,
            steps=options.steps,
            words=options.words,
        )
        began = time.monotonic()
        results = chaos.run() | {"seconds": round(time.monotonic() - began, 1)}
    for fault in results["each"]:
        print(f"{fault['kind']:9} at step {fault['step']:4}: exit {fault['exit_code']}, resumed "
              f"in {fault['resume_seconds']} s, {fault['steps_again']} steps again")  # fmt: skip
    print(json.dumps({k: v for k, v in results.items() if k != "each"}))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
