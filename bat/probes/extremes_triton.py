"""The forward of prototype pooling as a Triton kernel: no similarity ever leaves the chip.

One program takes a block of prototypes and a group of tokens: it walks over the tokens a block at a
time, holds that block's similarities in registers (float32 sums of bf16, fp16 or fp32 inputs) and
keeps a running minimum and maximum with their tokens. Ties go to the first token, as in the
portable form; a NaN similarity is passed over (where all are, the value is infinite).
Not the default: it waits for a measurement on a GPU (``tools/bench.py cgp``). On the CPU Triton's
interpreter runs it (``TRITON_INTERPRET=1`` before the import), which is how it is tested there, but
for bf16, whose bits Triton 3.6's interpreter multiplies as whole numbers. M and D are constants
of the compilation because that interpreter cannot loop to an argument under numpy 2.4.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from bat.errors import UserError

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # not on every platform
    triton = None

BLOCK_K, BLOCK_M, BLOCK_BYTES = 128, 128, 128
"""Prototypes, tokens, and bytes of channels of one step of a program (32 KB of shared memory)."""

if triton is not None:

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        tokens,  # (G, M, D)
        matrix,  # (K, D)
        out,  # (G, K, P) float32: column 0 gets the minimum where `low`, the last the maximum
        picks,  # (K, E, G) int32
        G,
        K,
        P,
        M: tl.constexpr,
        D: tl.constexpr,
        low: tl.constexpr,
        precision: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        blocks = tl.cdiv(K, BLOCK_K)
        g = (tl.program_id(0) // blocks).to(tl.int64)
        k = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        least = tl.full([BLOCK_K], float("inf"), tl.float32)
        most = tl.full([BLOCK_K], float("-inf"), tl.float32)
        least_at = tl.zeros([BLOCK_K], tl.int32)
        most_at = tl.zeros([BLOCK_K], tl.int32)
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            s = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                p = tl.load(
                    matrix + k[:, None] * D + d[None, :],
                    mask=(k[:, None] < K) & (d[None, :] < D),
                    other=0.0,
                )  # (BLOCK_K, BLOCK_D)
                z = tl.load(
                    tokens + (g * M + m[None, :]) * D + d[:, None],
                    mask=(m[None, :] < M) & (d[:, None] < D),
                    other=0.0,
                )  # (BLOCK_D, BLOCK_M)
                s = tl.dot(p, z, s, input_precision=precision)
            value, at = tl.max(tl.where(m[None, :] < M, s, float("-inf")), 1, return_indices=True)
            most_at = tl.where(value > most, start + at, most_at)
            most = tl.maximum(value, most)
            if low:
                value, at = tl.min(
                    tl.where(m[None, :] < M, s, float("inf")), 1, return_indices=True
                )
                least_at = tl.where(value < least, start + at, least_at)
                least = tl.minimum(value, least)
        E: tl.constexpr = 2 if low else 1
        inside = k < K
        tl.store(out + (g * K + k) * P + P - 1, most, mask=inside)
        tl.store(picks + (k.to(tl.int64) * E + E - 1) * G + g, most_at, mask=inside)
        if low:
            tl.store(out + (g * K + k) * P, least, mask=inside)
            tl.store(picks + k.to(tl.int64) * E * G + g, least_at, mask=inside)


def extremes(tokens: Tensor, matrix: Tensor, out: Tensor, picks: Tensor) -> None:
    """Write extreme products to ``out`` and their tokens to ``picks``.

    ``tokens`` (G, M, D) and ``matrix`` (K, D), contiguous, of one type; ``out`` (G, K, P) float32:
    its last column gets the maximum, its first the minimum where ``picks`` (K, E, G) int32 has
    E = 2. Raises ``UserError`` where Triton, a GPU or a type it multiplies is missing.
    """
    require(tokens)
    assert all(x.is_contiguous() for x in (tokens, matrix, out, picks))
    if not tokens.is_cuda and tokens.dtype == torch.bfloat16:
        raise UserError("kernel=triton: Triton's interpreter cannot multiply bfloat16")
    G, M, D = tokens.shape
    K, E, _ = picks.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    with on_device(tokens):
        _kernel[(G * triton.cdiv(K, BLOCK_K),)](
            tokens,
            matrix,
            out,
            picks,
            G,
            K,
            out.shape[-1],
            M=M,
            D=D,
            low=E == 2,
            precision="ieee" if exact else "tf32",
            BLOCK_K=BLOCK_K,
            BLOCK_M=BLOCK_M if M > 64 else max(16, triton.next_power_of_2(M)),
            BLOCK_D=BLOCK_BYTES // tokens.element_size(),
            num_warps=8,
        )


def require(x: Tensor) -> None:
    """Raise ``UserError`` where a Triton kernel cannot take ``x``."""
    if triton is None:
        raise UserError("kernel=triton: Triton is not installed here; kernel=portable runs")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"kernel=triton needs a GPU, not {x.device}; kernel=portable runs")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"kernel=triton does not take {x.dtype}; kernel=portable does")


def on_device(x: Tensor) -> Any:
    """Context in which Triton launches on ``x``'s GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
