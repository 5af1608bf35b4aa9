"""Loads encoders for use, and heads of bat-probe and bat-finetune with the encoders they belong to.

A head is read with the encoder it was trained on, its front end as in that run: a probe's encoder
is loaded as its run's ``config.yaml`` says and compared by its digest, a fine-tuned one is the
export beside the head.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bat
from bat.config.compose import from_yaml
from bat.config.schema import Finetune, Probe
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.encoder_list import RANDOM, path_of
from bat.eval.heads import FORMAT, load_head
from bat.eval.loading import CSV, load_for
from bat.io import missing
from bat.probes import base
from bat.tasks.base import Task, load_task
from bat.weights import CONFIG, read_json

log = logging.getLogger("bat")

SHOWN = 20
"""Greatest number of heads that a message names."""


class Model(NamedTuple):
    """A head and the encoder whose features it reads."""

    backbone: Encoder
    head: base.Probe
    meta: dict[str, Any]
    """``config.json`` of the head: ``labels``, ``target``, ..."""
    task: Task
    frames: int | None
    """Frames of every clip in its run; None: each clip's own."""
    clip_seconds: float | None
    """Seconds of a clip in its run; None: unknown."""


def device_named(name: str) -> torch.device:
    """Returns the device ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; of several processes on a
    machine each has its own GPU. Raises ``UserError`` if it is not here."""
    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise UserError(f"device={name}: auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not there:
        raise UserError(f"device={name}: no GPU here; say cpu")
    if name == "cpu" or not there:
        return torch.device("cpu")
    if ":" in name:
        return torch.device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def trained_window(backbone: Encoder) -> float | None:
    """Returns the longest clip, in seconds (whole milliseconds), that the encoder takes at once;
    None: any length."""
    if backbone.max_patches is None:
        return None
    samples = round(backbone.max_patches * backbone.hop_seconds * backbone.sample_rate)
    while samples > 1 and backbone.time_patches(samples) > backbone.max_patches:
        samples -= 1
    return max(1, 1000 * samples // backbone.sample_rate) / 1000


def find_heads(checkpoint: str | Path, *, average: bool = False) -> list[Path]:
    """Returns the folder of the head that ``checkpoint`` names; with ``average`` of all its folds.

    ``checkpoint``: a head, a fold of a fine-tuning, or a run with one head; or a pattern
    (``RUN/heads/ENCODER/cgp-*``). Raises ``UserError`` that lists the heads if there are several.
    """
    path = Path(checkpoint).expanduser()
    places = [path]
    if not path.exists():
        places = [Path(p) for p in sorted(glob.glob(str(path)))]
        if not places:
            raise UserError(f"checkpoint {missing(path)}: give a run, a fold or a head")
    found = list(dict.fromkeys(head for place in places for head in _heads_in(place)))
    if not found:
        raise UserError(
            f"{path} holds no head: bat-predict takes runs of bat-probe and bat-finetune; train a "
            "head on this encoder with one of them (bat-embed takes encoders)"
        )
    if len(found) == 1:
        return found
    groups: dict[tuple[Path, str], list[Path]] = {}
    for head in found:
        tuned = head.name == "head"
        group = (head.parent.parent if tuned else head.parent, read_json(head / CONFIG)["probe"])
        groups.setdefault(group, []).append(head)
    if average and len(groups) == 1:
        return found
    shown = "\n  ".join(map(str, found[:SHOWN]))
    more = f"\n  ... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    mean = (
        "all of one kind" if len(groups) == 1 else f"'{found[0].parent}/{next(iter(groups))[1]}-*'"
    )
    raise UserError(
        f"{path} holds {len(found)} heads; name one of them, or with --average {mean} for the mean "
        f"of their scores:\n  {shown}{more}"
    )


def _heads_in(place: Path) -> list[Path]:
    """Returns the heads in a head's folder, a fold, its export, a run, or ``heads/ENCODER``."""
    places = [place.parent] if place.name == "export" else [place]
    patterns = ("", "head/", "fold-*/head/", "heads/*/*/", "*/")
    files = [file for p in places for pattern in patterns for file in p.glob(f"{pattern}{CONFIG}")]
    return sorted({f.parent for f in files if read_json(f).get("format") == FORMAT})


def load_models(
    checkpoint: str | Path, *, average: bool = False, encoder: str | None = None
) -> list[Model]:
    """Loads the heads that ``find_heads`` finds, encoders that are equal once.

    ``encoder``: where the encoder lies, if not where the head's run had it. Raises ``UserError`` if
    it is another encoder, or the heads differ in labels, target, level or sample rate.
    """
    models: list[Model] = []
    for folder in find_heads(checkpoint, average=average):
        models.append(load_model(folder, encoder=encoder, before=models))
    kinds = {
        (tuple(m.meta["labels"]), m.meta["target"], m.head.level, m.backbone.sample_rate)
        for m in models
    }
    if len(kinds) > 1:
        raise UserError(f"the heads of {checkpoint} differ in labels, target or level: name one")
    return models


def load_model(folder: Path, *, encoder: str | None = None, before: Sequence[Model] = ()) -> Model:
    """Loads the head in ``folder`` and its encoder, in eval mode; see ``load_models``."""
    meta = read_json(folder / CONFIG)
    tuned = folder.name == "head" and (folder.parent / "export").is_dir()
    run = folder.parent.parent if tuned else folder.parents[2]
    file = run / "config.yaml"
    config: Any = None
    if file.is_file():
        config = from_yaml(Finetune if tuned else Probe, file)
    task = _task(config, meta)
    frames = meta.get("frames")
    clip_seconds = meta.get("clip_seconds")
    if config is None and clip_seconds is None:
        log.warning("%s is missing: clips may be padded otherwise than in the head's run", file)
    if config is not None and clip_seconds is None:
        clip_seconds = config.data.clip_seconds
    if tuned:
        backbone = bat.load_encoder(encoder or folder.parent / "export")
        if config is not None and "frames" not in meta:
            spectral = isinstance(backbone, SpectrogramEncoder)
            frames = config.frames or (task.frames if spectral else None)
        head, meta = load_head(folder)
        return Model(backbone, head, meta, task, frames, clip_seconds)
    trained_on = meta.get("encoder") or {}
    same = [m for m in before if m.meta.get("encoder") == trained_on]
    if same:
        head, meta = load_head(folder, encoder=same[0].backbone)
        return same[0]._replace(head=head, meta=meta)
    name = encoder or str(trained_on.get("checkpoint"))
    bare = name == RANDOM or name.startswith(f"{RANDOM}:")
    if not bare and not Path(path_of(name)).expanduser().exists():
        remedy = "give what is there" if encoder else "say where it is: --encoder PATH"
        raise UserError(f"{folder} was trained on {name}, which is not here: {remedy}")
    weights = str(trained_on.get("weights", "student"))
    if config is None:
        backbone = bat.load_encoder(name, weights=weights)
    else:
        data = replace(config.data, clip_seconds=clip_seconds)
        config = replace(config, checkpoint=name, weights=weights, data=data)
        backbone, settled = load_for(config, task)
        frames = meta.get("frames", settled)
    head, meta = load_head(folder, encoder=backbone)
    return Model(backbone, head, meta, task, frames, clip_seconds)


def _task(config: Any, meta: dict[str, Any]) -> Task:
    """Returns the task of a head's run, for its frames and the constants of events and tokens."""
    name = str(meta.get("task"))
    if config is not None:
        name = CSV if config.data.csv else config.task
    return load_task(name)
