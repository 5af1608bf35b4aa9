"""What ``hardware`` changes about a model without changing its numbers.

``torch.compile`` block by block (``blocks``: one small graph for all blocks, and DDP still sends
gradients while the backward pass runs), or front end, teacher and student with its losses as one
graph each with static shapes (``whole``), or these replayed as CUDA graphs (``cudagraphs``: no
launch cost, for small models). Activation checkpointing. State-dict names stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from bat.config.schema import Hardware
from bat.nn.attention import describe
from bat.nn.block import Block
from bat.objectives.masked_latent import MaskedLatent


def blocks_of(module: nn.Module) -> list[Block]:
    """All blocks below ``module``."""
    return [part for part in module.modules() if isinstance(part, Block)]


def speed_up(module: nn.Module, hardware: Hardware, *, static: bool = False) -> None:
    """Compile the blocks of an encoder, checkpoint their activations, as ``hardware`` says.

    ``static``: few shapes come, each gets its own graph (else sizes become symbols when a second
    shape is met, which costs speed).
    """
    for block in blocks_of(module):
        block.recompute = hardware.activation_checkpointing
        if hardware.compile != "off":
            block.compile(dynamic=False if static else None)


def speed_up_pretraining(objective: MaskedLatent, hardware: Hardware) -> None:
    """The same for a pre-training objective, whose student and teacher can be whole graphs."""
    if hardware.compile in ("off", "blocks"):
        speed_up(objective.student, hardware, static=True)
        if hardware.compile == "blocks":
            speed_up(objective.teacher, hardware, static=True)
        return
    for block in blocks_of(objective.student):
        block.recompute = hardware.activation_checkpointing
    mode = "reduce-overhead" if hardware.compile == "cudagraphs" else "default"
    encoder = objective.student.encoder
    encoder.frontend.compile(dynamic=False)  # type: ignore[union-attr]
    objective.targets = torch.compile(objective.targets, dynamic=False, mode=mode)  # type: ignore[method-assign]
    objective.compare = torch.compile(objective.compare, dynamic=False, mode=mode)  # type: ignore[method-assign]


def attention_in_words(module: nn.Module, hardware: Hardware, device: torch.device) -> str:
    """Which attention kernel the blocks of ``module`` will run, for the log; empty without any."""
    blocks = blocks_of(module)
    if not blocks:
        return ""
    attention = blocks[0].attn
    dtype = torch.bfloat16 if hardware.precision == "bf16-mixed" else torch.float32
    head_width = attention.proj.in_features // attention.heads
    return describe(attention.backend, device.type, dtype, head_width)
