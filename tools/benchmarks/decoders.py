"""What cheaper decoders and predicting fewer patches save: steps of several settings in turns.

All run the step of masked latent regression, nothing compiled, and take turns; *plain* is the
paper's decoder predicting every masked patch. ``tflop`` and ``plain_tflop`` are counted by PyTorch
for one clip (``flops.py``). On a CPU: 4 views of a clip, float32. Speed is all that is judged here:
the losses are of different models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.flops import counted_tflop
from benchmarks.memory import peak_mb
from benchmarks.step import QUICK, OursStep, clips_and_mfu, settings
from benchmarks.timing import here, medians

ABOUT = "the pre-training step by decoder; ratio = the paper's decoder / this"
WAYS = {
    "vit12h, half predicted": ["objective.predict=0.5"],
    "cross": ["objective.decoder=cross"],
    "cross, half predicted": ["objective.decoder=cross", "objective.predict=0.5"],
    "cross, 30 % predicted": ["objective.decoder=cross", "objective.predict=0.3"],
}


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device = here()
    if quick:
        words = [*QUICK, "data.batch=2", "objective.mask.views=2", "objective.decoder_width=48"]
    elif device.type == "cuda":
        words = ["data.batch=24"]
    else:  # many CPUs are slow in bfloat16; 16 views of a clip take a minute a step
        words = ["data.batch=1", "hardware.precision=32-true", "objective.mask.views=4"]
    configs = {name: settings([*words, *more]) for name, more in {"paper's": [], **WAYS}.items()}
    steps = {name: OursStep(config, device) for name, config in configs.items()}
    for step in steps.values():
        step()  # from here on the optimiser's state is there
    peaks = {name: peak_mb(step, device) for name, step in steps.items()}
    taken = medians(steps, repeats=repeats, title="decoders", device=device)
    for name in WAYS:
        yield {
            "case": name,
            "ours_ms": 1e3 * taken[name],
            "plain_ms": 1e3 * taken["paper's"],
            "ratio": taken["paper's"] / taken[name],
            "tflop": counted_tflop(configs[name], "ours"),
            "plain_tflop": counted_tflop(configs["paper's"], "ours"),
            **clips_and_mfu(configs[name], taken[name]),
            "ours_peak_mb": peaks[name],
            "plain_peak_mb": peaks["paper's"],
        }
