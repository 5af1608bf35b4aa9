"""Mixes the blocks: ``sum_l alpha_l n(z_l)``, ``n(x) = x / ||x||`` (docs/method.md 4).

A plain implementation makes two float32 stacks of all blocks, one normalised and one weighted, and
keeps both for the backward pass. Here tokens are normalised and summed a few at a time (all at once
on a GPU) while they are in the cache; only the norms, (L, tokens), are kept. Registered as a
PyTorch library operator (``bat::mix_normalised``), so that ``torch.compile`` treats it as one node.
Sums and norms are float32 whatever the features are (float64 stays), with no copy of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-12
"""Lower bound of the norm in divisions, as in ``torch.nn.functional.normalize``."""
CPU_ELEMENTS = 512 * 768
"""Elements of one block processed at a time on the CPU: 1.6 MB of float32."""


def mix_normalised(layers: Tensor, gate: Tensor) -> Tensor:
    """Returns ``sum_l gate_l n(layers_l)``: (L, ..., D), (L,) -> (..., D), not normalised again.

    Float32 (float64 for float64 ``layers``). Both inputs receive gradients.
    """
    rows = layers.unsqueeze(1) if layers.ndim == 3 else layers  # class tokens: as of one clip
    rows = rows.flatten(2, -2)  # (L, B, N, D)
    mixed, _ = torch.ops.bat.mix_normalised(rows, gate.to(sum_type(layers)))
    return mixed.view(layers.shape[1:])


def few_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """Applies ``layer`` in its own type, also under autocast: (G, I) -> (G, O).

    For few rows G: the product is cheap, and autocast's copies of a wide weight and of its gradient
    would be the largest memory of a training step.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x)


def sum_type(x: Tensor) -> torch.dtype:
    """Returns the type of norms and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields indices (clips, tokens) of the pieces that are processed together."""
    _, B, N, D = rows.shape
    if rows.device.type != "cpu":
        yield slice(None), slice(None)
        return
    tokens = max(1, CPU_ELEMENTS // D)
    clips = max(1, tokens // max(1, N))  # several short clips per call
    for b in range(0, B, clips):
        for start in range(0, N, tokens):
            yield slice(b, b + clips), slice(start, start + tokens)


@torch.library.custom_op(
    "bat::mix_normalised",
    mutates_args=(),
    schema="(Tensor rows, Tensor gate) -> (Tensor, Tensor)",
)
def _mix(rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes rows (L, B, N, D) by gate (L,); returns mixed (B, N, D) and norms (L, B, N, 1)."""
    L, B, N, D = rows.shape
    mixed = gate.new_zeros(B, N, D)
    norms = gate.new_empty(L, B, N, 1)
    with torch.autocast(rows.device.type, enabled=False):  # sums in the gate's type
        for b, n in _pieces(rows):
            total = mixed[b, n]
            for block in range(L):
                z, norm = rows[block, b, n].to(gate.dtype), norms[block, b, n]
                torch.linalg.vector_norm(z, dim=-1, keepdim=True, out=norm)
                total.addcmul_(z, gate[block] / norm.clamp_(min=EPS))
    return mixed, norms


@_mix.register_fake
def _(rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    L, B, N, D = rows.shape
    return gate.new_empty(B, N, D), gate.new_empty(L, B, N, 1)


@torch.library.custom_op(
    "bat::mix_normalised_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor gate, Tensor norms, bool wanted) -> (Tensor, Tensor)",
)
def _mix_backward(
    grad: Tensor, rows: Tensor, gate: Tensor, norms: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Returns gradients of the gate (L,) and, if ``wanted``, of the rows (else an empty tensor)."""
    to_gate = torch.zeros_like(gate)
    to_rows = torch.empty_like(rows) if wanted else rows.new_empty(0)
    with torch.autocast(rows.device.type, enabled=False):  # as in the forward
        for b, n in _pieces(rows):
            g = grad[b, n]
            for block in range(len(rows)):
                z, norm = rows[block, b, n].to(gate.dtype), norms[block, b, n]
                along = torch.linalg.vecdot(g, z).unsqueeze(-1) / norm  # grad . n(z)
                to_gate[block] += along.sum()
                if wanted:
                    to_rows[block, b, n] = gate[block] / norm * (g - along * z / norm)
    return to_gate, to_rows


@_mix_backward.register_fake
def _(
    grad: Tensor, rows: Tensor, gate: Tensor, norms: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(rows) if wanted else rows.new_empty(0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    rows, gate = inputs
    ctx.save_for_backward(rows, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    to_gate, to_rows = torch.ops.bat.mix_normalised_backward(grad, *ctx.saved_tensors, wanted)
    return to_rows if wanted else None, to_gate


_mix.register_autograd(_back, setup_context=_save)
