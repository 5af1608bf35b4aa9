"""Transformer block, post-norm as in the paper or pre-norm as an option (docs/method.md 2).

    post:  x = LN1(x + Attn(x));       x = LN2(x + MLP(x))
    pre:   x = x + Attn(LN1(x));       x = x + MLP(LN2(x))

with drop path on both branches and optionally a learned scale on each (LayerScale). Names are
timm's. DropPath differs: timm's keeps the rate as a Python number, on which torch.compile
specialises, giving one graph per block; after eight of them blocks run uncompiled. Here it is a
buffer. (timm is not imported here: importing it takes a second, three without byte code.)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bat.nn.attention import Attention, Backend, take

EPS = 1e-6
"""Epsilon of every LayerNorm in the encoder and the decoder."""


class Mlp(nn.Module):
    """MLP of linear, GELU (erf), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s


class DropPath(nn.Module):
    """Drops a clip's branch with probability ``rate``, scales up the rest (stochastic depth)."""

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(float(rate)), persistent=False)
        self.active = rate > 0

    def set(self, rate: float, *, active: bool) -> None:
        """Sets the rate; ``active`` is the whole encoder's, so all blocks compile to one graph."""
        self.rate.fill_(rate)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, ...) to (B, ...)."""
        if not (self.active and self.training):
            return x
        keep = 1 - self.rate
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP with residuals; ``forward`` also returns the MLP's output."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        gate: bool = True,
        norm_order: Literal["post", "pre"] = "post",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.recompute = False
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, gate=gate, backend=attention)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.ls1 = LayerScale(width, layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.ls2 = LayerScale(width, layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, *, projected: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, n, D) to end-of-block tokens and the MLP's output before its residual.

        If ``recompute`` is set, the backward pass recomputes the block instead of storing its
        activations (activation checkpointing): the same numbers, less memory, more time.

        ``projected``: ``attn.project`` of the attention's input, if the caller has it already
        (post-norm only). ``at``: ids (B, m) of selected tokens; both results are then (B, m, D).
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, projected, at, use_reentrant=False)
        return self._forward(x, projected, at)

    def _forward(
        self, x: Tensor, projected: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert projected is None or (self.norm_order == "post" and at is None)
        normed = x if self.norm_order == "post" else self.norm1(x)
        mixed = self.attn(normed, at) if projected is None else self.attn.combine(projected)
        x = x if at is None else take(x, at)
        x = x + self.drop_path(self.ls1(mixed))
        if self.norm_order == "post":
            x = self.norm1(x)
            mlp = self.mlp(x)
            return self.norm2(x + self.drop_path(self.ls2(mlp))), mlp
        mlp = self.mlp(self.norm2(x))
        return x + self.drop_path(self.ls2(mlp)), mlp


def init_linears(module: nn.Module) -> None:
    """Initialises each linear: Xavier-uniform weights (fused qkv as one matrix), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def blocks_of(module: nn.Module) -> list[Block]:
    """Returns all blocks within ``module``, in module order."""
    return [part for part in module.modules() if isinstance(part, Block)]
