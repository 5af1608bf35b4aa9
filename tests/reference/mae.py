"""The masked autoencoder's loss, patch by patch."""

from __future__ import annotations

import torch
from torch import Tensor


def loss(spectrogram: Tensor, predictions: Tensor, mask: Tensor, *, patch: int) -> float:
    """``spectrogram`` (B, 1, frames, mels), ``predictions`` (B, hidden, P) of the hidden patches in
    ascending order, ``mask`` (B, N) True where hidden; time-major patches."""
    B, _, _, mels = spectrogram.shape
    columns, total, count = mels // patch, 0.0, 0
    for b in range(B):
        hidden = [i for i in range(mask.shape[1]) if mask[b, i]]
        for row, i in enumerate(hidden):
            time, freq = i // columns * patch, i % columns * patch
            values = spectrogram[b, 0, time : time + patch, freq : freq + patch].flatten()
            mean = sum(float(v) for v in values) / len(values)
            variance = sum((float(v) - mean) ** 2 for v in values) / len(values)
            wanted = (values - mean) / torch.tensor(variance + 1e-6).sqrt()
            total += float((predictions[b, row] - wanted).square().mean())
            count += 1
    return total / count
