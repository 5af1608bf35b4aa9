"""bat: pre-train, probe and fine-tune audio encoders (docs/python.md).

Importing this package does not import torch; the first use of a function does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bat.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from bat.api import Result, finetune, pretrain, probe
    from bat.encoders.base import Encoder
    from bat.interfaces.embed import embed
    from bat.interfaces.predict import predict

__version__ = "0.1.0"
__all__ = [
    "Encoder", "Result", "UserError", "__version__", "embed", "finetune", "load_encoder", "predict",
    "pretrain", "probe",
]  # fmt: skip
_LAZY = {
    "Encoder": "bat.encoders.base",
    "Result": "bat.api",
    "embed": "bat.interfaces.embed",
    "finetune": "bat.api",
    "predict": "bat.interfaces.predict",
    "pretrain": "bat.api",
    "probe": "bat.api",
}
"""Modules of the names that are imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bat' has no attribute '{name}'")
    import importlib

    globals()[name] = found = getattr(importlib.import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def load_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    weights: str = "student",
    heads: int | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Loads an encoder of bat or another project strictly, in eval mode.

    ``path``: a run, export or hub folder, or a weight file (the paper's, EAT's, SSLAM's, BEATs');
    ``ENCODER:PATH`` chooses the encoder: a file of ``bat/encoders``, ``hf`` for a folder or hub
    name of transformers, or ``package.module.Class`` from outside bat, which is imported.
    ``device``: where it is moved; ``auto``: a GPU if there is one.
    ``weights``: ``student`` or ``teacher`` (EMA), if a file holds both. ``heads``: attention heads,
    for a file that does not state them; default width / 64. ``trust_remote_code``: run the code
    that a folder of transformers brings.
    Raises ``bat.UserError`` (a ValueError) naming every missing, unexpected or
    non-numeric weight, and settings out of range.

    >>> encoder = bat.load_encoder("runs/pretrain-toy")     # doctest: +SKIP
    >>> encoder.embed(["a.wav", "b.flac"])                  # (2, D), NumPy
    >>> features = encoder(waveform)                        # (B, S) -> Features, all blocks
    >>> features = encoder(waveform, lengths)               # (B,) samples: each as it is alone
    """
    from bat import weights as files

    encoder = files.load_encoder(
        str(path), weights=weights, heads=heads, trust_remote_code=trust_remote_code
    ).eval()
    numbers = {n: t for n, t in encoder.state_dict().items() if t.is_floating_point()}
    files.check_numbers(numbers, str(path))
    if str(device) == "cpu":
        return encoder
    from bat.interfaces.models import device_named

    return encoder.to(device_named(str(device)))
