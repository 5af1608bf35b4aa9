"""Reads what a format writes: an encoder, its head after fine-tuning, and what the run recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import bat
from bat import registry
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.heads import load_head
from bat.eval.loading import registered_name
from bat.probes.base import Probe
from bat.tasks.base import load_task
from bat.weights import CONFIG, is_export, read_json, resolve


class Trained(NamedTuple):
    """An encoder and what is known of it."""

    encoder: Encoder
    name: str
    """The encoder's name: ``bat``, ``eat``, ..."""
    folder: Path
    """The export folder or the weight file."""
    record: dict[str, Any]
    """``config.json`` of the export; empty for other files."""
    head: Probe | None = None
    """The head that was trained with the encoder."""
    head_name: str = ""
    """The probe that the head is: ``linear``, ..."""
    labels: tuple[str, ...] = ()
    target: str = ""
    """Kind of the head's task: ``class``, ``tags``, ``events`` or ``tokens``."""
    frames: int | None = None
    """Spectrogram frames that each clip was cut or padded to in fine-tuning; None: its own."""


def read_trained(checkpoint: str) -> Trained:
    """Loads ``checkpoint`` (as for ``bat.load_encoder``) and the head beside a fold's export.

    Raises ``UserError`` if either cannot be read, or they do not fit each other.
    """
    encoder = bat.load_encoder(checkpoint)
    folder = resolve(registry.split_checkpoint(checkpoint)[1])
    record = read_json(folder / CONFIG) if is_export(folder) else {}
    beside = folder.parent / "head"
    name = registered_name(encoder)
    if not record or not (beside / CONFIG).is_file():
        return Trained(encoder, name, folder, record)
    head, said = load_head(beside)
    labels, target = said.get("labels"), said.get("target")
    if (head.width, head.depth) != (encoder.width, encoder.depth):
        raise UserError(f"{beside} is the head of another encoder than {folder}")
    if not isinstance(labels, list) or len(labels) != head.classes or not isinstance(target, str):
        raise UserError(f"{beside / CONFIG} does not say its labels and target: it is damaged")
    training = record.get("training") or {}
    frames = training.get("frames")
    if frames is None and said.get("task") in registry.known("tasks"):
        frames = load_task(said["task"]).frames
    patch = getattr(encoder, "patch", 1)
    if frames is not None and (type(frames) is not int or frames < 1 or frames % patch):
        raise UserError(f"{folder / CONFIG}: frames={frames} is no number of whole patches")
    return Trained(
        *(encoder, name, folder, record, head, str(said["probe"])),
        *(tuple(map(str, labels)), target, frames),
    )
