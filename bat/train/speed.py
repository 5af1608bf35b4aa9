"""What ``hardware`` changes about a model without changing its numbers.

``torch.compile`` block by block (one small graph for all blocks, and DDP still sends gradients
while the backward pass runs) and activation checkpointing. State-dict names stay as they are.
Objectives have further modes (``bat/objectives/base.py``).
"""

from __future__ import annotations

import torch
from torch import nn

from bat.config.schema import Hardware
from bat.nn.attention import describe
from bat.nn.block import blocks_of


def speed_up(module: nn.Module, hardware: Hardware) -> None:
    """Compile the blocks of an encoder, checkpoint their activations, as ``hardware`` says."""
    for block in blocks_of(module):
        block.recompute = hardware.activation_checkpointing
        if hardware.compile != "off":
            block.compile()


def attention_in_words(module: nn.Module, hardware: Hardware, device: torch.device) -> str:
    """Which attention kernel the blocks of ``module`` will run, for the log; empty without any."""
    blocks = blocks_of(module)
    if not blocks:
        return ""
    attention = blocks[0].attn
    dtype = torch.bfloat16 if hardware.precision == "bf16-mixed" else torch.float32
    head_width = attention.proj.in_features // attention.heads
    return describe(attention.backend, device.type, dtype, head_width)
