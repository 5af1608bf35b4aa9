"""Computes norms, effective rank and spread of tokens, batch by batch.

``norms``: mean, standard deviation and maximum of the L2 norms. ``spread`` and ``rank`` are
``std`` and ``rank`` of ``collapse.py``, computed on content, the difference of a token from the
mean at its position over the clips. (A class token is alone in its clip: its spread is in units of
its root mean square.) The rank is taken over 512 tokens drawn evenly from all; it is 0 if the clips
give the same tokens up to rounding.

Only those 512 tokens and a sum per position are kept, so any number of clips is possible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bat.eval.collapse import FEWEST, ROWS, effective_rank

ROUNDING = 1e-5
"""Deviation between clips, relative to the tokens' root mean square, that is due to rounding."""


class TokenStatistics:
    """Statistics of one kind of token, gathered batch by batch.

    Content is measured from the first batch's mean at each position, so that float32 resolves
    tokens that are nearly the same; sums are float64.
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
