"""Tiny encoders of the pre-norm ViT family, with weights that no two of are alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bat.encoders.base import Encoder
from tests.encoders.tiny import tiny

VITS = ("audiomae", "ast", "dasheng", "m2d")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def made(name: str, **more: Any) -> Encoder:
    """An encoder in eval mode whose weights are all random, norms and biases too."""
    encoder = tiny(name, **more)
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder


def clip(seconds: float, *, seed: int = 0, rate: int = 16000) -> Tensor:
    """Noise (S,) that grows and falls."""
    n = round(seconds * rate)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise * torch.linspace(0, 6, n).sin()


def doubles(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in encoder.state_dict().items()}
