"""Computes the two triangular mel filter banks, as matrices (bins, mels), by torchaudio."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def htk_bank(*, sample_rate: int, n_fft: int, n_mels: int, device: torch.device) -> Tensor:
    """Triangles of height 1 equally spaced on ``2595 log10(1 + f / 700)`` from 0 to sr / 2.

    Returns:
        (n_fft / 2 + 1, n_mels) float32.
    """
    from torchaudio.functional import melscale_fbanks

    with (
        torch.device("cpu"),
        warnings.catch_warnings(),
    ):  # of bands narrower than a bin, which stay empty
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero")
        high = float(sample_rate // 2)
        return melscale_fbanks(n_fft // 2 + 1, 0.0, high, n_mels, sample_rate).to(device)


def kaldi_bank(*, sample_rate: int, n_fft: int, n_mels: int, device: torch.device) -> Tensor:
    """Triangles, straight on the mel axis ``1127 ln(1 + f / 700)``, from 20 Hz to sr / 2.

    Kaldi leaves the bin at sr / 2 out: its row is zero.

    Returns:
        (n_fft / 2 + 1, n_mels) float32.
    """
    from torchaudio.compliance.kaldi import get_mel_banks

    with torch.device("cpu"):  # no vocal tract length warping: a factor of 1 between 100 and -500
        bank, _ = get_mel_banks(n_mels, n_fft, float(sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0)
    return torch.nn.functional.pad(bank, (0, 1)).T.contiguous().to(device)
