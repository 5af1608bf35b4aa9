"""Blocked attention for CPUs in 16-bit arithmetic, which keeps the scores in cache.

PyTorch's fused attention on the CPU is slow in bfloat16, especially its backward pass, and plain
matmul-softmax-matmul writes all (B, H, n, n) scores to memory. Here ``GROUP`` scores are computed
at a time by batched products over a few heads, used while they are in cache, and recomputed in the
backward pass: nothing of size n^2 is stored. Values are rounded as in matmul-softmax-matmul
under autocast: scores and weights in the inputs' type, the softmax between them in float32.

It is one operator for ``torch.compile`` (``bat::blocked_attention``). float32 and float64 also work
(tests check gradients in them), but PyTorch's kernel is as fast there (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

GROUP = 2**20
"""Scores computed at a time: 2 MB in bfloat16. 2^19 to 2^21 are about equal, 2^18, 2^24 slower."""


@torch.library.custom_op("bat::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes ``softmax(q k^T / sqrt(d)) v``: (B, H, m, d), (B, H, n, d) twice -> (B, H, m, d)."""
    queries, keys, values = _heads(q), _heads(k), _heads(v)  # (B H, ., d)
    out = torch.empty_like(queries)
    for part in _groups(queries, keys):
        torch.bmm(_weights(queries[part], keys[part]), values[part], out=out[part])
    return out.view(q.shape)


@torch.library.custom_op("bat::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes gradients of q, k and v from the output's; recomputes the weights."""
    queries, keys, values, given = _heads(q), _heads(k), _heads(v), _heads(grad)
    to_q, to_k, to_v = (torch.empty_like(x) for x in (queries, keys, values))
    scale = q.shape[-1] ** -0.5
    for part in _groups(queries, keys):
        weights = _weights(queries[part], keys[part])  # (heads, m, n)
        torch.bmm(weights.transpose(1, 2), given[part], out=to_v[part])
        through = torch.bmm(given[part], values[part].transpose(1, 2))
        # w (g - sum_n g w) in one pass, as in softmax's own backward
        scores = torch.ops.aten._softmax_backward_data(through, weights, -1, weights.dtype)
        torch.bmm(scores, keys[part], out=to_q[part])
        torch.bmm(scores.transpose(1, 2), queries[part], out=to_k[part])
    return to_q.mul_(scale).view(q.shape), to_k.mul_(scale).view(k.shape), to_v.view(v.shape)


def _heads(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]).contiguous()


def _groups(queries: Tensor, keys: Tensor) -> list[slice]:
    heads = max(1, GROUP // (queries.shape[1] * keys.shape[1]))
    return [slice(i, i + heads) for i in range(0, len(queries), heads)]


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    scores = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
    scale = queries.shape[-1] ** -0.5
    torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@blocked_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = blocked_attention_backward(grad, *ctx.saved_tensors)
    return gradients


blocked_attention.register_autograd(_backward, setup_context=_keep)


def _products(q_shape: Any, k_shape: Any, count: int) -> int:
    B, H, m, d = q_shape
    return count * 2 * B * H * m * k_shape[2] * d


@register_flop_formula(torch.ops.bat.blocked_attention)
def _(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _products(q_shape, k_shape, 2)


@register_flop_formula(torch.ops.bat.blocked_attention_backward)
def _(grad: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _products(q_shape, k_shape, 5)
