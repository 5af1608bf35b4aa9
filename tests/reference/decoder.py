"""The ViT decoder the obvious way: every block on every patch of every view."""

import torch
from torch import Tensor

from bat.nn.decoder import ViTDecoder
from bat.types import Views


def all_patches(decoder: ViTDecoder, visible: Tensor, views: Views) -> Tensor:
    """(rows, n, D) -> predictions for all patches (rows, N, D), of the weights of ``decoder``."""
    visible = decoder.in_proj(visible)
    rows, N = views.mask.shape
    canvas = []
    for row in range(rows):
        seen = dict(zip(views.keep_ids[row].tolist(), visible[row], strict=True))
        canvas.append(torch.stack([seen.get(i, decoder.mask_token[0, 0]) for i in range(N)]))
    x = torch.stack(canvas) + decoder.pos_embed  # (rows, N, D_dec)
    for block in decoder.blocks:
        x, _ = block(x)
    return decoder.out_proj(x)
