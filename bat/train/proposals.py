"""Proposes model, clip length, batch and steps of recipe ``own`` from the data and the hardware.

Rules (deterministic, so that all processes of a run agree):

    clip      2, 5 or 10 s: the shortest that holds nine of ten files whole; on a CPU at most 5
    model     CPU: tiny; GPU: S up to 20 h of audio, else B, if 20 GiB of memory hold it
    batch     CPU: 16; GPU: half a clip per GiB for B, one for S, at most 96; at most half of all
    clips     CPU: 6 passes, within 400 and 20,000 a core; GPU: 100 passes, within 200,000 and
              20 million
    steps     clips / (batch x devices)

With ``init`` the model, the clip length and the front end are those of the file. A value given on
the command line stays; a run that exists keeps the values in its ``config.yaml``.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import yaml

import bat
from bat.config import locate
from bat.config.compose import word
from bat.config.schema import Pretrain
from bat.config.sections import Model
from bat.data.index import Index
from bat.encoders.base import SpectrogramEncoder
from bat.eval.run_folder import default_out, open_data, settings_of
from bat.train.processes import world_size

log = logging.getLogger("bat")

CLIPS = (2.0, 5.0, 10.0)
"""Clip lengths to choose from, in seconds."""
B_HOURS, B_GIB = 20.0, 20.0
"""Hours of audio and GiB of memory from which Base is proposed on a GPU."""
CACHED = 1e9
"""Bytes of decoded audio that are kept in memory by each loader process."""


@dataclass(frozen=True)
class Machine:
    """The hardware that a run will use."""

    cores: int
    gpu_gib: float
    """Memory of one GPU; 0 on a CPU."""
    devices: int = 1

    @property
    def name(self) -> str:
        if not self.gpu_gib:
            return f"{self.cores} CPU core{'s' * (self.cores > 1)}"
        return f"{self.devices} GPU{'s' * (self.devices > 1)} of {self.gpu_gib:.0f} GiB"


def propose(config: Pretrain, given: list[str]) -> list[str]:
    """Returns ``key=value`` words for the settings that ``given`` (the user's words) leave open.

    ``config``: as the recipe and ``given`` compose, without the section ``objective``. Three lines
    about the proposal are logged. Raises ``UserError`` as ``open_data``.
    """
    data = config.data
    if not (data.root or data.csv):
        return []
    keys = {w.partition("=")[0] for w in given}
    if before := settings_of(default_out(config)):
        values = {key: _at(before, key) for key in _KEYS}
        if not values["online.every"]:  # labels may be given later
            values["online.every"] = _probes(config, values["train.steps"] or config.train.steps)
        return [word(k, v) for k, v in values.items() if v is not None and _is_open(k, keys)]
    _, index = open_data(config.task, replace(data, labels="drop"), labelled=False, warn=False)
    machine = machine_of(config)
    values = proposal(config, index, machine, keys)
    values = {key: value for key, value in values.items() if _is_open(key, keys)}
    for line in in_words(values, config, index, machine):
        log.info("  %s", line)
    return [word(key, value) for key, value in values.items()]


def _is_open(key: str, given: set[str]) -> bool:
    """Returns True if no word of the user sets ``key``, or chooses a model or an objective."""
    section = key.partition(".")[0]
    if key in given or section in given or f"{section}.name" in given:
        return False
    return section != "model" or not any(name.startswith("model.") for name in given)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


_KEYS = (
    *("model.width", "model.depth", "model.heads", "frontend.frames", "data.clip_seconds"),
    *("model.mlp_ratio", "model.gate", "model.norm_order", "model.patch", "frontend.kind"),
    *("data.batch", "data.workers", "data.cache_waves_gb", "train.steps", "train.save_every"),
    *("optim.warmup_steps", "objective.ema.start", "objective.ema.steps", "objective.mask.views"),
    *("objective.decoder_depth", "online.every"),
)
"""Every setting that is proposed."""


def machine_of(config: Pretrain) -> Machine:
    """Returns the cores of this process, and the GPUs that ``config.hardware`` names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if config.hardware.accelerator == "cpu" or not torch.cuda.is_available():
        return Machine(cores or 1, 0.0, world_size(config.hardware))
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Machine(cores or 1, memory, world_size(config.hardware))


def proposal(
    config: Pretrain, index: Index, machine: Machine, given: set[str] | None = None
) -> dict[str, Any]:
    """Returns values for settings, by key, for the clips of ``index``; see the module.

    ``given``: keys that the user sets, whose values in ``config`` are built upon.
    """
    given, gpu = given or set(), machine.gpu_gib > 0
    seconds = index.seconds
    values: dict[str, Any] = {}
    clip = next((c for c in CLIPS if c >= np.quantile(seconds, 0.9)), CLIPS[-1] if gpu else 5.0)
    clip = clip if gpu else min(clip, 5.0)
    front, patch = config.frontend, config.model.patch
    if config.init and "data.clip_seconds" not in given and "frontend.frames" not in given:
        values |= _of_file(config.init)
        clip = values.get("frontend.frames", front.frames) * front.hop_length / front.sample_rate
        clip = math.floor(clip)
    elif "data.clip_seconds" in given:
        clip = config.data.clip_seconds
    elif "frontend.frames" in given:
        clip = front.frames * front.hop_length / front.sample_rate
    frames = 1 + int(clip * front.sample_rate) // front.hop_length
    values.setdefault("frontend.frames", -(-frames // (2 * patch)) * 2 * patch)
    values["data.clip_seconds"] = float(clip)

    hours = seconds.sum() / 3600
    large = gpu and hours >= B_HOURS and machine.gpu_gib >= B_GIB
    if "model.width" not in values:
        name = "B" if large else "S" if gpu else "tiny"
        text = locate.find_fragment(f"model/{name}").read_text(encoding="utf-8")
        values |= {f"model.{key}": value for key, value in yaml.safe_load(text)["model"].items()}
    windows = int(np.ceil(seconds / clip).sum())
    most = min(96, int(machine.gpu_gib / (2 if large else 1))) if gpu else 16
    batch = config.data.batch
    if "data.batch" not in given:
        batch = max(4, min(most, windows // 2) // 4 * 4)
    passes, least, limit = (100, 200_000, 20e6) if gpu else (6, 400, 20_000 * machine.cores)
    clips = min(max(passes * windows, least), limit)
    steps = _rounded(clips / (batch * machine.devices))
    if "train.steps" in given:
        steps = config.train.steps
    loaders = max(1, min(8, machine.cores - 1) if gpu else min(4, machine.cores // 4))
    cached = windows * clip * front.sample_rate * 4 < CACHED
    values |= {
        "data.batch": batch,
        "data.workers": loaders,
        "data.cache_waves_gb": CACHED / 1e9 if cached else 0.0,
        "train.steps": steps,
        "train.save_every": max(20, min(5_000, steps // 5)),
        "optim.warmup_steps": max(1, min(5_000, steps // 10)),
        "objective.ema.steps": steps,
    }
    if gpu:
        values |= {
            "objective.ema.start": 0.999,
            "objective.mask.views": 16 if large else 8,
            "objective.decoder_depth": 6 if large else 4,
        }
    if every := _probes(config, steps):
        values["online.every"] = every
    return values


def _probes(config: Pretrain, steps: int) -> int:
    """Returns the steps between online probes, four times a run; 0 without labels."""
    online = config.online
    return online.every or (max(1, steps // 4) if online.csv else 0)


def _of_file(init: str) -> dict[str, Any]:
    """Returns the settings of the encoder that ``init`` holds."""
    encoder = bat.load_encoder(init)
    theirs = encoder.config()
    names = [f.name for f in fields(Model) if f.name in theirs]
    names = [n for n in names if n not in ("drop_path", "attention", "pos_layout", "backbone")]
    values = {f"model.{name}": theirs[name] for name in names}
    if isinstance(encoder, SpectrogramEncoder):
        values["frontend.frames"] = encoder.grid.time * encoder.patch
        values["frontend.kind"] = getattr(encoder.frontend, "kind", "bat")
    return values


def _rounded(steps: float) -> int:
    """Rounds to two digits, at least 20."""
    size = 10 ** max(0, int(math.log10(max(steps, 1))) - 1)
    return max(20, int(round(steps / size) * size))


def in_words(values: dict[str, Any], config: Pretrain, index: Index, machine: Machine) -> list[str]:
    """Returns three lines about the proposal: data, model, steps."""
    seconds, devices = index.seconds, machine.devices
    clip = values.get("data.clip_seconds", config.data.clip_seconds)
    batch = values.get("data.batch", config.data.batch)
    steps = values.get("train.steps", config.train.steps)
    width = values.get("model.width", config.model.width)
    depth = values.get("model.depth", config.model.depth)
    windows = int(np.ceil(seconds / clip).sum())
    return [
        f"data: {len(index)} files, {_length(seconds.sum())} ({_length(seconds.min())} to "
        f"{_length(seconds.max())} each): {windows} clips of {clip:g} s",
        f"model: {width} wide, {depth} blocks, {batch} clips a step and device, for {machine.name}",
        f"steps: {steps}, {steps * batch * devices / max(1, windows):.2g} passes over the audio "
        "(expected time: measured on the first of them). key=value overrides any of this",
    ]


def _length(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
