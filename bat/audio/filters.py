"""Computes the two triangular mel filter banks, as matrices (bins, mels).

Both are computed in float32 in the order of operations of torchaudio (2.11), whose banks the
published checkpoints were trained on: equal to the last bit on the same machine, unlike a bank
computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def htk_bank(*, sample_rate: int, n_fft: int, n_mels: int, device: torch.device) -> Tensor:
    """Triangles of height 1 equally spaced on ``2595 log10(1 + f / 700)`` from 0 to sr / 2.

    Returns:
        (n_fft / 2 + 1, n_mels) float32.
    """
    nyquist = sample_rate // 2
    bins = torch.linspace(0, nyquist, n_fft // 2 + 1, device=device)  # Hz
    top = 2595.0 * math.log10(1.0 + nyquist / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, n_mels + 2, device=device) / 2595.0) - 1.0)
    width = edges[1:] - edges[:-1]  # (n_mels + 1,)
    ahead = edges[None, :] - bins[:, None]  # (bins, n_mels + 2)
    rising = -1.0 * ahead[:, :-2] / width[:-1]
    falling = ahead[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0.0)


def kaldi_bank(*, sample_rate: int, n_fft: int, n_mels: int, device: torch.device) -> Tensor:
    """Triangles, straight on the mel axis ``1127 ln(1 + f / 700)``, from 20 Hz to sr / 2.

    Kaldi leaves the bin at sr / 2 out: its row is zero.

    Returns:
        (n_fft / 2 + 1, n_mels) float32.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (20.0, sample_rate / 2))
    step = (high - low) / (n_mels + 1)
    index = torch.arange(n_mels, device=device)[:, None]
    left, centre, right = (low + (index + k) * step for k in (0.0, 1.0, 2.0))  # (n_mels, 1)
    hz = (sample_rate / n_fft) * torch.arange(n_fft // 2, device=device)
    mel = (1127.0 * (1.0 + hz / 700.0).log())[None, :]  # (1, n_fft / 2)
    rising = (mel - left) / (centre - left)
    falling = (right - mel) / (right - centre)
    bank = torch.minimum(rising, falling).clamp(min=0.0)  # (n_mels, n_fft / 2)
    return torch.nn.functional.pad(bank, (0, 1)).T.contiguous()
