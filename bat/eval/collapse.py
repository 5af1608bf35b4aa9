"""Detects a collapsed encoder: two numbers that measure how well its tokens tell clips apart.

Last-block patch tokens y (B, N, D) of whole clips, unmasked. The part of a token that depends on
its position alone carries no content, so the mean over the clips is subtracted at each position:

    c_bi = y_bi - mean_b y_bi
    std  = sqrt( sum c^2 / ((B - 1) N D)  /  max(v, 1e-4 m) )      v: variance of all B N tokens,
                                                                   m: mean of y^2
    rank = exp( - sum_k p_k ln p_k ),   p_k = s_k / sum s,   s the singular values of the c_bi

``std`` is 0 if all clips give the same tokens, and about 1 if tokens differ between clips as much
as they do within one; the floor under v covers an encoder whose tokens are the same everywhere.
``rank`` is RankMe (Garrido et al. 2023, arXiv 2210.02885), the number of directions in use, at most
min(rows, D). RankMe is not centred and uses one vector per clip. Here the tokens are centred as
above and used individually, since a batch has too few clips; a sample of them, for speed.

Computed in float32 whatever the run's precision: the rounding errors of bfloat16 alone span
hundreds of directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bat.nn.attention import Attention

ROWS = 512
"""Tokens used for the rank; its cost is that of the eigenvalues of a 512 x 512 matrix."""

FEWEST = 5
"""Fewest clips for a meaningful rank: an encoder that gives each clip one vector, and so tells them
apart, has at most one direction fewer than there are clips."""

SAME = 1e-3
"""Least deviation between clips, relative to the variation of their spectrograms: clips below it
are the same sound (silence) and say nothing about the encoder."""


def effective_rank(x: Tensor) -> float:
    """Returns exp of the entropy of the normalised singular values of (n, D), in [1, min(n, D)].

    ``x`` is not centred here. Returns 0 for an ``x`` of zeros, NaN if it is not finite.
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
    """Returns ``{"rank", "std"}`` of the first ``clips`` of (B, 1, frames, mels), see above.

    Both are NaN for fewer than two clips, for clips that all sound the same, and for tokens that
    are not finite; the rank also for fewer than five clips. Modes and random state are left
    unchanged. Under FSDP2 every rank must call it, since the encoder's own weights are gathered
    (``TrainingModule.within``).
    """
    x = spectrogram[:clips].float()
    unknown = {"rank": math.nan, "std": math.nan}
    with plain_float32(encoder, x.device.type):
        y: Tensor = x
        for out, _mlp in encoder.layers(encoder.embed(x)):  # type: ignore[operator]
            y = out  # only the last block's output is needed
        y = y[:, 1:].float()  # (B, N, D)
    # the forward pass comes first: every rank of a sharded encoder must run it
    if len(x) < 2 or not _relative(x.flatten(1)[..., None]) >= SAME:
        return unknown
    std = _relative(y)
    if len(x) < FEWEST or not math.isfinite(std):
        return unknown | {"std": std}
    content = (y - y.mean(0)).flatten(0, 1)  # (B N, D)
    order = torch.randperm(len(content), generator=torch.Generator().manual_seed(0))
    return {"rank": effective_rank(content[order[:ROWS].to(content.device)]), "std": std}


def _relative(y: Tensor) -> float:
    """Returns the deviation between clips in units of that between tokens, for (B, N, D)."""
    B, N, D = y.shape
    between = (y - y.mean(0)).square().sum() / ((B - 1) * N * D)
    whole = (y - y.mean((0, 1))).square().mean()
    floor = (1e-4 * y.square().mean()).clamp(min=1e-30)  # zeros are the same everywhere, too
    return float((between / torch.maximum(whole, floor)).sqrt())


@contextmanager
def plain_float32(encoder: nn.Module, device: str) -> Iterator[None]:
    """Sets eval mode and float32, nothing compiled; disables attention kernels for 16 bits only."""
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
