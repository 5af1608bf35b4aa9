"""Defines every setting: its name, type, default, unit and check.

Precedence: these defaults < fragments (``configs/``) < recipe (``recipes/``) < command line.
The defaults are those of the paper's Base pre-training (docs/method.md 3). ``problems()`` of a
section returns messages about invalid values; all are reported at once (``compose.py``). These are
plain dataclasses and importing them does not import torch; the settings of an objective are defined
beside it (``bat/objectives``) and looked up when a ``Pretrain`` is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bat.config.probing import FeatureStore, Head, Insight, ProbeTrain, Protocol
from bat.config.running import Hardware, Health, Log, Train
from bat.config.sections import Augment, Data, Frontend, Model, Optim


@dataclass
class Online:
    """Online probes, trained during pre-training on the features of the objective's last encoder:
    the EMA teacher, if there is one."""

    every: int = 0
    """Optimiser steps between probe runs (also at step 0, the random-init baseline); 0 is off."""
    methods: list[str] = field(default_factory=lambda: ["cgp"])
    root: str | None = None
    """Labelled set, read by ``online.task``; without this and ``shards``: the training set."""
    shards: list[str] = field(default_factory=list)
    task: str | None = None
    """Task of ``root`` / ``shards``; null: the run's own."""
    folds: int = 1
    """Number of folds held out in turn (at most the task's)."""
    max_clips: int = 2_000
    steps: int = 200
    batch: int = 48
    lr: float = 2e-2
    """Learning rate; high, so that a short probe run converges."""
    weight_decay: float = 0.05
    head: Head = field(default_factory=lambda: Head(prototypes=500))

    def problems(self) -> list[str]:
        found = []
        if self.every < 0:
            found.append(f"online.every={self.every} must not be negative (0 is off)")
        for name in ("folds", "max_clips", "steps", "batch"):
            if getattr(self, name) < 1:
                found.append(f"online.{name}={getattr(self, name)} must be at least 1")
        if self.lr <= 0:
            found.append(f"online.lr={self.lr} must be positive")
        if self.task and not (self.root or self.shards):
            found.append("online.task is the task of online.root or online.shards: give one too")
        if self.root and self.shards:
            found.append("online.root and online.shards are both given: give one of them")
        if self.every and not self.methods:
            found.append("online.methods is empty: name a probe, or set online.every=0")
        return found


OBJECTIVE = "masked_latent"
"""Objective used if none is named."""


def objective_settings(name: str) -> Any:
    """Returns the default settings of objective ``name``; imports it and torch."""
    from bat.objectives.base import find_objective

    return find_objective(name).Config(name=name)


@dataclass
class Pretrain:
    """Settings of ``bat-pretrain``."""

    recipe: str = ""
    out: str | None = None
    """Run folder; null: ``runs/pretrain-RECIPE``. An existing run there resumes."""
    task: str = "audioset"
    """File in ``bat/tasks`` that reads ``data.root`` and names the labels."""
    seed: int = 0
    model: Model = field(default_factory=Model)
    frontend: Frontend = field(default_factory=Frontend)
    data: Data = field(default_factory=Data)
    objective: Any = field(default_factory=lambda: objective_settings(OBJECTIVE))
    """The ``Config`` of the objective named by ``objective.name``."""
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    online: Online = field(default_factory=Online)
    health: Health = field(default_factory=Health)
    hardware: Hardware = field(default_factory=Hardware)
    log: Log = field(default_factory=Log)

    def problems(self) -> list[str]:
        front = self.frontend
        if min(self.model.patch, front.hop_length, front.sample_rate) < 1:
            return []  # reported by the sections themselves
        found = []
        for name, axis in (("frames", "time"), ("n_mels", "frequency")):
            size = getattr(self.frontend, name)
            if size % self.model.patch:
                found.append(
                    f"frontend.{name}={size} is not a multiple of model.patch="
                    f"{self.model.patch} ({axis} patches must fit)"
                )
        tokens = front.frames // self.model.patch * (front.n_mels // self.model.patch)
        if not found:
            found += self.objective.problems_with(width=self.model.width, tokens=tokens)
        given = 1 + int(self.data.clip_seconds * front.sample_rate) // front.hop_length
        if given > front.frames + 1:  # one more is omitted, as in probing
            found.append(
                f"data.clip_seconds={self.data.clip_seconds} makes {given} frames, more than "
                f"frontend.frames={front.frames}: the rest would be cut off; shorten the "
                "clips or raise the frames"
            )
        if self.optim.layer_decay != 1:
            found.append("optim.layer_decay is for bat-finetune; pre-training has one rate")
        if self.hardware.compile == "cudagraphs" and self.train.accumulate > 1:
            found.append(
                f"train.accumulate={self.train.accumulate} with hardware.compile=cudagraphs: a "
                "replayed graph overwrites the gradients that wait; say hardware.compile=whole"
            )
        return found


