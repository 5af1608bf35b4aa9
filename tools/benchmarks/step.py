"""The pre-training step, whole: from waveforms on the device to the teacher's EMA.

Front end, masks, student, teacher, losses, backward, AdamW, EMA; *plain* is ``plain_step.py``, from
the same weights. ``tflop_per_clip`` is SPEC's hand count and what ``tflops`` and ``mfu`` go by;
``mfu`` is against a large bf16 matrix product measured in the same run. ``counted_tflop`` is what
PyTorch's counter finds (ours does less than the hand count), ``mfu_counted`` goes by that.
``loss_difference`` is relative, on the same masks before any step. ``outside_share``: front end and
masks, each timed alone, over the step. Peaks are above weights, optimiser state and the batch.
"""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
from torch import Tensor

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.shapes import Views, WaveBatch
from bat.train.pretrain import Pretraining
from benchmarks.flops import counted_tflop, hand_tflop
from benchmarks.memory import MB, peak_mb
from benchmarks.plain_step import PlainStep
from benchmarks.timing import here, medians, seconds_of

ABOUT = "one pre-training step, waveforms to EMA; ratio = plain / ours"
QUICK = [
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "frontend.frames=208",
    "data.clip_seconds=2",
    "objective.decoder_depth=2",
]
CASES: dict[str, dict[str, tuple[list[str], bool]]] = {  # where: name: words, compiled
    "cpu": {"Base, 1 clip x 16 views, bf16": (["data.batch=1"], False)},
    "cuda": {
        "Base, 24 clips x 16 views, bf16, compiled": (["data.batch=24"], True),
        "S, 24 clips x 16 views, bf16, compiled": (["model=S", "data.batch=24"], True),
    },
    "quick": {"tiny, 2 clips x 2 views, bf16": ([*QUICK, "data.batch=2", "mask.views=2"], False)},
}
COMPILE = "hardware.compile=whole"


def settings(words: list[str]) -> Pretrain:
    return compose(Pretrain, "pretrain", ["recipe=as2m", *words])


def waves_for(config: Pretrain, device: torch.device) -> Tensor:
    """(B, S) noise that swells and fades."""
    B, S = config.data.batch, int(config.data.clip_seconds * config.frontend.sample_rate)
    generator = torch.Generator().manual_seed(0)
    swell = 0.6 + 0.4 * torch.linspace(0, 9, S).sin()
    return (0.1 * torch.randn(B, S, generator=generator) * swell).to(device)


