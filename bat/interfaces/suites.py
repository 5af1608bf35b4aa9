"""Encodes clips for evaluation suites, and names the files that ``bat-export`` writes for them.

A suite hands over waveforms and takes one vector a clip, or one a time step. Rules common to all:

* **What a clip becomes depends on that clip alone.** Suites that pad the rows of a batch do not say
  how far: zeros at the end of a row are padding, its time steps are zero, and no other number
  depends on them. A clip's own digital silence at its end is treated the same.
* The vector of a time step is the mean over frequency of the last block's patches, that of a clip
  the last block's class token, or the mean of its patches for an encoder without one.
* A clip has ``ceil(seconds / hop_seconds)`` time steps: a last patch that holds no new samples is
  left out, an absent one repeats the step before it.
* Recordings beyond ``PIECE_SECONDS`` are encoded in equal pieces, so memory is bounded. Their clip
  vector is the mean over the pieces, weighted by time steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bat
from bat import registry
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import device_of
from bat.eval.loading import weights_digest
from bat.interfaces.embed import Embedder
from bat.interfaces.recordings import by_length

PIECE_SECONDS = 60.0
"""Longest sound that is encoded at once."""
BATCH_SECONDS = 240.0
"""Most sound, padding included, in one call of the encoder."""
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


class Embedded(NamedTuple):
    """Embeddings of one clip."""

    frames: Tensor
    """(blocks, T, D) of each time step, after each of the last blocks."""
    clip: Tensor
    """(D,)"""


def steps_of(samples: int, encoder: Encoder) -> int:
    """Returns the time steps of a clip: ``ceil(seconds / hop_seconds)``, at least 1."""
    return max(1, math.ceil(samples / (encoder.sample_rate * encoder.hop_seconds) - 1e-6))


def embed(encoder: Encoder, clips: Sequence[Tensor], *, blocks: int = 1) -> list[Embedded]:
    """Embeds clips of any lengths, each (samples,) at the encoder's rate, as ``check_clips``
    returns them. ``blocks``: last blocks whose time steps are returned."""
    pieces = [  # (clip, piece, time steps)
        (row, *piece) for row, clip in enumerate(clips) for piece in _pieces(clip, encoder)
    ]
    seconds = np.array([len(piece) for _, piece, _ in pieces]) / encoder.sample_rate
    done: dict[int, Embedded] = {}
    for group in by_length(seconds, len(pieces), BATCH_SECONDS):
        made = _batch(encoder, [pieces[i][1] for i in group], blocks)
        for i, one in zip(group, made, strict=True):
            done[i] = Embedded(fit(one.frames, pieces[i][2]), one.clip)
    found: list[list[Embedded]] = [[] for _ in clips]
    for i, (row, _, _) in enumerate(pieces):
        found[row].append(done[i])
    return [_joined(parts) for parts in found]


def _pieces(clip: Tensor, encoder: Encoder) -> Iterator[tuple[Tensor, int]]:
    """Yields a clip in equal pieces of whole time steps, each with their number."""
    steps = steps_of(len(clip), encoder)
    count = math.ceil(steps * encoder.hop_seconds / PIECE_SECONDS - 1e-6)
    each = math.ceil(steps / max(1, count))
    step = encoder.hop_seconds * encoder.sample_rate  # samples, not always a whole number
    for start in range(0, steps, each):
        end = min(start + each, steps)
        last = len(clip) if end == steps else round(end * step)
        yield clip[round(start * step) : last], end - start


def _batch(encoder: Encoder, clips: list[Tensor], blocks: int) -> list[Embedded]:
    """Embeds clips in one call, each as it is alone; ``frames`` as many as the encoder gives."""
    device = device_of(encoder)
    lengths = torch.tensor([len(clip) for clip in clips])
    features = encoder(pad_sequence(clips, batch_first=True).to(device), lengths.to(device))
    frames = Embedder(encoder, level="frame", layer="all").rows(features)  # (B, T, L, D)
    clip = Embedder(encoder).rows(features)  # (B, D)
    T = frames.shape[1]
    valid = [T] * len(clips) if features.valid is None else features.valid.tolist()
    return [
        Embedded(frames[row, :own, -blocks:].transpose(0, 1), clip[row])
        for row, own in enumerate(valid)
    ]


def _joined(parts: list[Embedded]) -> Embedded:
    if len(parts) == 1:
        return parts[0]
    frames = torch.cat([part.frames for part in parts], dim=1)
    total = sum(part.frames.shape[1] / frames.shape[1] * part.clip for part in parts)
    assert isinstance(total, Tensor)
    return Embedded(frames, total)


def fit(frames: Tensor, steps: int) -> Tensor:
    """Cuts (..., T, D) to ``steps`` time steps, or repeats the last one up to them."""
    more = steps - frames.shape[-2]
    if more > 0:
        return torch.cat([frames, frames[..., -1:, :].expand(*frames.shape[:-2], more, -1)], -2)
    return frames[..., :steps, :]


def padded(frames: Sequence[Tensor], steps: int) -> Tensor:
    """Stacks clips of (..., T, D) to (B, ..., steps, D), zero beyond their own time steps."""
    first = frames[0]
    out = first.new_zeros(len(frames), *first.shape[:-2], steps, first.shape[-1])
    for row, own in enumerate(frames):
        out[row, ..., : own.shape[-2], :] = own
    return out


def check_clips(clips: Sequence[Any], *, what: str = "clip", first: int = 0) -> list[Tensor]:
    """Returns clips as (samples,) float32 tensors on the CPU, without gradient.

    Raises ``UserError`` that names each which is not one channel, not floating point, empty, or
    holds NaN or infinity. ``what``, ``first``: noun and first number for the message.
    """
    found, problems = [torch.as_tensor(clip).detach().cpu() for clip in clips], []
    for i, clip in enumerate(found, start=first):
        if clip.dim() != 1:
            problems.append(
                f"{what} {i} has the shape {tuple(clip.shape)}: give one channel, (samples,)"
            )
        elif not clip.is_floating_point():
            problems.append(f"{what} {i} is {clip.dtype}: give floating point in [-1, 1]")
        elif not len(clip):
            problems.append(f"{what} {i} has no samples")
        elif not clip.isfinite().all():
            problems.append(f"{what} {i} holds NaN or infinity: leave it out, or repair the file")
    if not found:
        problems.append(f"no {what} was given")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError("; ".join(problems[:10]) + more)
    return [clip.float() for clip in found]


def rows_of(waveform: Any) -> list[Tensor]:
    """Returns the clips of a batch (B, samples) without the zeros that pad them, at least one
    sample each. Raises ``UserError`` as ``check_clips``, and for another shape."""
    waveform = torch.as_tensor(waveform)
    if waveform.dim() != 2:
        raise UserError(
            f"waveform of shape {tuple(waveform.shape)}: give (clips, samples), one channel"
        )
    rows = check_clips(list(waveform), what="row")
    found = []
    for row in rows:
        sound = (row != 0).flip(0).to(torch.uint8)
        found.append(row[: len(row) - int(sound.argmax())] if sound.any() else row[:1])
    return found


def resample(clip: Tensor, rate: int, target: int) -> Tensor:
    """Resamples (samples,) as ``bat.audio.decode`` does (soxr, HQ); never to nothing."""
    if rate == target:
        return clip
    made = soxr.resample(clip.numpy(), rate, target, quality="HQ")
    return torch.from_numpy(np.ascontiguousarray(made)) if len(made) else clip[:1]


def source_of(checkpoint: str) -> str:
    """Returns ``checkpoint`` with its path made absolute, for a file that is used elsewhere."""
    name, path = registry.split_checkpoint(checkpoint)
    there = Path(path).expanduser()
    path = str(there.resolve()) if there.exists() else path
    return path if name is None else f"{name}:{path}"


def load_named(checkpoint: str) -> tuple[Encoder, str]:
    """Loads an encoder and returns it with a name for it, a Python identifier: the run's or file's,
    and eight digits of its ``weights_digest``. Suites keep results by name."""
    encoder = bat.load_encoder(checkpoint)
    path = Path(registry.split_checkpoint(source_of(checkpoint))[1])
    path = path.with_suffix("") if path.suffix in WEIGHT_FILES else path
    parts = list(path.parts)
    while len(parts) > 1 and parts[-1] in ("export", "model"):  # a run's export, or its weights
        parts.pop()
    last = parts[-2:] if parts[-1].startswith("fold-") else parts[-1:]
    words = re.sub(r"[^0-9A-Za-z]+", "_", "_".join(last)).strip("_").lower() or "encoder"
    return encoder, f"{'bat_' if words[0].isdigit() else ''}{words}_{weights_digest(encoder)[:8]}"


def write(file: Path, text: str) -> None:
    """Writes a Python file of an export."""
    file.write_text(text, encoding="utf-8")
