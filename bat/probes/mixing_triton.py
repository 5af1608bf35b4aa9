"""The mixing of the blocks as Triton kernels: each block is read once, forward or backward.

One program takes one token through all blocks: norms and the weighted sum stay in registers. The
backward is that of the gate alone, which is what a frozen encoder needs; each program writes its
token's L terms and they are summed after, so the result is the same every time.
Not the default, and not measured on a GPU: see ``extremes_triton.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bat.probes.extremes_triton import on_device, require

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # not on every platform
    triton = None

if triton is not None:

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        rows,  # (L, B, N, D), any strides
        gate,  # (L,) float32
        mixed,  # (B N, D) float32
        norms,  # (L, B N) float32
        tokens,
        N,
        stride_l,
        stride_b,
        stride_n,
        stride_d,
        eps,
        L: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        here = rows + (t // N) * stride_b + (t % N) * stride_n + d * stride_d
        total = tl.zeros([BLOCK_D], tl.float32)
        for block in range(L):
            z = tl.load(here, mask=d < D, other=0.0).to(tl.float32)
            here += stride_l  # a pointer: block * stride_l would overflow 32 bits
            norm = tl.maximum(tl.sqrt(tl.sum(z * z, 0)), eps)
            tl.store(norms + block * tokens + t, norm)
            total += z * (tl.load(gate + block) / norm)
        tl.store(mixed + t * D + d, total, mask=d < D)

    @triton.jit
    def _backward(  # type: ignore[no-untyped-def]
        grad,  # (B N, D) float32
        rows,
        norms,
        terms,  # (L, B N) float32: grad . n(z) of each block and token
        tokens,
        N,
        stride_l,
        stride_b,
        stride_n,
        stride_d,
        L: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        here = rows + (t // N) * stride_b + (t % N) * stride_n + d * stride_d
        g = tl.load(grad + t * D + d, mask=d < D, other=0.0)
        for block in range(L):
            z = tl.load(here, mask=d < D, other=0.0).to(tl.float32)
            here += stride_l
            at = block * tokens + t
            tl.store(terms + at, tl.sum(g * z, 0) / tl.load(norms + at))


def mix(rows: Tensor, gate: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Rows (L, B, N, D), gate (L,) float32 -> mixed (B, N, D), norms (L, B, N, 1).

    Raises ``UserError`` where Triton or a GPU is missing.
    """
    require(rows)
    L, B, N, D = rows.shape
    mixed, norms = gate.new_empty(B, N, D), gate.new_empty(L, B, N, 1)
    with on_device(rows):
        _forward[(B * N,)](
            rows, gate, mixed, norms, B * N, N, *rows.stride(), eps,
            L=L, D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=4,
        )  # fmt: skip
    return mixed, norms


def gate_gradient(grad: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """Gradient of the gate (L,) from that of ``mixed``."""
    require(rows)
    L, B, N, D = rows.shape
    terms = torch.empty_like(norms)
    with on_device(rows):
        _backward[(B * N,)](
            grad.contiguous(), rows, norms, terms, B * N, N, *rows.stride(),
            L=L, D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=4,
        )  # fmt: skip
    return terms.flatten(1).sum(1)