@dataclass
class Supervised:
    """Settings shared by ``bat-probe`` and ``bat-finetune``."""

    recipe: str = ""
    out: str | None = None
    """Run folder; null: ``runs/COMMAND-RECIPE-CHECKPOINT`` (probes: without the recipe's name
    for ``data.csv``). An existing run there resumes."""
    checkpoint: str | None = None
    """A run folder, an export folder or a weight file; ``random``: the random-init
    baseline (``random:RUN`` has the shape of a run or export, ``random:S`` of a model fragment)."""
    weights: Literal["student", "teacher"] = "student"
    heads: int | None = None
    """Attention heads, for a file that does not state them; null: width / 64."""
    task: str = "esc50"
    seed: int = 0
    folds: list[int] | None = None
    """Number of folds held out in turn; null: all of the task's."""
    level: Literal["clip", "frame"] = "clip"
    """``frame``: one output per time patch, for events and tokens; averaged over time for labels of
    whole clips."""
    loss: Literal["task", "ce", "bce", "asl"] = "task"
    frames: int | None = None
    """Frames of every clip; null: the task's number, or for custom data, which has none, each
    clip's own (padding is not attended to, and results do not depend on the batch)."""
    pad: Literal["checkpoint", "spectrogram", "waveform", "clip"] = "checkpoint"
    """Padding of short clips: zero frames (``spectrogram``), zero samples to the last frame
    (``waveform``), or zero samples to ``data.clip_seconds``, then zero frames (``clip``, the
    paper's supervised tasks); ``checkpoint``: as the encoder was trained."""
    pad_offset: Literal["start", "random"] = "start"
    """Start of a short training clip in its window; ``random`` requires padding of the waveform
    (``pad=clip`` or ``waveform``)."""
    statistics: str | None = None
    """Data set whose mean and deviation a Kaldi front end uses; null: the checkpoint's own, or
    for EAT, SSLAM and BEATs files, which do not state it, those of the task's data set."""
    data: Data = field(default_factory=lambda: Data(batch=48, workers=2, roll=False))
    head: Head = field(default_factory=Head)
    hardware: Hardware = field(default_factory=Hardware)
    log: Log = field(default_factory=Log)


PROBE_LR = 1e-3


