"""Counts what a training costs on GPUs: hours so far and to go, and model FLOPs utilisation (MFU).

    MFU = FLOP of a clip x clips per second / (devices x peak of a device)

FLOP of a clip are those of one training step, forward and backward, by PyTorch's counter on fake
tensors, with attention as matrix products; recomputed blocks do not count twice.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from bat.config.schema import Finetune, Pretrain
from bat.train.pretrain import build_objective
from bat.types import WaveBatch

log = logging.getLogger("bat")

PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 FLOP per second by a part of the device's name; the first that fits."""


def clip_flop(config: Pretrain) -> int:
    """Returns the FLOP of a training step for one clip."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # no public name: without it, no MFU

    config = copy.deepcopy(config)
    config.model.attention = "eager"
    with torch.random.fork_rng(), torch.device("meta"):
        objective = build_objective(config)
    samples = int(config.data.clip_seconds * config.frontend.sample_rate)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        objective.to_empty(device="cpu")
        ids, wave = torch.zeros(1, dtype=torch.int64), torch.empty(1, samples)
        batch = WaveBatch(wave, ids + samples, torch.empty(1, 0), ["a"], ids, [])
        objective(batch)["loss"].backward()
    return int(counter.get_total_flops())


class Cost:
    """The cost of one training. ``seconds``: training time over all starts."""

    def __init__(self, config: Pretrain | Finetune, seconds: Callable[[], float]) -> None:
        self.config, self.seconds = config, seconds
        self._flop: int | None = None

    def row(
        self, device: str, *, devices: int, step: int, clips_per_second: float
    ) -> dict[str, float]:
        """Returns the scalars of a line of metrics on ``devices`` GPUs called ``device``; ``mfu``
        for pre-training in bfloat16, where the peak is known."""
        hours, config = devices * self.seconds() / 3600, self.config
        row = {"gpu_hours": hours, "gpu_hours_left": hours * (config.train.steps / step - 1)}
        peak = next((flop for name, flop in PEAK.items() if name in device), None)
        if peak and isinstance(config, Pretrain) and config.hardware.precision == "bf16-mixed":
            if self._flop is None:
                try:
                    self._flop = clip_flop(config)
                except Exception as error:  # an objective that fake tensors cannot run
                    log.warning("MFU is not counted: %s", error)
                    self._flop = 0
            if self._flop:
                row["mfu"] = self._flop * clips_per_second / (devices * peak)
        return row
