"""X-ARES: a file with one class, named after the checkpoint, that is built without arguments.

X-ARES keeps encodings and scores by the name of the class, so that name also holds eight digits of
the SHA-256 of the weights. It pads the rows of a batch with zeros and keeps no lengths: see
``bat.interfaces.suites``. A time step is ``hop_size_in_ms`` long; recordings of ten minutes are
encoded in pieces.

Guide: docs/evaluation_suites.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import bat
from bat.interfaces import suites

MODULE = '''\
"""X-ARES class of an encoder of bat; bat must be installed (docs/evaluation_suites.md)."""

from bat.interfaces import xares


class {name}(xares.Frames):
    checkpoint = {checkpoint!r}
'''


class Frames(nn.Module):
    """Base of the written classes: (B, S) or (S,) -> (B, T, D), ``T = ceil(S / hop)``.

    Attributes: ``sampling_rate`` (Hz), ``output_dim`` D, ``hop_size_in_ms``.
    """

    checkpoint: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bat.load_encoder(self.checkpoint)
        self.sampling_rate = self.encoder.sample_rate
        self.output_dim = self.encoder.width
        self.hop_size_in_ms = round(1000 * self.encoder.hop_seconds, 6)
        self.eval()

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Returns (B, T, D) float32; zero in the time steps of zeros that pad a row."""
        rows = audio[None] if torch.as_tensor(audio).dim() == 1 else audio
        clips = suites.rows_of(rows)
        frames = [one.frames[-1] for one in suites.embed(self.encoder, clips)]  # (T, D) each
        return suites.padded(frames, suites.steps_of(rows.shape[1], self.encoder)).float()


def class_name(name: str) -> str:
    """Returns the class name for a checkpoint's name: ``my_run_1f`` -> ``MyRun1fEncoder``."""
    return "".join(word[:1].upper() + word[1:] for word in name.split("_")) + "Encoder"


def write(checkpoint: str, out: Path) -> None:
    """Writes ``NAME.py`` with the class of ``checkpoint`` to the folder ``out``."""
    _, name = suites.load_named(checkpoint)
    text = MODULE.format(name=class_name(name), checkpoint=suites.source_of(checkpoint))
    suites.write(out / f"{name}.py", text)


EXPORT = write
