"""Decoders, which predict *masked* patches (``Views.predict_ids``) from the visible tokens.

``ViTDecoder`` (docs/method.md 3): visible tokens (no class token) in a canvas of a learned mask
token, a *trained* position code is added, post-norm gated blocks, a linear without bias back
to the encoder's width. ``CNNDecoder`` is data2vec 2.0's, for the ablation: on the (T, F) grid, each
layer 3 x 3 grouped convolution -> LayerNorm over channels without affine -> GELU, with a residual
around it where widths agree, and a linear with bias at the end. ``CrossDecoder`` is CrossMAE's
(Fu et al., TMLR 2024, arXiv 2401.14391) with CGP's mixing of blocks: a masked patch attends to the
visible tokens alone, so patches that are not predicted cost nothing.

Since the loss uses masked patches only, the ViT decoder's last block and output compute no others.
Its first block sees copies of one token: a masked patch is mask token plus position, the same in
every view, so its queries, keys, values and gate are computed once and copied to all views.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.nn.attention import Backend, attend, flat_ids, take
from bat.nn.block import EPS, Block, Mlp, init_linears
from bat.nn.embed import PosLayout, position_code
from bat.types import Grid, Views

TOKEN_STD = 0.02


def place(visible: Tensor, keep_ids: Tensor, fill: Tensor) -> Tensor:
    """Puts ``visible`` (rows, n, D) at ``keep_ids`` in copies of ``fill`` (N, D): (rows, N, D)."""
    rows, N = len(keep_ids), len(fill)
    canvas = fill.to(visible.dtype).expand(rows, N, -1).flatten(0, 1)
    return canvas.index_copy(0, flat_ids(keep_ids, N), visible.flatten(0, 1)).unflatten(
        0, (rows, N)
    )


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
        out_width: int | None = None,
    ) -> None:
        """``width`` and ``out_width`` None: as wide as the encoder."""
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
        self.out_proj = nn.Linear(width, out_width or encoder_width, bias=False)
        init_linears(self)

    def forward(self, visible: Tensor, views: Views) -> Tensor:
        """Maps (rows, n, D) visible tokens to (rows, m, out_width) predictions for
        ``views.predict_ids``."""
        keep = views.keep_ids  # (rows, n)
        code = self.pos_embed[0]  # (N, D_dec)
        seen = self.in_proj(visible)
        seen = seen + code.index_select(0, keep.flatten()).view_as(seen)  # (rows, n, D_dec)
        unseen = self.mask_token[0] + code  # (N, D_dec), the masked tokens of every view
        x = place(seen, keep, unseen)  # (rows, N, D_dec)
        *others, last = self.blocks
        if others:
            project = others[0].attn.project  # type: ignore[union-attr]
            projected = place(project(seen), keep, project(unseen))  # type: ignore[operator]
            x, _ = others[0](x, projected=projected)
        for block in others[1:]:
            x, _ = block(x)
        x, _ = last(x, at=views.predict_ids)
        return self.out_proj(x)  # (rows, m, out_width)


class CNNDecoder(nn.Module):
    """Convolutional decoder of data2vec 2.0.

    ``noise``: EAT's and SSLAM's form, in which masked places hold fresh N(0, noise^2) instead of a
    mask token, and weights start as PyTorch's default; 0: a mask token. The noise comes from
    torch's global generator, as that of dropout.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        *,
        width: int | None = None,
        depth: int = 6,
        groups: int = 16,
        kernel: int = 3,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        width = width or encoder_width
        if width % groups or encoder_width % groups:
            raise ValueError(
                f"the cnn decoder's widths ({encoder_width}, {width}) must be multiples of {groups}"
            )
        self.grid, self.noise = grid, noise
        if not noise:
            self.mask_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, encoder_width))
        widths = [encoder_width, *[width] * depth]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding="same", groups=groups)
            for a, b in itertools.pairwise(widths)
        )
        self.out_proj = nn.Linear(width, encoder_width)
        if not noise:
            init_linears(self)

    def forward(self, visible: Tensor, views: Views) -> Tensor:
        """Maps (rows, n, D) visible tokens to (rows, m, D) predictions of ``predict_ids``."""
        if self.noise:
            x = self.noise * torch.randn_like(visible[:, :1].expand(-1, self.grid.tokens, -1))
            x = x.scatter(1, views.keep_ids[..., None].expand_as(visible), visible)
        else:
            fill = self.mask_token[0].expand(self.grid.tokens, -1)
            x = place(visible, views.keep_ids, fill)  # (rows, N, D)
        x = x.transpose(1, 2).unflatten(2, (self.grid.time, self.grid.freq))  # (rows, D, T, F)
        for conv in self.convs:
            y = conv(x).permute(0, 2, 3, 1)  # channels last for the norm
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).permute(0, 3, 1, 2)
            x = x + y if x.shape == y.shape else y
        return self.out_proj(take(x.flatten(2).transpose(1, 2), views.predict_ids))


class CrossBlock(nn.Module):
    """Pre-norm block of cross-attention and MLP: no token sees another of its own kind."""

    def __init__(
        self, width: int, context_width: int, heads: int, *, mlp_ratio: float, attention: Backend
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Maps queries (rows, m, D_dec), which attend to ``context`` (rows, n, D), to new ones."""
        parts = [self.q(self.norm1(x)), *self.kv(context).chunk(2, dim=-1)]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        x = x + self.proj(attend(q, k, v, self.attention).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Decoder without self-attention: masked patches attend to mixes of all encoder blocks.

    With the encoder's blocks f_l and decoder block j:

        x_0 = mask token + position
        c_j = LN_j(sum_l softmax(w_j)_l f_l)
        x_j = block_j(x_{j-1}, c_j)

    Departures from CrossMAE: the shares of the blocks are convex and start equal, the encoder's
    input is none of them, and the position code is trained (as in ``ViTDecoder``).
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_depth: int,
        grid: Grid,
        *,
        width: int | None = None,
        depth: int = 6,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        pos_layout: PosLayout = "reference",
        attention: Backend = "auto",
        out_width: int | None = None,
    ) -> None:
        """``width`` and ``out_width`` None: as wide as the encoder."""
        super().__init__()
        width = width or encoder_width
        self.mask_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(position_code(width, grid, pos_layout))
        self.shares = nn.Parameter(torch.zeros(depth, encoder_depth))
        self.norms = nn.ModuleList(nn.LayerNorm(encoder_width, eps=EPS) for _ in range(depth))
        self.blocks = nn.ModuleList(
            CrossBlock(width, encoder_width, heads, mlp_ratio=mlp_ratio, attention=attention)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out_proj = nn.Linear(width, out_width or encoder_width)
        init_linears(self)

    def forward(self, layers: Tensor, views: Views) -> Tensor:
        """Maps the visible tokens of all blocks, class token first, (L, rows, 1 + n, D), to
        (rows, m, out_width) predictions for ``views.predict_ids``."""
        shares = self.shares.softmax(1).to(layers.dtype)  # (depth, L)
        contexts = (shares @ layers.flatten(1)).unflatten(1, layers.shape[1:])
        ids = views.predict_ids
        queries = self.mask_token[0] + self.pos_embed[0]  # (N, D_dec)
        x = queries.index_select(0, ids.flatten()).unflatten(0, ids.shape)
        for block, norm, context in zip(self.blocks, self.norms, contexts, strict=True):
            x = block(x, norm(context))
        return self.out_proj(self.norm(x))
