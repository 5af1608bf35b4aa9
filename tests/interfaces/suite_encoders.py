"""Tiny encoders of several kinds, and clips, for the tests of the evaluation suites' interfaces."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from bat.encoders.base import Encoder
from bat.encoders.bat import BAT
from bat.encoders.strict import load_strictly
from bat.types import Features, Grid
from bat.weights import export

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SECONDS = (0.3, 1.0, 5.0)


class Steps(Encoder):
    """One linear map and one block over frames of the waveform: F = 1, no class token."""

    has_cls = False
    depth = 1

    def __init__(self, *, width: int = 16, hop: int = 320, sample_rate: int = 16000) -> None:
        super().__init__()
        self.width, self.hop, self.sample_rate = width, hop, sample_rate
        self.project = nn.Linear(hop, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)

    @property
    def hop_seconds(self) -> float:
        return self.hop / self.sample_rate

    def time_patches(self, samples: Any) -> Any:
        return -(-samples // self.hop)

    def inputs(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Tensor:
        waveform = torch.atleast_2d(waveform)
        if lengths is not None:
            inside = torch.arange(waveform.shape[1]) < lengths[:, None]
            waveform = waveform * inside
        more = -waveform.shape[1] % self.hop
        return nn.functional.pad(waveform, (0, more)).unflatten(1, (-1, self.hop))

    def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
        return Features(self.block(self.project(inputs))[None, :, :, None], None)

    def first(self, inputs: Tensor, patches: int) -> Tensor:
        return inputs[:, :patches]

    def config(self) -> dict[str, Any]:
        return {"width": self.width, "hop": self.hop, "sample_rate": self.sample_rate}

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        made = cls(**(config or {}))
        load_strictly(made, state, "the weight file")
        return made


def encoder(kind: str) -> Encoder:
    """``bat`` (160 ms, chunks of 1.28 s), ``bat 32k``, ``steps`` (20 ms), ``odd`` (125 ms, 8 kHz),
    ``uneven`` (22.05 kHz, 2,540.4 samples at 16 kHz), ``brief`` (22.05 kHz, 4.5 ms)."""
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"width": 48, "depth": 2, "heads": 2, "grid": Grid(8, 8)}
    front = {"sample_rate": 32000, "n_fft": 2048, "hop_length": 320}
    made = {
        "bat": lambda: BAT(**tiny),
        "bat 32k": lambda: BAT(**tiny, frontend=front),
        "steps": Steps,
        "odd": lambda: Steps(hop=1000, sample_rate=8000),
        "uneven": lambda: Steps(hop=3501, sample_rate=22050),
        "brief": lambda: Steps(hop=100, sample_rate=22050),
    }
    return made[kind]().eval()


KINDS = ("bat", "bat 32k", "steps", "odd", "uneven")


def saved(kind: str, folder: Path) -> str:
    """Saves an encoder as an export; returns it as a checkpoint."""
    model = encoder(kind)
    name = "bat" if kind.startswith("bat") else f"{__name__}.Steps"
    weights = {"student": model.state_dict()}
    export(folder, backbone=name, encoder=model.config(), weights=weights, meta={})
    return str(folder) if name == "bat" else f"{name}:{folder}"


def clip(seconds: float, rate: int = 16000, seed: int = 0) -> Tensor:
    """(samples,) noise whose last sample is not zero."""
    generator = torch.Generator().manual_seed(seed + round(1000 * seconds))
    return 0.1 + 0.1 * torch.randn(round(seconds * rate), generator=generator)


def batch(clips: list[Tensor], samples: int | None = None) -> Tensor:
    """(B, samples), padded with zeros."""
    out = torch.zeros(len(clips), samples or max(map(len, clips)))
    for row, wave in zip(out, clips, strict=True):
        row[: len(wave)] = wave
    return out


def import_file(path: Path) -> ModuleType:
    """Imports a written file as a suite does."""
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules.pop(path.stem, None)
    spec.loader.exec_module(module)
    return module
