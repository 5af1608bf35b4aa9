"""bat: pre-train, probe and fine-tune audio encoders.

Importing this package is light; torch comes in with the first encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bat.encoders.base import Encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def load_encoder(
    path: str | Path, *, weights: str = "student", heads: int | None = None
) -> Encoder:
    """Load an encoder, ours or the field's, strictly, in eval mode on the CPU.

    ``path``: a run, export or hub folder, or a weight file (the paper's, EAT's, SSLAM's); of an
    encoder from outside bat ``package.module.Class:PATH``, which imports the class.
    ``weights``: ``student`` or ``teacher`` (EMA), where a file holds both. ``heads``: for a file
    that does not say; default width / 64.
    Raises ``bat.errors.UserError`` (a ValueError) naming every missing or unexpected weight, those
    that are no numbers, and settings out of their range.

    >>> encoder = bat.load_encoder("runs/pretrain-toy")     # doctest: +SKIP
    >>> features = encoder(waveform)                        # (B, S) -> Features
    >>> features = encoder(waveform, lengths)               # (B,) samples: each as it is alone
    """
    from bat import weights as files

    encoder = files.load_encoder(str(path), weights=weights, heads=heads).eval()
    files.check_numbers(encoder.state_dict(), str(path))
    return encoder