class OursStep:
    """``Pretraining``'s step over a fixed batch, without the trainer around it."""

    def __init__(self, config: Pretrain, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.module = Pretraining(config).to(device)
        self.optimizer: Any = self.module.configure_optimizers()
        waves = waves_for(config, device)
        B, S = waves.shape
        self.batch = WaveBatch(
            waves=waves,
            lengths=torch.full((B,), S, device=device),
            targets=torch.zeros(B, 0, device=device),
            keys=[str(i) for i in range(B)],
            positions=torch.arange(B),
            skipped=[],
        )
        self.done = 0

    def context(self) -> torch.autocast:
        bf16 = self.config.hardware.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def spectrogram(self) -> Tensor:
        with self.context():  # as in the step: compiled code is not compiled again
            return self.module.spectrogram(self.batch)

    def views(self, seed: int) -> Views:
        return self.module.draw_views(self.config.data.batch, seed)

    def loss(self, views: Views | None = None) -> Tensor:
        """Forward only, with a gradient; ``views`` given: with these masks."""
        with self.context():
            spectrogram = self.spectrogram()
            views = self.views(self.done) if views is None else views
            return self.module.objective(spectrogram, views).total

    def __call__(self) -> Tensor:
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # only CUDA-graph mode looks at it
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.objective.update_teacher(self.config.ema.start)
        self.done += 1
        return loss.detach()

    def held_mb(self) -> float:
        """MB that lie there between steps: weights, teacher, optimiser state, batch."""
        module = self.module
        tensors = [*module.parameters(), *module.buffers(), self.batch.waves]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(s.nbytes() for s in storages.values() if s.device == self.device) / MB


def matmul_tflops(device: torch.device, *, quick: bool = False) -> float:
    """TFLOP/s of a large bf16 matrix product, the median of ten after two."""
    size = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def forget(device: torch.device) -> None:
    """Drop what earlier cases left: compiled code (it counts towards a limit) and memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(
    name: str,
    words: list[str],
    *,
    device: torch.device,
    repeats: int,
    compiled: bool,
    matmul: float,
) -> dict[str, Any]:
    """One row: ours against plain, from the same weights, in turns."""
    forget(device)
    config = settings([*words, COMPILE] if compiled else words)
    ours = OursStep(config, device)
    objective = ours.module.objective
    plain = PlainStep(
        config,
        student=objective.student.state_dict(),
        teacher=objective.teacher.encoder.state_dict(),
        device=device,
        compiled=compiled,
    )
    waves = ours.batch.waves
    difference = loss_difference(ours, plain)
    ways = {"ours": ours, "plain": lambda: plain(waves, decay=config.ema.start)}
    peaks = {}
    for way, call in ways.items():
        call()  # from here on the optimiser's state is there
        peaks[way] = peak_mb(call, device)
    warm_up = 3 if device.type == "cuda" else 0  # two steps were made
    taken = medians(ways, repeats=repeats, title=name, warm_up=warm_up, device=device)
    return {
        "case": name,
        "ours_ms": 1e3 * taken["ours"],
        "plain_ms": 1e3 * taken["plain"],
        "ratio": taken["plain"] / taken["ours"],
        "ours_peak_mb": peaks["ours"],
        "plain_peak_mb": peaks["plain"],
        "loss_difference": difference,
        **rates(config, taken["ours"], matmul),
        "plain_counted_tflop": counted_tflop(config, "plain"),
        **outside(ours, taken["ours"], repeats=repeats),
    }


def loss_difference(ours: OursStep, plain: PlainStep) -> float:
    """``|ours - plain| / plain`` of the total loss on the same weights and masks."""
    views = ours.views(seed=12345)
    mine = ours.loss(views).item()
    theirs = plain.losses(ours.batch.waves, views.mask.float())[0].item()
    return abs(mine - theirs) / theirs


def rates(config: Pretrain, seconds: float, matmul: float) -> dict[str, float]:
    """What a step of ``seconds`` means; ``matmul`` in TFLOP/s."""
    per_second = config.data.batch / seconds
    hand, counted = hand_tflop(config), counted_tflop(config, "ours")
    return {
        "clips_per_second": per_second,
        "tflop_per_clip": hand,
        "counted_tflop": counted,
        "tflops": hand * per_second,
        "matmul_tflops": matmul,
        "mfu": hand * per_second / matmul,
        "mfu_counted": counted * per_second / matmul,
    }


def outside(ours: OursStep, step_seconds: float, *, repeats: int) -> dict[str, float]:
    """Front end and masks alone: ms, and both as a share of the step."""
    ways = {"frontend": ours.spectrogram, "masks": lambda: ours.views(ours.done)}
    taken = medians(ways, repeats=repeats, title="front end, masks", device=ours.device)
    return {
        "frontend_ms": 1e3 * taken["frontend"],
        "masks_ms": 1e3 * taken["masks"],
        "outside_share": sum(taken.values()) / step_seconds,
    }


def alone(
    name: str, words: list[str], *, device: torch.device, repeats: int, matmul: float
) -> dict[str, Any]:
    """One row of ours only: variants of the step against each other. ``first_loss`` is from the
    same weights and masks in all of them."""
    forget(device)
    config = settings(words)
    ours = OursStep(config, device)
    first = float(ours())
    peak = peak_mb(ours, device)
    warm_up = 3 if device.type == "cuda" else 0
    taken = medians({"ours": ours}, repeats=repeats, title=name, warm_up=warm_up, device=device)
    return {
        "case": name,
        "words": words,
        "ours_ms": 1e3 * taken["ours"],
        "ours_peak_mb": peak,
        "held_mb": ours.held_mb(),
        "first_loss": first,
        **rates(config, taken["ours"], matmul),
    }


def run(*, repeats: int, quick: bool) -> list[dict[str, Any]]:
    device = here()
    matmul = matmul_tflops(device, quick=quick)
    rows = []
    for name, (words, compiled) in CASES["quick" if quick else device.type].items():
        rows.append(
            compare(name, words, device=device, repeats=repeats, compiled=compiled, matmul=matmul)
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows
