"""HEAR: a module with load_model, get_scene_embeddings and get_timestamp_embeddings.

Scene embedding: the clip's vector (``bat.interfaces.suites``). Timestamp embeddings: HEAR advises a
hop of 50 ms or finer. An encoder with a hop h above that runs over ``k = ceil(h / 50 ms)`` shifted
copies of the clip, each in windows of ten seconds, which overlap from copy to copy:

    t_m = m h / k,  m = 0 .. floor(duration k / h),  from copy m mod k, time step m div k

With BAT's 160 ms, k = 4 and the hop is 40 ms. A time step is centred at its timestamp: the clip is
mirrored by h / 2 before its start and after its end. The last window reaches back, so that a long
clip has whole windows only; each window has a front end's range of its own.

Guide: docs/evaluation_suites.md. The interface: hearbenchmark.com/hear-api.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bat
from bat.encoders.base import Encoder
from bat.interfaces import suites

HOP_SECONDS = 0.05
"""Longest hop between timestamps."""
WINDOW_SECONDS = 10.0
RATES = (16000, 22050, 32000, 44100, 48000)
"""Sample rates that HEAR has its data in."""

MODULE = '''\
"""HEAR module of an encoder of bat; bat must be installed (docs/evaluation_suites.md)."""

from bat.interfaces import hear
from bat.interfaces.hear import get_scene_embeddings, get_timestamp_embeddings

CHECKPOINT = {checkpoint!r}


def load_model(model_file_path=""):
    return hear.load_model(model_file_path or CHECKPOINT)
'''


class HearModel(nn.Module):
    """An encoder with HEAR's attributes. ``sample_rate``: the encoder's, or the next of ``RATES``
    where HEAR has no data in it (clips are then resampled)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        above = [rate for rate in RATES if rate >= encoder.sample_rate]
        self.sample_rate = above[0] if above else RATES[-1]
        self.scene_embedding_size = self.timestamp_embedding_size = encoder.width

    def clips(self, audio: Tensor) -> list[Tensor]:
        """Returns the rows of (n, samples) at the encoder's rate, without padding."""
        rate = self.encoder.sample_rate
        return [suites.resample(row, self.sample_rate, rate) for row in suites.rows_of(audio)]


def load_model(model_file_path: str = "") -> HearModel:
    """Loads a checkpoint, as for ``bat.load_encoder``, in eval mode on the CPU."""
    return HearModel(bat.load_encoder(model_file_path)).eval()


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Returns (n, D) float32 for ``audio`` (n, samples) in [-1, 1] at ``model.sample_rate``."""
    made = suites.embed(model.encoder, model.clips(audio))
    return torch.stack([one.clip for one in made]).float()


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Returns embeddings (n, t, D) and their centres in ms (n, t), float32, for ``audio``
    (n, samples) in [-1, 1] at ``model.sample_rate``. Zero beyond the end of a padded row."""
    encoder = model.encoder
    hop = encoder.hop_seconds
    k = math.ceil(hop / HOP_SECONDS - 1e-9)
    clips = model.clips(audio)
    t = _timestamps(audio.shape[1], model.sample_rate, hop / k)
    windows, places = list[Tensor](), list[tuple[int, int, int, int]]()
    half = math.ceil(hop * encoder.sample_rate / 2)
    for row, clip in enumerate(clips):
        own = min(t, _timestamps(len(clip), encoder.sample_rate, hop / k))
        mirrored = torch.from_numpy(np.pad(clip.numpy(), half, mode="symmetric"))
        for copy in range(min(k, own)):
            for first, end, window in _windows(mirrored, encoder, copy, k, own):
                places.append((row, copy, first, end))
                windows.append(window)
    found = suites.embed(encoder, windows)
    out = found[0].clip.new_zeros(len(audio), t, encoder.width, dtype=torch.float32)
    for (row, copy, first, end), one in zip(places, found, strict=True):
        out[row, copy::k][first:end] = suites.fit(one.frames[-1], end - first)
    ms = 1000 * hop / k * torch.arange(t, device=out.device, dtype=torch.float64)
    return out, ms.float().expand(len(audio), t)


def _timestamps(samples: int, rate: int, step: float) -> int:
    """Returns the number of timestamps 0, step, ... up to the clip's end."""
    return math.floor(samples / rate / step + 1e-6) + 1


def _windows(
    mirrored: Tensor, encoder: Encoder, copy: int, k: int, timestamps: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields the windows of a clip's shifted copy, each with the first time step in it and the one
    after its last, counted within the copy."""
    step = encoder.hop_seconds * encoder.sample_rate  # samples between time steps
    start = math.ceil(step / 2) + (copy / k - 0.5) * step  # of the copy's first patch
    steps = -(-(timestamps - copy) // k)
    each = max(1, math.floor(WINDOW_SECONDS / encoder.hop_seconds + 1e-6))
    for first in range(0, steps, each):
        first = max(0, min(first, steps - each))
        end = min(first + each, steps)
        yield first, end, mirrored[round(start + first * step) : round(start + end * step)]


def write(checkpoint: str, out: Path) -> None:
    """Writes ``NAME.py``, the module of ``checkpoint``, to the folder ``out``."""
    _, name = suites.load_named(checkpoint)
    suites.write(out / f"{name}.py", MODULE.format(checkpoint=suites.source_of(checkpoint)))


EXPORT = write
