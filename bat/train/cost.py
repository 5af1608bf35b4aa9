"""Counts what a training costs: FLOP and memory of a step, hours, model FLOPs utilisation (MFU).

    MFU = FLOP of a clip x clips per second / (devices x peak of a device)

FLOP of a clip are those of one training step, forward and backward, by PyTorch's counter on fake
tensors, attention as two matrix products and their gradients; recomputed blocks do not count twice.
"""

from __future__ import annotations

import copy
import logging
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bat.config.schema import Finetune, Pretrain
from bat.train.pretrain import build_objective
from bat.types import WaveBatch

log = logging.getLogger("bat")


@dataclass(frozen=True)
class Device:
    """A device as its vendor's data sheet describes it."""

    name: str
    """Part of the name that CUDA gives it."""
    tflops: float
    """Dense bfloat16 TFLOP/s, sums in float32. Data sheets that state it with sparsity: half."""
    gb: float
    """Memory in 10^9 bytes."""
    link: float
    """GB/s to the devices of its node, one way: NVLink, else PCIe."""
    source: str


DEVICES = {
    "b200": Device("B200", 2250, 180, 900, "NVIDIA DGX B200 data sheet, an eighth"),
    "h200": Device("H200", 989, 141, 450, "NVIDIA H200 data sheet, SXM"),
    "h100-pcie": Device("H100 PCIe", 756, 80, 64, "NVIDIA H100 data sheet, PCIe"),
    "h100": Device("H100", 989, 80, 450, "NVIDIA H100 data sheet, SXM"),
    "a100": Device("A100", 312, 80, 300, "NVIDIA A100 data sheet, SXM 80 GB"),
    "l40s": Device("L40S", 362, 48, 32, "NVIDIA L40S data sheet"),
    "l4": Device("L4", 121, 24, 32, "NVIDIA L4 data sheet"),
    "rtx4090": Device("RTX 4090", 165, 24, 32, "NVIDIA Ada architecture white paper"),
}
"""Known devices; of several whose name fits, the first."""


def device_called(name: str) -> Device | None:
    """Returns the known device that CUDA calls ``name``."""
    fits = (d for d in DEVICES.values() if re.search(rf"\b{re.escape(d.name)}\b", name))
    return next(fits, None)  # whole words: a GH200 is no H200


class StepCount(NamedTuple):
    """Counts of one training step, forward and backward, without the optimiser."""

    flop: int
    bytes: int
    """Most bytes at a time of what the step makes (activations, casts, temporaries), besides
    weights, their gradients and the batch."""


def count_step(config: Pretrain, clips: int = 1, *, recompute: bool = False) -> StepCount:
    """Counts a step of ``clips`` clips on fake tensors, in the precision of ``config``, with fused
    attention. ``recompute``: with activation checkpointing."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # no public name: without it, no MFU

    config = copy.deepcopy(config)
    config.model.attention = "sdpa"
    with torch.random.fork_rng(), torch.device("meta"):
        objective = build_objective(config)
        objective.speed_up(recompute=recompute)
    samples = int(config.data.clip_seconds * config.frontend.sample_rate)
    half = config.hardware.precision == "bf16-mixed"
    counter = FlopCounterMode(display=False, custom_mapping=_SDPA)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        objective.to_empty(device="cpu")
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        ids, wave = torch.zeros(clips, dtype=torch.int64), torch.empty(clips, samples)
        batch = WaveBatch(wave, ids + samples, torch.empty(clips, 0), ["a"] * clips, ids, [])
        with _Memory(objective) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = objective(batch)["loss"]
            loss.backward()
    return StepCount(int(counter.get_total_flops()), memory.peak)


def clip_flop(config: Pretrain) -> int:
    """Returns the FLOP of a training step for one clip."""
    return count_step(config, clips=2).flop // 2  # an objective may mix the clips of a batch


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(_: Any, q: Any, k: Any, v: Any, *__: Any, **___: Any) -> int:
    return 2 * int(sdpa_flop_count(q, k, v))


_SDPA = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _NoModules(nullcontext[None]):
    """Stands for the counter's tracker of modules, whose hooks keep recomputed tensors alive."""

    parents = ("Global",)


class _Memory(TorchDispatchMode):
    """Follows the bytes of all storages that are made while it is on; not those of ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        own = [*module.parameters(), *module.buffers()]
        self._known = {t.untyped_storage()._cdata for t in own}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


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
        known = device_called(device)
        if known and isinstance(config, Pretrain) and config.hardware.precision == "bf16-mixed":
            if self._flop is None:
                try:
                    self._flop = clip_flop(config)
                except Exception as error:  # an objective that fake tensors cannot run
                    log.warning("MFU is not counted: %s", error)
                    self._flop = 0
            if self._flop:
                row["mfu"] = self._flop * clips_per_second / (devices * known.tflops * 1e12)
        return row
