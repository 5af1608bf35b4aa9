"""SSLAM: EAT's objective, continued on mixtures of clips (Alex et al., ICLR 2025).

Each clip b of the batch also gives a mixture with the clip before it, in the standardised log-mel:

    m_b = max(x_b, x_{b-1}) for each frame and bin; in two stripes of 15/64 of the clip, m_b = x_b

Student and teacher see x and m; a mixture has its clip's masks. The loss has EAT's terms for both
kinds and a third that keeps the sources of a mixture apart:

    y_b    = EAT's target of x_b, from all blocks; m_b has its own alike
    g_b    = EAT's target from the last block alone, of x_b and m_b
    r_b    = EAT's target of x_{b-1} of which the teacher sees the mixed patches alone
    s_b    = (y_b + r_b) / 2 at mixed patches, y_b in the stripes
    local  = mean over masked patches of x and m of mean_D (prediction - y)^2
    global = mean over x and m of (student class token - mean over patches of g)^2
    source = mean over masked patches of m of mean_D (prediction - s)^2
    loss   = sqrt(D) (local + source + global_weight * global)              float32

Stage 2 starts from EAT's weights (``init=``, its teacher included); recipe ``sslam-as2m``.
Departure: the stripes are drawn for each clip from (seed, place in the stream); SSLAM draws them
once for the batch of a GPU. Partners come from the same micro-batch of the same device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bat.errors import UserError
from bat.nn.attention import take
from bat.nn.masking import row_seeds, splitmix64
from bat.objectives.eat import EAT
from bat.objectives.masked_latent import Mask, gather_patches, global_loss, standardise
from bat.seeding import derive_seed
from bat.types import Grid, Views, WaveBatch


class SSLAM(EAT):
    """EAT's objective on clips and on mixtures of two."""

    @dataclass
    class Config(EAT.Config):
        """The settings of EAT; half as many views, since mixtures double the clips."""

        name: str = "sslam"
        mask: Mask = field(default_factory=lambda: Mask(views=8))

    graphs = ("mixture_targets", "mixture_losses")

    def describe(self) -> str:
        return f"SSLAM, {self.mask.views} views of each clip and each mixture"

    def forward(self, batch: WaveBatch) -> dict[str, Tensor]:
        if len(batch.waves) < 2 and torch.is_grad_enabled():  # a dry run shows one clip
            raise UserError("objective sslam mixes clips of a batch: say data.batch=2 or more")
        spectrogram, views = self.spectrogram(batch), self.draw_views(batch.positions)
        mixed = self.draw_mixed(batch.positions)  # (B, T)
        targets = self.mixture_targets(spectrogram, mixed)
        return self.mixture_losses(spectrogram, mixed, views, *targets)

    def local_targets(self, batch: WaveBatch) -> tuple[str, Tensor]:
        mixed = self.draw_mixed(batch.positions)
        return "loss_local", self.mixture_targets(self.spectrogram(batch), mixed)[0]

    def draw_mixed(self, positions: Tensor) -> Tensor:
        """Returns (B, T) bool on the device, True where time patches are mixed: all but two stripes
        that do not overlap, drawn from (seed, position)."""
        seeds = row_seeds(derive_seed(self.seed, "stripes"), positions, 1)
        seeds = seeds.to(next(self.parameters()).device, non_blocking=True)
        return ~stripes(self.student.encoder.grid, seeds)

    @torch.no_grad()
    def mixture_targets(self, spectrogram: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y (2B, N, D) and the means of g (2B, D) of clips and mixtures, and s (B, N, D).

        ``spectrogram``: (B, 1, frames, mels) of the clips; ``mixed``: (B, T) bool.
        """
        encoder = self.teacher.encoder
        clips = spectrogram.roll(1, 0)  # clip b - 1
        y, _, last = self.targets_of(encoder.embed_patches(self.with_mixtures(spectrogram, mixed)))
        whole = standardise(last, 2, self.eps).mean(1)
        ids = mixed_ids(mixed, encoder.grid.freq)  # (B, n)
        seen = self.targets_of(take(encoder.embed_patches(clips), ids))[0]  # (B, n, D)
        own = y[: len(spectrogram)]
        at = ids[..., None].expand_as(seen)
        return y, whole, own.scatter(1, at, (own.gather(1, at) + seen) / 2)

    def mixture_losses(
        self,
        spectrogram: Tensor,
        mixed: Tensor,
        views: Views,
        y: Tensor,
        whole: Tensor,
        sources: Tensor,
    ) -> dict[str, Tensor]:
        """Computes the losses of ``forward`` from the targets of ``mixture_targets``."""
        chosen = None if views.chosen is None else views.chosen.repeat(2, 1)
        both = Views(views.keep_ids.repeat(2, 1), views.mask.repeat(2, 1), chosen)
        cls, predictions = self.student.predict(self.with_mixtures(spectrogram, mixed), both)
        predictions = predictions.float()  # (2 B V, m, D)
        local = F.mse_loss(predictions.flatten(0, 1), gather_patches(y, both.predict_ids))
        of_mixtures = predictions[len(views.mask) :].flatten(0, 1)
        source = F.mse_loss(of_mixtures, gather_patches(sources, views.predict_ids))
        global_ = global_loss(cls, whole)
        return {
            "loss": self.total(local + source, global_),
            "loss_local": local,
            "loss_source": source,
            "loss_global": global_,
            "target_std": y.flatten(0, 1).std(0, unbiased=False).mean(),
        }

    def with_mixtures(self, spectrogram: Tensor, mixed: Tensor) -> Tensor:
        """Maps (B, 1, frames, mels) to (2B, 1, frames, mels): the clips, then their mixtures."""
        frames = mixed.repeat_interleave(self.student.encoder.patch, 1)[:, None, :, None]
        loudest = torch.maximum(spectrogram, spectrogram.roll(1, 0))
        return torch.cat([spectrogram, torch.where(frames, loudest, spectrogram)])


def stripes(grid: Grid, seeds: Tensor) -> Tensor:
    """Returns (rows, T) bool, True in two disjoint stripes of ``15 T // 64`` time patches.

    The first starts uniformly in the first half, the second uniformly between the first one's end
    and 3/4 of the clip. ``seeds``: (rows,) int64.
    """
    T, size = grid.time, 15 * grid.time // 64
    drawn = (splitmix64(seeds, 2) >> 33) & (2**31 - 1)  # (rows, 2)
    first = drawn[:, 0] % max(1, T // 2)
    second = first + size + drawn[:, 1] % (3 * T // 4 - first - size + 1)
    time = torch.arange(T, device=seeds.device)
    starts = torch.stack([first, second], dim=1)[..., None]  # (rows, 2, 1)
    return ((time >= starts) & (time < starts + size)).any(1)


def mixed_ids(mixed: Tensor, freq: int) -> Tensor:
    """Returns the ascending ids (B, n) of the patches in mixed time patches (B, T); all rows have
    the same number of them."""
    T = mixed.shape[1]
    count = T - 2 * (15 * T // 64)
    times = mixed.int().topk(count, dim=1, sorted=False).indices.sort(dim=1).values  # (B, count)
    return (times[..., None] * freq + torch.arange(freq, device=mixed.device)).flatten(1)


OBJECTIVE = SSLAM
