"""GPU tests and the pre-training step's speed in one run, one JSON (under nine minutes).

    python tools/gpu_check.py --json gpu.json          on a machine with a GPU
    python tools/gpu_check.py --self-test              the same program on the CPU, tiny sizes

Times the whole training step (front end, masks, student, teacher, losses, AdamW, EMA) from a
waveform batch that lies on the device, *ours* (fused attention, compiled blocks) against *plain*
(matmul-softmax-matmul attention, nothing compiled), alternating, medians over repeats. FLOPs are
SPEC section 3's hand count; MFU is against a large bf16 matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bat import __version__
from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.nn.ema import ema_decay
from bat.shapes import WaveBatch
from bat.train.pretrain import Pretraining

ROOT = Path(__file__).resolve().parents[1]


def step_tflop(config: Pretrain) -> float:
    """TFLOP of one clip's training step: 26 D^2 a token and block, plus 4 n D for attention."""
    m, patches = config.model, (config.frontend.frames // 16) * (config.frontend.n_mels // 16)
    seen = int(patches * (1 - config.mask.ratio)) + 1
    D, views = m.width, config.mask.views

    def forward(tokens: int, blocks: int) -> float:
        return tokens * blocks * (26 * D**2 + 4 * tokens * D)

    student = views * (forward(seen, m.depth) + forward(patches, config.objective.decoder_depth))
    return (3 * student + forward(patches + 1, m.depth)) / 1e12


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(12):
        sync(device)
        began = time.perf_counter()
        a @ b
        sync(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


class Step:
    """One implementation of the training step over a fixed waveform batch."""

    def __init__(self, words: list[str], device: torch.device) -> None:
        self.config = compose(Pretrain, "pretrain", words)
        torch.manual_seed(0)
        self.device = device
        self.module = Pretraining(self.config).to(device)
        self.optimizer = self.module.configure_optimizers()
        B, S = self.config.data.batch, int(self.config.data.clip_seconds * 16000)
        self.batch = WaveBatch(
            waves=torch.randn(B, S, device=device) * 0.1,
            lengths=torch.full((B,), S, device=device),
            targets=torch.zeros(B, 0, device=device),
            keys=[str(i) for i in range(B)],
            positions=torch.arange(B),
            skipped={},
        )
        self.done = 0

    def __call__(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            spectrogram = self.module.spectrogram(self.batch)
            generator_seed = self.done
            views = self.module.draw_views(spectrogram.shape[0], generator_seed)
            losses = self.module.objective(spectrogram, views)
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema = self.config.ema
        self.module.objective.update_teacher(
            ema_decay(self.done, start=ema.start, end=ema.end, steps=ema.steps)
        )
        self.done += 1
        return losses.total.detach()


def timed(step: Step) -> float:
    sync(step.device)
    began = time.perf_counter()
    step()
    sync(step.device)
    return time.perf_counter() - began


def bench_step(words: list[str], device: torch.device, repeats: int) -> dict[str, Any]:
    """Ours against plain, alternating in one process."""
    row: dict[str, Any] = {"part": "step", "words": words}
    kinds = {
        "ours": [*words, f"hardware.compile={str(device.type == 'cuda').lower()}"],
        "plain": [*words, "model.attention=eager", "hardware.compile=false"],
    }
    steps = {}
    for name, own in kinds.items():
        steps[name] = Step(own, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(3):
            steps[name]()
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            row[f"{name}_peak_mb"] = round(peak / 2**20)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    clips = steps["ours"].config.data.batch
    for name, values in seconds.items():
        row[f"{name}_ms"] = round(1000 * statistics.median(values), 2)
    row["ratio"] = round(row["plain_ms"] / row["ours_ms"], 3)
    row["clips_per_second"] = round(1000 * clips / row["ours_ms"], 2)
    row["tflop_per_clip"] = round(step_tflop(steps["ours"].config), 4)
    row["tflops"] = round(row["tflop_per_clip"] * row["clips_per_second"], 2)
    return row


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    p.add_argument("--self-test", action="store_true", help="tiny sizes on the CPU")
    p.add_argument("--repeats", type=int, default=10)
    options = p.parse_args()
    if not options.self_test and not torch.cuda.is_available():
        print("gpu_check: error: no CUDA device; --self-test runs on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.self_test else "cuda")
    name = platform.processor() or "cpu" if options.self_test else torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "device": name,
        "self_test": options.self_test,
        "versions": {
            "bat": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "results": [],
    }
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu"], cwd=ROOT, capture_output=True, text=True
    )
    report["tests"] = {"exit": tests.returncode, "last": tests.stdout.strip().splitlines()[-1:]}
    print(f"tests/gpu: {report['tests']}")
    report["matmul_tflops"] = round(matmul_tflops(device, 512 if options.self_test else 8192), 2)
    if options.self_test:
        words = ["model.width=48", "model.depth=2", "model.heads=2", "objective.decoder_depth=1"]
        cases = [["recipe=as2m", *words, "data.batch=2", "mask.views=2"]]
    else:
        cases = [
            ["recipe=as2m", "data.batch=24"],
            ["recipe=as2m", "model=S", "data.batch=24"],
        ]
    for words in cases:
        row = bench_step(words, device, options.repeats)
        row["mfu"] = round(row["tflops"] / report["matmul_tflops"], 3)
        report["results"].append(row)
        print(json.dumps(row))
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.json}")
    return 0 if tests.returncode in (0, 5) else 1


if __name__ == "__main__":
    sys.exit(main())
