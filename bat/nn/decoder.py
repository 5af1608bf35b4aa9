"""Decoders of masked latent regression: visible tokens in, a prediction for every patch out.

``ViTDecoder`` (SPEC section 3): visible tokens (no class token) are placed in a canvas of a learned
mask token, a *trained* position code is added, post-norm gated blocks, a linear without bias back
to the encoder's width. ``CNNDecoder`` is data2vec 2.0's, for the ablation: on the (T, F) grid, each
layer 3 x 3 grouped convolution -> LayerNorm over channels without affine -> GELU, with a residual
around it where widths agree, and a linear with bias at the end.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.nn.attention import Backend
from bat.nn.block import Block, init_linears
from bat.nn.embed import PosLayout, position_code
from bat.shapes import Grid, Views

TOKEN_STD = 0.02


def place(visible: Tensor, views: Views, fill: Tensor) -> Tensor:
    """Scatter ``visible`` (rows, n, D) into a canvas (rows, N, D) of ``fill`` (1, 1, D)."""
    rows, N = views.mask.shape
    canvas = fill.to(visible.dtype).expand(rows, N, -1)
    index = views.keep_ids[..., None].expand(-1, -1, visible.shape[-1])
    return canvas.scatter(1, index, visible)


class ViTDecoder(nn.Module):
    """Transformer decoder: ``vit12h`` is 12 heads with MLP ratio 4, ``vit6h`` 6 heads with 2."""

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        *,
        width: int | None = None,
        depth: int = 6,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        gate: bool = True,
        pos_layout: PosLayout = "reference",
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        width = width or encoder_width
        self.in_proj = (
            nn.Linear(encoder_width, width, bias=False) if width != encoder_width else nn.Identity()
        )
        self.mask_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(position_code(width, grid, pos_layout))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, gate=gate, attention=attention)
            for _ in range(depth)
        )
        self.out_proj = nn.Linear(width, encoder_width, bias=False)
        init_linears(self)

    def forward(self, visible: Tensor, views: Views) -> Tensor:
        """(rows, n, D) visible tokens -> (rows, N, D) predictions."""
        x = place(self.in_proj(visible), views, self.mask_token)  # (rows, N, D_dec)
        x = x + self.pos_embed
        for block in self.blocks:
            x, _ = block(x)
        return self.out_proj(x)  # (rows, N, D)


class CNNDecoder(nn.Module):
    """Convolutional decoder of data2vec 2.0."""

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        *,
        width: int | None = None,
        depth: int = 6,
        groups: int = 16,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        width = width or encoder_width
        if width % groups or encoder_width % groups:
            raise ValueError(
                f"the cnn decoder's widths ({encoder_width}, {width}) must be multiples of {groups}"
            )
        self.grid = grid
        self.mask_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, encoder_width))
        widths = [encoder_width, *[width] * depth]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding="same", groups=groups)
            for a, b in itertools.pairwise(widths)
        )
        self.out_proj = nn.Linear(width, encoder_width)
        init_linears(self)

    def forward(self, visible: Tensor, views: Views) -> Tensor:
        """(rows, n, D) visible tokens -> (rows, N, D) predictions."""
        x = place(visible, views, self.mask_token)  # (rows, N, D)
        x = x.transpose(1, 2).unflatten(2, (self.grid.time, self.grid.freq))  # (rows, D, T, F)
        for conv in self.convs:
            y = conv(x).permute(0, 2, 3, 1)  # channels last for the norm
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).permute(0, 3, 1, 2)
            x = x + y if x.shape == y.shape else y
        return self.out_proj(x.flatten(2).transpose(1, 2))
