"""The pre-training step, whole: from waveforms on the device to the teacher's EMA.

Front end, masks, forward, backward, AdamW, EMA; *plain* is ``plain_step.py``, from the same
weights. ``tflop_per_clip`` is counted by hand (docs/method.md 3); ``tflops`` and ``mfu`` go by it;
``mfu`` is against a large bf16 matrix product measured in the same run. ``counted_tflop`` is what
PyTorch's counter finds (ours does less than the hand count), ``mfu_counted`` goes by that.
``loss_difference`` is relative, on the same masks before any step. ``outside_share``: front end and
masks, each timed alone, over the step. Peaks are above weights, optimiser state and the batch.

A case gives two rows, each as soon as it is measured: ours alone, then ours and plain in turns.
Where plain runs out of a GPU's memory, a ``note`` says so and both run again on half the clips.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.eval.hardware import attention_in_words
from bat.train.pretrain import Pretraining
from bat.types import WaveBatch
from benchmarks.flops import TERA, counted_tflop, hand_tflop, peak_flops
from benchmarks.memory import MB, peak_mb
from benchmarks.plain_step import PlainStep, plain_masks_of, plain_weights_of
from benchmarks.timing import attempted, error_line, here, medians, seconds_of

ABOUT = "one pre-training step, waveforms to EMA; ratio = plain / ours"
QUICK = [
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "frontend.frames=208",
    "data.clip_seconds=2",
    "objective.decoder_depth=2",
    "hardware.precision=32-true",  # many CPUs are slow in bfloat16
]


class Case(NamedTuple):
    name: str
    words: list[str]
    clips: int
    compiled: bool

    def settings(self) -> Pretrain:
        compiled = [COMPILE] if self.compiled else []
        return settings([*self.words, f"data.batch={self.clips}", *compiled])

    def label(self) -> str:
        clips = f"{self.clips} clip" + "s" * (self.clips != 1)
        config = self.settings()
        views = config.objective.mask.views  # plain knows one objective
        kind = "float32" if config.hardware.precision == "32-true" else "bf16"
        return f"{self.name}, {clips} x {views} views, {kind}" + ", compiled" * self.compiled


CASES = {
    "cpu": [Case("Base", [], 1, False)],
    "cuda": [Case("Base", [], 24, True), Case("S", ["model=S"], 24, True)],
    "quick": [Case("tiny", [*QUICK, "objective.mask.views=2"], 2, False)],
}

COMPILE = "hardware.compile=whole"
PLACE = 12345
"""Of the stream, where losses are compared."""


def settings(words: list[str]) -> Pretrain:
    own = any(word.startswith(("hardware=", "hardware.precision=")) for word in words)
    usual = [] if own else ["hardware.precision=bf16-mixed"]
    return compose(Pretrain, "pretrain", ["recipe=as2m", *usual, *words])


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
            return self.module.objective.spectrogram(self.batch)

    def masks(self) -> Tensor | None:
        return self.module.objective.example_masks(self.batch)

    def move(self, place: int) -> None:
        """Put the batch at another place of the stream: other masks."""
        clips = self.config.data.batch
        self.batch.positions = place * clips + torch.arange(clips)

    def loss(self, place: int | None = None) -> Tensor:
        """Forward only, with a gradient; at this place of the stream, else at that of the step."""
        self.move(self.done if place is None else place)
        with self.context():
            return self.module.objective(self.batch)["loss"]

    def __call__(self) -> Tensor:
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # only CUDA-graph mode looks at it
        loss = self.loss()
        loss.backward()
        guard = self.module.guard
        guard.inspect(self.optimizer, self.module.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert guard.skip is not None
        self.module.objective.after_step(self.done, skip=guard.skip)
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
    case: Case, *, device: torch.device, repeats: int, matmul: float
) -> Iterator[dict[str, Any]]:
    """The rows of a case; with half its clips too where plain did not fit."""

    def measure() -> Iterator[dict[str, Any]]:
        fitted = yield from _both(case, device=device, repeats=repeats, matmul=matmul)
        if not fitted and case.clips > 1:
            half = case._replace(clips=case.clips // 2)
            yield from _both(half, device=device, repeats=repeats, matmul=matmul)

    yield from attempted(case.label(), measure)


def _both(
    case: Case, *, device: torch.device, repeats: int, matmul: float
) -> Generator[dict[str, Any], None, bool]:
    """Ours alone, then against plain; False where plain did not fit."""
    forget(device)
    ours, label = OursStep(case.settings(), device), case.label()
    weights = plain_weights_of(ours.module.objective)  # as they are before any step
    loss = ours.loss(PLACE).item()
    mask = plain_masks_of(ours.module.objective, ours.batch)
    row = _alone(f"{label}, ours alone", ours, repeats=repeats, matmul=matmul)
    yield row | outside(ours, row["ours_ms"] / 1e3, repeats=repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        plain = PlainStep(ours.config, **weights, device=device, compiled=case.compiled)
        taken, plain_peak, difference = _in_turns(
            ours, plain, mask=mask, loss=loss, repeats=repeats, title=label
        )
    except Exception as error:
        if not out_of_memory(error):
            raise
        note = f"plain did not fit beside ours' weights and state: {error_line(error)}"
    else:
        yield {
            "case": label,
            "ours_ms": 1e3 * taken["ours"],
            "plain_ms": 1e3 * taken["plain"],
            "ratio": taken["plain"] / taken["ours"],
            "ours_peak_mb": row["ours_peak_mb"],
            "plain_peak_mb": plain_peak,
            "loss_difference": difference,
            **rates(ours.config, taken["ours"], matmul),
            "plain_counted_tflop": counted_tflop(ours.config, "plain"),
        }
        return True
    yield {"case": label, "note": note}
    return False


def _in_turns(
    ours: OursStep, plain: PlainStep, *, mask: Tensor, loss: float, repeats: int, title: str
) -> tuple[dict[str, float], float, float]:
    """Median seconds of each, plain's peak, and how its first loss differs from ``loss``."""
    waves, device = ours.batch.waves, ours.device
    theirs = plain.losses(waves, mask)[0].item()
    ways = {"ours": ours, "plain": lambda: plain(waves)}
    ways["plain"]()  # from here on the optimiser's state is there
    peak = peak_mb(ways["plain"], device)
    warm_up = 3 if device.type == "cuda" else 0  # two steps were made
    taken = medians(ways, repeats=repeats, title=title, warm_up=warm_up, device=device)
    return taken, peak, abs(loss - theirs) / theirs


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a GPU's memory run out."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def loss_difference(ours: OursStep, plain: PlainStep) -> float:
    """``|ours - plain| / plain`` of the total loss on the same weights and masks."""
    mine = ours.loss(PLACE).item()
    mask = plain_masks_of(ours.module.objective, ours.batch)
    theirs = plain.losses(ours.batch.waves, mask)[0].item()
    return abs(mine - theirs) / theirs


