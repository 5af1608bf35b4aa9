"""Seeds of everything random in a run, derived from its one seed and from what each is for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, for ``torch.Generator.manual_seed``."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of ``device``, as ``torch.manual_seed`` does.

    That also formats the call stack for each kind of device that is not in use: up to two
    milliseconds, more than a whole step of a small probe.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
