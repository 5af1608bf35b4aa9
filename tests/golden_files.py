"""Reading the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Golden:
    """One ``.npz`` of golden vectors: arrays as tensors, metadata as a dictionary."""

    def __init__(self, path: Path) -> None:
        self.file = np.load(path, allow_pickle=False)
        meta = str(self.file["meta_json"]) if "meta_json" in self.file else "{}"
        self.meta: dict[str, Any] = json.loads(meta)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.file[name]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All arrays whose name starts with ``prefix``, the prefix removed."""
        return {n[len(prefix) :]: self[n] for n in self.file.files if n.startswith(prefix)}


def checksum(x: Tensor) -> list[float]:
    """Sum, sum of absolute values, of squares, and of x_i cos(i), in float64."""
    flat = x.detach().double().flatten()
    wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return [float(v) for v in (flat.sum(), flat.abs().sum(), (flat**2).sum(), (flat * wave).sum())]
