"""bat: pre-train, probe and fine-tune audio encoders.

Importing this package does not import torch; loading the first encoder does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bat.encoders.base import Encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def load_encoder(
    path: str | Path,
    *,
    weights: str = "student",
    heads: int | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Loads an encoder of bat or another project strictly, in eval mode on the CPU.

    ``path``: a run, export or hub folder, or a weight file (the paper's, EAT's, SSLAM's, BEATs');
    ``ENCODER:PATH`` chooses the encoder: a file of ``bat/encoders``, ``hf`` for a folder or hub
    name of transformers, or ``package.module.Class`` from outside bat, which is imported.
    ``weights``: ``student`` or ``teacher`` (EMA), if a file holds both. ``heads``: attention heads,
    for a file that does not state them; default width / 64. ``trust_remote_code``: run the code
    that a folder of transformers brings.
    Raises ``bat.errors.UserError`` (a ValueError) naming every missing, unexpected or
    non-numeric weight, and settings out of range.

    >>> encoder = bat.load_encoder("runs/pretrain-toy")     # doctest: +SKIP
    >>> features = encoder(waveform)                        # (B, S) -> Features
    >>> features = encoder(waveform, lengths)               # (B,) samples: each as it is alone
    """
    from bat import weights as files

    encoder = files.load_encoder(
        str(path), weights=weights, heads=heads, trust_remote_code=trust_remote_code
    ).eval()
    numbers = {n: t for n, t in encoder.state_dict().items() if t.is_floating_point()}
    files.check_numbers(numbers, str(path))
    return encoder
