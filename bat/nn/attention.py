"""Gated self-attention on fused attention kernels (docs/method.md 2).

    out = proj( concat_heads(softmax(q k^T / sqrt(d)) v)  *  sigmoid(x W_G + b_G) )

The gate is computed from the block's input x, one value a channel. Without it this is the block of
EAT, SSLAM and data2vec 2.0. Parameter names are the paper's and timm's: ``qkv``, ``gate``,
``proj``; a test compares the module with ``timm.layers.Attention(gated=True)``. Queries, keys,
values and the gate are computed by one product over the joined weights, which stay two parameters.

``project`` and ``combine`` are the two halves of ``forward``: a decoder whose tokens are mostly
copies of each other projects each distinct one once (``nn/decoder.py``). ``at`` selects the tokens
whose outputs are computed; all tokens stay keys and values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bat.errors import UserError
from bat.nn.blocked import blocked_attention

Backend = Literal["auto", "flash", "cudnn", "sdpa", "eager"]
Kernel = Literal["package", "blocked", "sdpa", "flash", "cudnn", "eager"]

_INSISTED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PACKAGES = ("flash_attn_interface", "flash_attn")
"""FlashAttention packages, newest first: version 3 (built from source), version 2 (``[flash]``)."""


def find_flash() -> tuple[Callable[..., Tensor] | None, str]:
    """Returns ``flash_attn_func`` of the first package that has it, and the package's name."""
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):  # absent, or built for another torch
            continue
        if hasattr(module, "flash_attn_func"):  # a placeholder package of that name is empty
            return module.flash_attn_func, name
    return None, ""


FLASH, FLASH_NAME = find_flash()


def choose(backend: Backend, device: str, dtype: torch.dtype, head_width: int) -> Kernel:
    """Returns the kernel that ``backend`` selects for tensors of this kind.

    ``auto``: the FlashAttention package if installed and applicable (CUDA, 16 bits), the blocked
    kernel on a CPU in bfloat16, else PyTorch's choice (``sdpa``), which falls back to plain
    operations if no fused kernel applies. ``flash``: the package, else PyTorch's FlashAttention,
    which raises an error if it does not apply, as ``cudnn`` does.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    package = (
        FLASH is not None
        and device == "cuda"
        and half
        and head_width % 8 == 0
        and head_width <= 256
    )
    if backend in ("auto", "flash") and package:
        return "package"
    if backend != "auto":
        return backend
    return "blocked" if device == "cpu" and dtype == torch.bfloat16 else "sdpa"


def describe(backend: Backend, device: str, dtype: torch.dtype, head_width: int) -> str:
    """Returns the result of ``choose`` in words, for a run's log."""
    return {
        "package": f"FlashAttention ({FLASH_NAME})",
        "blocked": "a few heads at a time (bat.nn.blocked)",
        "sdpa": "PyTorch's scaled_dot_product_attention"
        + (", no flash_attn package here" if device == "cuda" and FLASH is None else ""),
        "flash": "PyTorch's FlashAttention, nothing else",
        "cudnn": "cuDNN's, nothing else",
        "eager": "matmul, softmax, matmul",
    }[choose(backend, device, dtype, head_width)]


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Computes ``softmax(q k^T / sqrt(d)) v``: (B, H, m, d) queries, (B, H, n, d) keys and values.

    ``backend``: see ``choose``; ``eager`` is matmul-softmax-matmul.
    """
    kernel = choose(backend, q.device.type, q.dtype, q.shape[-1])
    if kernel == "package":
        assert FLASH is not None
        out = FLASH(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, m, H, d)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    if kernel == "blocked":
        blocked: Tensor = blocked_attention(q, k, v)
        return blocked
    if kernel == "eager":
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return weights @ v
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    try:
        with sdpa_kernel(_INSISTED[kernel]):
            return F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise UserError(
            f"attention={backend} cannot run here: {q.dtype} of {q.shape[-1]} channels a head on "
            f"{q.device.type}; say attention=auto"
        ) from error


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

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Maps (B, n, D) to (B, n, D), or to (B, m, D) for the token ids ``at`` (B, m)."""
        if at is None:
            return self.combine(self.project(x))
        D = x.shape[-1]
        # keys and values of all tokens; queries and gates of the selected ones
        kv = self._linear(x, [(self.qkv, slice(D, None))])  # (B, n, 2 D)
        own = [(self.qkv, slice(0, D))] + ([(self.gate, slice(None))] if self.gate else [])
        q, *gate = self._linear(take(x, at), own).split(D, dim=-1)  # (B, m, D) each
        return self._mix(q, *kv.split(D, dim=-1), *gate)

    def project(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., 4 D): queries, keys, values and gates before the sigmoid
        (3 D without a gate), for each token."""
        parts = [self.qkv, *([self.gate] if self.gate is not None else [])]
        return self._linear(x, [(part, slice(None)) for part in parts])

    def combine(self, projected: Tensor) -> Tensor:
        """Maps the result of ``project`` for all tokens, (B, n, 4 D), to (B, n, D)."""
        D = self.proj.in_features
        return self._mix(*projected.split(D, dim=-1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, self.backend).transpose(1, 2).flatten(2)  # (B, m, D)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.proj(out)

    @staticmethod
    def _linear(x: Tensor, parts: list[tuple[nn.Linear, slice]]) -> Tensor:
        """Applies rows of several layers as one product, as if they were one layer."""
        if len(parts) == 1 and parts[0][1] == slice(None):
            return parts[0][0](x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = torch.cat([layer.weight[rows].to(dtype) for layer, rows in parts])
        bias = torch.cat([layer.bias[rows].to(dtype) for layer, rows in parts])
        return F.linear(x, weight, bias)


def take(x: Tensor, at: Tensor) -> Tensor:
    """Gathers rows of each item: (B, n, D), ids (B, m) -> (B, m, D)."""
    return x.flatten(0, 1).index_select(0, flat_ids(at, x.shape[1])).view(*at.shape, -1)


def flat_ids(at: Tensor, n: int) -> Tensor:
    """Maps ids (B, m) within items of ``n`` rows to ids (B m) of the rows of all items."""
    return (at + n * torch.arange(at.shape[0], device=at.device)[:, None]).flatten()
