"""Gated self-attention on PyTorch's fused attention (SPEC section 2).

    out = proj( concat_heads(softmax(q k^T / sqrt(d)) v)  *  sigmoid(x W_G + b_G) )

The gate is computed from the block's input x, one value a channel. Without it this is the block of
EAT, SSLAM and data2vec 2.0. Parameter names are the paper's and timm's: ``qkv``, ``gate``,
``proj``; a test holds the module to ``timm.layers.Attention(gated=True)``.
"""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["auto", "flash", "cudnn", "sdpa", "eager"]

_EXPLICIT = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` for (B, H, n, d) tensors.

    ``auto`` and ``sdpa`` leave the kernel to PyTorch, which ends in plain mathematics where no
    fused one fits; ``flash`` and ``cudnn`` insist on theirs and raise where it does not fit;
    ``eager`` is matmul-softmax-matmul.
    """
    if backend == "eager":
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return weights @ v
    insist = sdpa_kernel(_EXPLICIT[backend]) if backend in _EXPLICIT else contextlib.nullcontext()
    with insist:
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with an elementwise gate before the output projection."""

    def __init__(
        self, width: int, heads: int, *, gate: bool = True, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if backend not in get_args(Backend):
            known = ", ".join(get_args(Backend))
            raise ValueError(f"unknown attention backend '{backend}'. Known: {known}")
        self.heads = heads
        self.backend: Backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        B, n, D = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, self.backend).transpose(1, 2).reshape(B, n, D)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        return self.proj(out)
