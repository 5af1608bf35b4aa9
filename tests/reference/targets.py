"""Targets and losses of masked latent regression the slow way: loops over clips and patches."""

import torch
from torch import Tensor


def standardise(values: Tensor) -> Tensor:
    """A vector, biased variance, eps 1e-6 inside the root."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return torch.stack([(v - mean) / (variance + 1e-6) ** 0.5 for v in values])


def targets(layers: Tensor) -> Tensor:
    """(L, B, N, D) teacher patch tokens -> (B, N, D)."""
    L, B, N, D = layers.shape
    out = torch.zeros(B, N, D, dtype=layers.dtype)
    for b in range(B):
        mean = torch.zeros(N, D, dtype=layers.dtype)
        for layer in range(L):
            for c in range(D):
                mean[:, c] += standardise(layers[layer, b, :, c]) / L
        for i in range(N):
            out[b, i] = standardise(mean[i])
    return out


def losses(
    predictions: Tensor, cls: Tensor, wanted: Tensor, mask: Tensor, views: int
) -> tuple[float, float]:
    """Local and global loss; rows are clip-major, ``mask`` 1 where removed."""
    local, removed, global_ = 0.0, 0, 0.0
    for row in range(predictions.shape[0]):
        clip = row // views
        for i in range(predictions.shape[1]):
            if mask[row, i]:
                local += float(((predictions[row, i] - wanted[clip, i]) ** 2).mean())
                removed += 1
        global_ += float(((cls[row] - wanted[clip].mean(0)) ** 2).mean())
    return local / removed, global_ / predictions.shape[0]