def clips_and_mfu(config: Pretrain, seconds: float) -> dict[str, float | None]:
    """Clips a second, and counted FLOP over the device's peak."""
    per_second, peak = config.data.batch / seconds, peak_flops()
    flop = TERA * counted_tflop(config, "ours") * per_second
    return {"clips_per_second": per_second, "mfu_peak": flop / peak if peak else None}


def rates(config: Pretrain, seconds: float, matmul: float) -> dict[str, float | None]:
    """What a step of ``seconds`` means; ``matmul`` in TFLOP/s."""
    per_second = config.data.batch / seconds
    hand, counted = hand_tflop(config), counted_tflop(config, "ours")
    return {
        **clips_and_mfu(config, seconds),
        "tflop_per_clip": hand,
        "counted_tflop": counted,
        "tflops": hand * per_second,
        "matmul_tflops": matmul,
        "mfu": hand * per_second / matmul,
        "mfu_counted": counted * per_second / matmul,
    }


def outside(ours: OursStep, step_seconds: float, *, repeats: int) -> dict[str, float]:
    """Front end and masks alone: ms, and both as a share of the step."""
    ways = {"frontend": ours.spectrogram, "masks": ours.masks}
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
    ours = OursStep(settings(words), device)
    return {"words": words, **_alone(name, ours, repeats=repeats, matmul=matmul)}


def _alone(name: str, ours: OursStep, *, repeats: int, matmul: float) -> dict[str, Any]:
    first = float(ours())  # from here on the optimiser's state is there
    peak = peak_mb(ours, ours.device)
    warm_up = 3 if ours.device.type == "cuda" else 0  # two steps were made
    ways = {"ours": ours}
    taken = medians(ways, repeats=repeats, title=name, warm_up=warm_up, device=ours.device)
    return {
        "case": name,
        "ours_ms": 1e3 * taken["ours"],
        "ours_peak_mb": peak,
        "held_mb": ours.held_mb(),
        "first_loss": first,
        "kernel": attention_in_words(ours.module.objective, ours.config.hardware, ours.device),
        **rates(ours.config, taken["ours"], matmul),
    }


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device = here()
    matmul = matmul_tflops(device, quick=quick)
    for case in CASES["quick" if quick else device.type]:
        yield from compare(case, device=device, repeats=repeats, matmul=matmul)
    forget(device)
