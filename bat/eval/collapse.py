"""Measures how well an encoder's tokens tell clips apart: two numbers, which detect its collapse.

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

ROUNDING = 1e-5
"""Deviation between clips, relative to the tokens' root mean square, that is due to rounding."""

SAME = 1e-3
"""Least deviation between clips, relative to the variation of their spectrograms: clips below it
are the same sound (silence) and say nothing about the encoder."""


def effective_rank(x: Tensor, *, eps: float = 0.0) -> float:
    """Returns exp of the entropy of the normalised singular values of (n, D), in [1, min(n, D)].

    ``x`` is not centred here. ``eps`` is added to each share of the sum, which then exceeds 1;
    RankMe has 1e-7. Returns 0 for an ``x`` of zeros, NaN if it is not finite.
    """
    x = x.detach().double().cpu()  # a Gram matrix squares the error; not every device has float64
    if not torch.isfinite(x).all():
        return math.nan
    small = x @ x.T if len(x) < x.shape[1] else x.T @ x  # (k, k), k = min(n, D)
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total + eps).sum().exp())


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
        for out, _mlp in encoder.layers(encoder.embed_patches(x)):  # type: ignore[operator]
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


class TokenStatistics:
    """Norms, rank and spread of one kind of token, gathered batch by batch.

    ``spread`` and ``rank`` are ``std`` and ``rank`` above, for any number of clips. (A class token
    is alone in its clip: its spread is in units of its root mean square.) Kept are ``ROWS`` tokens
    drawn evenly from all, and a sum per position. Content is measured from the first batch's mean
    at each position, so that float32 resolves tokens that are nearly the same; sums are float64.
    """

    def __init__(self) -> None:
        self.clips = 0
        self.rows = torch.empty(0)  # sampled, relative to the reference
        self.places = torch.empty(0, dtype=torch.int64)
        self.draws = torch.empty(0)

    def add(self, y: Tensor, inside: Tensor, draw: Tensor) -> None:
        """Adds tokens (B, n, D); ``inside`` (B, n): mask; ``draw`` (B, n): sampling order."""
        B, n, D = y.shape
        keep = inside.unsqueeze(-1)
        count = inside.sum(0).double().cpu()  # (n,)
        norm = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)[inside].double().cpu()
        if not self.clips:
            self.reference = (y * keep).sum(0) / inside.sum(0).clamp(min=1)[:, None]  # (n, D)
            self.count = torch.zeros(n, dtype=torch.float64)
            self.sum = torch.zeros(n, D, dtype=torch.float64)
            self.squares = self.norm = self.energy = self.highest = 0.0
        content = (y - self.reference) * keep  # (B, n, D)
        self.clips += B
        self.count += count
        self.sum += content.sum(0).double().cpu()
        self.squares += float(content.square().sum(0).double().sum())
        self.norm += float(norm.sum())
        self.energy += float(norm.square().sum())
        self.highest = max(self.highest, float(norm.max()))
        self._sample(content, inside, draw)

    def _sample(self, content: Tensor, inside: Tensor, draw: Tensor) -> None:
        """Keeps the ``ROWS`` tokens with the lowest draws of all batches."""
        order = draw.masked_fill(~inside, math.inf).flatten()
        lowest, at = order.topk(min(ROWS, int(inside.sum())), largest=False)
        rows = content.flatten(0, 1)[at].cpu()
        draws = torch.cat([self.draws, lowest.cpu()])
        places = torch.cat([self.places, at.cpu() % content.shape[1]])
        keep = draws.argsort()[:ROWS]
        self.rows = torch.cat([self.rows.view(-1, rows.shape[1]), rows])[keep]
        self.draws, self.places = draws[keep], places[keep]

    def norms(self) -> list[float]:
        """Returns mean, standard deviation and maximum of the L2 norms."""
        n = float(self.count.sum())
        mean = self.norm / n
        return [mean, math.sqrt(max(0.0, self.energy / n - mean**2)), self.highest]

    def spread(self) -> float | None:
        """Returns the deviation between clips in units of that between tokens.

        None for fewer than two clips.
        """
        between = self._between()
        if between is None:
            return None
        n, D = float(self.count.sum()), self.sum.shape[1]
        power = max(self.energy / (n * D), 1e-30)  # zeros are the same everywhere, too
        if len(self.count) == 1:
            return math.sqrt(between / power)
        centre = self._mean() + self.reference.double().cpu()  # (n, D): of tokens
        weight = self.count[:, None]
        apart = float((weight * (centre - (weight * centre).sum(0) / n).square()).sum())
        whole = (between * self._degrees() + apart) / (n * D)
        return math.sqrt(between / max(whole, 1e-4 * power))

    def rank(self) -> float | None:
        """Returns the effective rank of content; None below ``FEWEST`` clips, 0 for rounding."""
        between = self._between()
        if between is None or self.clips < FEWEST:
            return None
        if between <= ROUNDING**2 * self.energy / self.sum.shape[1] / float(self.count.sum()):
            return 0.0
        told = self.count[self.places] > 1  # a single clip equals the mean
        return effective_rank((self.rows - self._mean()[self.places])[told])

    def _mean(self) -> Tensor:
        """Returns the mean content at each position, (n, D)."""
        return self.sum / self.count.clamp(min=1)[:, None]

    def _degrees(self) -> float:
        return float((self.count - 1).clamp(min=0).sum()) * self.sum.shape[1]

    def _between(self) -> float | None:
        """Returns the variance of content over clips."""
        if not self._degrees():
            return None
        squares = self.squares - float((self.count[:, None] * self._mean().square()).sum())
        return max(0.0, squares) / self._degrees()


@contextmanager
def plain_float32(encoder: nn.Module, device: str) -> Iterator[None]:
    """Sets eval mode and float32, nothing compiled; disables attention kernels for 16 bits only."""
    modes = [(part, part.training) for part in encoder.modules()]
    kernels = [(part, part.backend) for part in encoder.modules() if isinstance(part, Attention)]
    try:
        encoder.eval()
        for part, backend in kernels:
            part.backend = "auto" if backend in ("flash", "flash4", "cudnn") else backend
        with torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, backend in kernels:
            part.backend = backend
        for each, mode in modes:
            each.training = mode
