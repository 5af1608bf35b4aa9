"""Encodes one batch of waves with a frozen encoder, to the features that ``Needs`` names.

The type is autocast's, else float32. It is also the type features are stored in, so a probe sees
the same values whether features are stored or computed again. Features are checked: a value that is
not finite is an error that names the clip and the block where it first occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bat.data.bad_clips import BadClips
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.logs import bar_seconds
from bat.redact import one_line
from bat.types import Features, Needs, WaveBatch

TargetsOf = Callable[[WaveBatch, int], Tensor]
"""Targets of a batch with T time patches: frame labels (B, T, C), NaN beyond a clip's end, or
tokens (B, U) int64. Only keys, lengths, positions and targets of the batch are read, not waves."""

CLIP_AXIS = {"patches": 1, "cls": 1, "entry": 0, "pieces": 1}
"""The tensors of ``Features`` that are stored, and the axis of each that counts clips. ``valid``
follows from the clips' lengths."""


@torch.no_grad()
def encode(
    backbone: Encoder,
    batch: WaveBatch,
    *,
    frames: int | None,
    autocast: torch.dtype | None = None,
    needs: Needs = Needs(),  # noqa: B008  (immutable)
) -> Features:
    """Returns the features that ``needs`` names, without gradient, on the backbone's device.

    ``frames``: of each clip; None: each clip is encoded at its own length, independent of the
    others. Computed in ``autocast``'s type, float32 without one. Raises ``UserError`` that names
    clip, block and remedy if they are not finite.
    """
    device = device_of(backbone)
    waves, lengths = batch.waves.to(device), batch.lengths.to(device)
    inputs = backbone.inputs(waves, lengths, frames=frames)  # float32
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        if frames is None:
            own, total = backbone.time_patches(lengths), backbone.time_patches(waves.shape[1])
            whole = backbone.features_alone(inputs, own, total=total, entry=needs.entry)
        elif needs.entry:
            whole = backbone.features(inputs, entry=True)
        else:
            whole = backbone.features(inputs)
    depth, dtype = len(whole.patches), autocast or torch.float32
    kept = needs.blocks(depth)
    cut = whole.patches[depth - kept :].to(dtype, copy=kept < depth)  # a view holds all
    cls, entry, pieces = (None if t is None else t.to(dtype) for t in whole[1:4])
    features = Features(cut, cls, entry, pieces, whole.valid)
    stored = clips_first(features).values()
    found = [t.aminmax() for t in stored if t.numel()]  # NaN propagates
    if not torch.stack([end for pair in found for end in pair]).isfinite().all():
        raise UserError(_not_finite(features, batch, inputs, depth, autocast))
    return features


def _not_finite(
    features: Features,
    batch: WaveBatch,
    inputs: Tensor,
    depth: int,
    autocast: torch.dtype | None,
) -> str:
    """Returns a message that names the earliest block and the clip with values that are not finite,
    and the remedy."""
    wrong: list[tuple[int, int]] = []  # block, 0 for the tokens before the first, and row
    for name, tensor in clips_first(features).items():  # (B, blocks, ...), entry (B, ...)
        blocks = tensor.flatten(1)[:, None] if name == "entry" else tensor.flatten(2)
        first = 0 if name == "entry" else depth - blocks.shape[1] + 1
        found = (~blocks.isfinite().all(-1)).nonzero().tolist()
        wrong += [(first + block, row) for row, block in found]
    block, row = min(wrong)
    where = f"block {block} of {depth}" if block else "the tokens before the first block"
    if not inputs[row].isfinite().all():
        remedy = "its samples are not finite to begin with: check the data (bat-shard verify)"
    elif autocast is not None:
        remedy = "its weights are damaged, or hardware.precision=32-true is needed"
    else:
        remedy = "its weights are damaged: make or fetch the checkpoint again"
    return f"the encoder's features are not finite: clip {batch.keys[row]}, {where}; {remedy}"


def counted(
    batches: Iterable[WaveBatch], bad: BadClips, *, clips: int, progress: bool
) -> Iterator[WaveBatch]:
    """Yields ``batches`` of ``eval_loader`` (``clips`` in total); adds unreadable clips to ``bad``.

    Raises ``UserError`` at the end if no clip is readable, or too many are not.
    """
    readable = False
    with progress_bar(clips, "features", unit="clip", show=progress) as bar:
        for batch in batches:
            bad.add(batch)
            bar.update(len(batch.keys) + len(batch.skipped))
            readable = readable or bool(batch.keys)
            yield batch
    bad.check(final=True)
    if not readable:
        raise UserError(f"none of the {clips} clips can be read: {bad.summary()}")


def clips_first(features: Features) -> dict[str, Tensor]:
    """Returns the tensors that are present, as views of shape (B, ...)."""
    found = {name: getattr(features, name) for name in CLIP_AXIS}
    return {name: t.movedim(CLIP_AXIS[name], 0) for name, t in found.items() if t is not None}


def device_of(module: torch.nn.Module) -> torch.device:
    """Returns the device of the module's parameters."""
    return next(module.parameters()).device


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Sets eval mode within the context; restores the mode of each submodule afterwards."""
    was = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in was.items():
            m.training = training


def progress_bar(total: int, what: str, *, unit: str, show: bool) -> tqdm[Any]:
    """Returns a progress bar on stderr, cleared when done; disabled if stderr is a file."""
    return tqdm(
        total=total,
        desc=one_line(what),
        unit=unit,
        leave=False,
        disable=not show,
        dynamic_ncols=True,
        mininterval=bar_seconds(),
    )
