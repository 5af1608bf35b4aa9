"""Has an encoder collapsed? Two numbers that say how much it tells clips apart.

Last-block patch tokens y (B, N, D) of whole clips, unmasked. What a token says of its position
alone is no content, so the mean over the clips at each position is taken off:

    c_bi = y_bi - mean_b y_bi
    std  = sqrt( sum c^2 / ((B - 1) N D)  /  max(v, 1e-4 m) )      v: variance of all B N tokens,
                                                                   m: mean of y^2
    rank = exp( - sum_k p_k ln p_k ),   p_k = s_k / sum s,   s the singular values of the c_bi

``std`` is 0 where all clips give the same tokens, and about 1 where tokens differ between clips as
much as they do within one; the floor under v is for an encoder that says the same everywhere.
``rank`` is RankMe (Garrido et al. 2023, arXiv 2210.02885), the number of directions in use, at most
min(rows, D); RankMe is not centred, and taken over one vector a clip. Here it is centred as above,
and over tokens, since a batch has too few clips; over a sample of them, to be quick.

In float32 whatever the run computes in: the rounding of bfloat16 alone has hundreds of directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bat.nn.attention import Attention

ROWS = 512
"""Tokens of which the rank is computed: its cost is that of the eigenvalues of a 512 x 512."""

FEWEST = 5
"""Clips below which the rank says nothing: an encoder that gives each clip one vector, and so tells
them apart, has at most one direction fewer than there are clips."""

SAME = 1e-3
"""Clips that differ less than this, against how much their spectrograms vary, are the same sound
(silence) and say nothing of the encoder."""


def effective_rank(x: Tensor) -> float:
    """(n, D) -> exp of the entropy of the normalised singular values, in [1, min(n, D)].

    Not centred here. 0 for an ``x`` of zeros, NaN where it is not finite.
    """
    x = x.detach().double().cpu()  # a Gram matrix squares the error; not every device has float64
    if not torch.isfinite(x).all():
        return math.nan
    small = x @ x.T if len(x) < x.shape[1] else x.T @ x  # (k, k), k = min(n, D)
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def representation(encoder: nn.Module, spectrogram: Tensor, clips: int = 8) -> dict[str, float]:
    """``{"rank", "std"}`` of the first ``clips`` of (B, 1, frames, mels), see above.

    Both are NaN for fewer than two clips, for clips that all sound the same, and for tokens that
    are not finite; the rank for fewer than five clips. Leaves modes and random state as they were.
    Under FSDP2 every rank must call it, the encoder's own weights being gathered
    (``Shardable.within``).
    """
    x = spectrogram[:clips].float()
    unknown = {"rank": math.nan, "std": math.nan}
    with plain_float32(encoder, x.device.type):
        y: Tensor = x
        for out, _mlp in encoder.layers(encoder.embed(x)):  # type: ignore[operator]
            y = out  # only the last block's is wanted
        y = y[:, 1:].float()  # (B, N, D)
    # the forward pass comes first: no rank of a sharded encoder may leave it out
    if len(x) < 2 or not _relative(x.flatten(1)[..., None]) >= SAME:
        return unknown
    std = _relative(y)
    if len(x) < FEWEST or not math.isfinite(std):
        return unknown | {"std": std}
    content = (y - y.mean(0)).flatten(0, 1)  # (B N, D)
    order = torch.randperm(len(content), generator=torch.Generator().manual_seed(0))
    return {"rank": effective_rank(content[order[:ROWS].to(content.device)]), "std": std}


def _relative(y: Tensor) -> float:
    """(B, N, D) -> deviation between clips in units of that between tokens."""
    B, N, D = y.shape
    between = (y - y.mean(0)).square().sum() / ((B - 1) * N * D)
    whole = (y - y.mean((0, 1))).square().mean()
    floor = (1e-4 * y.square().mean()).clamp(min=1e-30)  # zeros say the same everywhere, too
    return float((between / torch.maximum(whole, floor)).sqrt())


@contextmanager
def plain_float32(encoder: nn.Module, device: str) -> Iterator[None]:
    """Eval mode, float32, nothing compiled; attention kernels that know only 16 bits set aside."""
    modes = [(part, part.training) for part in encoder.modules()]
    kernels = [(part, part.backend) for part in encoder.modules() if isinstance(part, Attention)]
    try:
        encoder.eval()
        for part, backend in kernels:
            part.backend = "auto" if backend in ("flash", "cudnn") else backend
        with torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, backend in kernels:
            part.backend = backend
        for each, mode in modes:
            each.training = mode
