"""Applies the ``hardware`` settings to a model: precision, compilation, activation checkpointing.

The precision is resolved before a run begins (``with_precision``). The other settings change no
numbers: ``torch.compile`` block by block (one small graph for all blocks, and DDP still sends
gradients while the backward pass runs) and activation checkpointing. State-dict names are
unchanged. Objectives have further modes (``bat/objectives/base.py``).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bat.config.schema import Hardware, Pretrain, Supervised
from bat.eval.run_folder import settings_of
from bat.nn.attention import describe, facts_of
from bat.nn.block import blocks_of

log = logging.getLogger("bat")

C = TypeVar("C", bound=Pretrain | Supervised)


def with_precision(config: C, out: Path) -> C:
    """Returns ``config`` with ``hardware.precision=auto`` resolved, on the CPU in place of MPS.

    The precision is that with which the run in ``out`` began, else bfloat16 if the device has
    instructions for it, else float32. An unexpected choice is logged, and so is a slow one that was
    set explicitly.
    """
    config = _without_mps(config)
    on_cpu = config.hardware.accelerator == "cpu" or not torch.cuda.is_available()
    fast = has_fast_bfloat16("cpu" if on_cpu else "cuda")
    asked = config.hardware.precision
    if asked == "auto":
        here = "bf16-mixed" if fast else "32-true"
        then = settings_of(out).get("hardware", {}).get("precision", here)
        config = replace(config, hardware=replace(config.hardware, precision=then))
        if then != here:
            log.info("precision %s, as the run in %s began (a new run here: %s)", then, out, here)
        elif not fast:
            log.info("precision 32-true: no fast bfloat16 on this %s", "CPU" if on_cpu else "GPU")
    if on_cpu and not fast and config.hardware.precision == "bf16-mixed":
        log.warning(
            "hardware.precision=bf16-mixed on a CPU without instructions for it: a product of "
            "matrices takes many times as long as in float32; a new run with "
            "hardware.precision=32-true is faster"
        )
    return config


def _without_mps(config: C) -> C:
    """Returns ``config`` on the CPU if Lightning would choose Apple's GPU, and says so."""
    wanted = config.hardware.accelerator
    chosen = wanted in ("auto", "gpu") and not torch.cuda.is_available()
    if wanted != "mps" and not (chosen and torch.backends.mps.is_available()):
        return config
    log.warning("hardware.accelerator=%s: MPS is not supported, the CPU is used", wanted)
    return replace(config, hardware=replace(config.hardware, accelerator="cpu"))


def has_fast_bfloat16(device: str) -> bool:
    """Return True if ``device`` (``cpu`` or ``cuda``) has instructions for bfloat16 products."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()  # avx512_bf16, amx_bf16; other names on ARM
    return torch.backends.mkldnn.is_available() and any(
        there for name, there in able.items() if name.endswith("bf16")
    )


def speed_up(module: nn.Module, hardware: Hardware) -> None:
    """Compiles the blocks of an encoder and checkpoints their activations, as ``hardware`` says."""
    for block in blocks_of(module):
        block.recompute = hardware.activation_checkpointing
        if hardware.compile != "off":
            block.compile()


def attention_in_words(module: nn.Module, hardware: Hardware, device: torch.device) -> str:
    """Returns the attention kernel of ``module``'s blocks, for the log; empty if it has none."""
    blocks = blocks_of(module)
    if not blocks:
        return ""
    attention = blocks[0].attn
    dtype = torch.bfloat16 if hardware.precision == "bf16-mixed" else torch.float32
    head_width = attention.proj.in_features // attention.heads
    return describe(attention.backend, facts_of(device), dtype, head_width)