@dataclass
class Probe(Supervised):
    """Settings of ``bat-probe``. ``checkpoint`` may name several encoders, as in ``A,B,random``."""

    methods: list[str] = field(default_factory=lambda: ["cgp"])
    """Probes trained side by side on the same features; ``--method cgp,linear``, ``all``."""
    seeds: int = 1
    """Trainings of each probe, with ``seed`` and the numbers after it for initialisation and
    dropout. The order of clips depends on ``seed`` alone, so all share each batch of features."""
    control: Literal["none", "permuted"] = "none"
    """``permuted``: permuted labels, every clip gets another clip's; results show chance level."""
    bootstrap: int = 1_000
    """Bootstrap resamples of the held-out clips for confidence intervals; 0: none."""
    confidence: float = 0.95
    finetuned: list[str] = field(default_factory=list)
    """Fine-tuning result for each of ``checkpoint`` in order, to show the gap: a run of
    bat-finetune, a number in percent, or ``none``."""
    heads_of: Literal["first", "all", "none"] = "first"
    """Trained heads that are saved: those of the first seed, of all, or of none."""
    protocol: Protocol = field(default_factory=Protocol)
    features: FeatureStore = field(default_factory=FeatureStore)
    insight: Insight = field(default_factory=Insight)
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=PROBE_LR, betas=[0.9, 0.999], decay="matrices", warmup_steps=400
        )
    )
    train: ProbeTrain = field(default_factory=ProbeTrain)

    def problems(self) -> list[str]:
        found = []
        if not self.methods:
            found.append("methods is empty: name a probe, e.g. --method cgp")
        if len(set(self.methods)) < len(self.methods):
            found.append(f"methods={list(self.methods)} names a probe twice")
        if self.seeds < 1:
            found.append(f"seeds={self.seeds} must be at least 1")
        if self.bootstrap < 0 or 0 < self.bootstrap < 100:
            found.append(f"bootstrap={self.bootstrap} must be at least 100, or 0 for none")
        if not 0 < self.confidence < 1:
            found.append(f"confidence={self.confidence} must lie strictly between 0 and 1")
        tried = [*self.protocol.lrs, *self.protocol.prototype_lrs]
        if self.protocol.lrs and self.optim.lr not in (PROBE_LR, *tried):
            found.append(
                f"optim.lr={self.optim.lr:g} with protocol.lrs={list(self.protocol.lrs)}: these "
                "are tried; say protocol.lrs= (and protocol.prototype_lrs=)"
            )
        if too_low := sorted({lr for lr in tried if 0 < lr < self.optim.min_lr}):
            found.append(
                f"optim.min_lr={self.optim.min_lr:g} is above {too_low} of protocol.lrs and "
                "protocol.prototype_lrs, which would never be used: lower it"
            )
        decays, decay = list(self.protocol.weight_decays), self.optim.weight_decay
        if decays and decay not in (Optim().weight_decay, *decays):
            found.append(
                f"optim.weight_decay={decay:g} with protocol.weight_decays={decays}: these are "
                f"tried; name it among them, or say optim.weight_decay={decays[0]:g}"
            )
        if self.protocol.sobol and not (self.protocol.weight_decays or self.optim.weight_decay):
            found.append(
                "protocol.sobol with optim.weight_decay=0, which has no logarithm: give a positive "
                "one, or positive protocol.weight_decays"
            )
        if self.features.cache in ("memory", "disk") and self.data.roll:
            found.append(
                f"features.cache={self.features.cache} with data.roll=true: rolled clips differ "
                "each time; say data.roll=false, or features.cache=off"
            )
        if self.optim.layer_decay != 1:
            found.append("optim.layer_decay is for bat-finetune; a probe has one rate")
        hardware = self.hardware
        alone = hardware.devices in ("auto", "1") and hardware.num_nodes == 1
        if not alone or hardware.strategy != "auto":
            found.append(
                f"bat-probe runs on one device, not hardware.devices={hardware.devices} "
                f"strategy={hardware.strategy}: try hardware=gpu"
            )
        if self.log.wandb != "off":
            found.append("log.wandb is for bat-pretrain and bat-finetune")
        if self.data.global_batch is not None:
            found.append("data.global_batch is for bat-pretrain and bat-finetune: say data.batch")
        if hardware.activation_checkpointing:
            found.append("hardware.activation_checkpointing: a frozen encoder has no backward pass")
        for name in ("shuffle", "window", "balance", "epoch_clips"):
            if getattr(self.data, name) != getattr(Data(), name):
                found.append(
                    f"data.{name} is for bat-pretrain and bat-finetune: a probe is trained on all "
                    "clips of its folds, evenly"
                )
        return found + _labelled(self.data)


@dataclass
class Finetune(Supervised):
    """Settings of ``bat-finetune``."""

    method: str = "linear"
    """Head on the encoder: any probe; ``linear`` is the paper's."""
    drop_path: float = 0.1
    """Drop-path rate of the last block; rises linearly from 0 at the first."""
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(
        default_factory=lambda: Optim(lr=5e-5, layer_decay=0.75, decay="matrices", warmup_steps=400)
    )
    train: Train = field(default_factory=lambda: Train(steps=4_000, keep=1))
    health: Health = field(default_factory=lambda: Health(collapse="off"))

    def problems(self) -> list[str]:
        found = [] if 0 <= self.drop_path < 1 else [f"drop_path={self.drop_path}: in [0, 1)"]
        for name in ("collapse", "collapse_every", "min_rank", "min_std"):
            if getattr(self.health, name) != getattr(Health(collapse="off"), name):
                found.append(f"health.{name} is for bat-pretrain: labels keep an encoder awake")
        return found + _labelled(self.data)


def _labelled(data: Data) -> list[str]:
    """Returns stream settings that do not apply to data held out by fold or split."""
    return [
        f"data.{name} is for bat-pretrain: leave it away"
        for name in ("labels", "mix")
        if getattr(data, name) != getattr(Data(), name)
    ]
