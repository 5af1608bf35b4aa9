"""Defines every setting: its name, type, default, unit and range.

Precedence: these defaults < fragments (``configs/``) < recipe (``recipes/``) < command line.
The defaults are those of the paper's Base pre-training (docs/method.md 3). A field's type declares
its range (``bat/ranges.py``), ``problems()`` of a section the rules of several values; all mistakes
are reported at once. Importing these dataclasses does not import torch; the settings of an
objective are defined beside it (``bat/objectives``) and looked up when a ``Pretrain`` is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from bat.config.probing import Diagnostics, FeatureStore, Head, ProbeTrain, Protocol
from bat.config.running import Hardware, Health, Log, Train
from bat.config.sections import Augment, Data, Frontend, Model, Optim
from bat.ranges import (
    CountOrZero,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Rate,
    changed,
)

MONITORS = ("knn", "rankme", "lidar", "position")
"""Monitors of a pre-training, see ``bat/train/monitors.py``."""
MONITORED = ("teacher", "student")
"""Encoders that an objective may have."""


@dataclass
class Online:
    """Online probes, trained during pre-training on the features of the objective's last encoder:
    the EMA teacher, if there is one; and monitors, which train nothing."""

    every: CountOrZero = 0
    """Optimiser steps between probe runs (also at step 0, the random-init baseline); 0 is off."""
    methods: list[str] = field(default_factory=lambda: ["cgp"])
    """Probes that are trained."""
    monitors: list[str] = field(default_factory=lambda: list(MONITORS))
    """Numbers without training, at the same steps: ``knn`` (labels needed), ``rankme``, ``lidar``
    (encoders that can be masked), ``position`` (objectives with targets of patches)."""
    encoders: list[str] = field(default_factory=lambda: list(MONITORED))
    """Encoders of the objective that ``knn``, ``rankme`` and ``lidar`` are of."""
    root: str | None = None
    """Labelled set, read by ``online.task``; without this, ``csv`` and ``shards``: the training
    set."""
    csv: str | None = None
    """Labelled set as a CSV (columns path, label or labels; optional fold or split)."""
    shards: list[str] = field(default_factory=list)
    """Labelled set as shards, instead of ``root``."""
    task: str | None = None
    """Task of ``root`` / ``shards``; null: the run's own."""
    folds: PositiveInt = 1
    """Number of folds held out in turn (at most the task's)."""
    max_clips: PositiveInt = 2_000
    """Most clips of the labelled set that are used, by probes and monitors."""
    steps: PositiveInt = 200
    """Optimiser steps of a probe."""
    batch: PositiveInt = 48
    """Clips per step of a probe."""
    lr: PositiveFloat = 2e-2
    """Learning rate; high, so that a short probe run converges."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of a probe."""
    head: Head = field(default_factory=lambda: Head(prototypes=500))

    def problems(self) -> Iterator[str]:
        if self.task and not (self.root or self.shards):
            yield "online.task is the task of online.root or online.shards: give one too"
        given = [name for name in ("root", "csv", "shards") if getattr(self, name)]
        if len(given) > 1:
            yield f"{' and '.join(f'online.{n}' for n in given)} are given: give one of them"
        if self.every and not self.methods and not self.monitors:
            yield (
                "online.methods and online.monitors are empty: name a probe or a monitor, or set "
                "online.every=0"
            )
        if self.every and not self.encoders and {"knn", "rankme", "lidar"} & set(self.monitors):
            yield (
                "online.encoders is empty, and knn, rankme and lidar are monitors of an encoder: "
                "name teacher or student, or leave these monitors away"
            )
        for key, known in (("monitors", MONITORS), ("encoders", MONITORED)):
            for name in getattr(self, key):
                if name not in known:
                    yield f"online.{key} has no {name!r}: choose of {', '.join(known)}"


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
    """Name of the recipe, or a ``.yaml`` path."""
    out: str | None = None
    """Run folder; null: ``runs/pretrain-RECIPE`` (``own``: named after the data). An existing run
    there resumes."""
    init: str | None = None
    """A run, an export or a weight file whose encoder (and teacher, if it holds one) this run
    starts from; the schedule begins at zero. Not read again when the run resumes."""
    task: str = "audioset"
    """File in ``bat/tasks`` that reads ``data.root`` and names the labels."""
    seed: int = 0
    """All randomness depends on it: weights, order, masks."""
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

    def problems(self) -> Iterator[str]:
        front, patch, train = self.frontend, self.model.patch, self.train
        if min(patch, front.hop_length) < 1:
            return  # reported by the sections
        axes = {"frames": (front.frames, "time"), "n_mels": (front.n_mels, "frequency")}
        odd = [name for name, (size, _) in axes.items() if size % patch]
        for name in odd:
            size, axis = axes[name]
            yield (
                f"frontend.{name}={size} is not a multiple of model.patch={patch} ({axis} patches "
                "must fit)"
            )
        if not odd:
            tokens = front.frames // patch * (front.n_mels // patch)
            yield from self.objective.problems_with(width=self.model.width, tokens=tokens)
        given = 1 + int(self.data.clip_seconds * front.sample_rate) // front.hop_length
        if given > front.frames + 1:  # one more is omitted, as in probing
            yield (
                f"data.clip_seconds={self.data.clip_seconds} makes {given} frames, more than "
                f"frontend.frames={front.frames}, and the rest would be cut off: shorten the "
                "clips or raise the frames"
            )
        if self.optim.layer_decay != 1:
            yield "optim.layer_decay is for bat-finetune; pre-training has one rate"
        if self.hardware.compile == "cudagraphs" and train.accumulate > 1:
            yield (
                f"train.accumulate={train.accumulate} with hardware.compile=cudagraphs: a replayed "
                "graph overwrites the gradients that wait; say hardware.compile=whole"
            )


@dataclass
class Supervised:
    """Settings shared by ``bat-probe`` and ``bat-finetune``."""

    recipe: str = ""
    """Name of the recipe, or a ``.yaml`` path."""
    out: str | None = None
    """Run folder; null: ``runs/COMMAND-RECIPE-CHECKPOINT`` (probes: without the recipe's name
    for ``data.csv``). An existing run there resumes."""
    checkpoint: str | None = None
    """A run folder, an export folder or a weight file; ``random``: the random-init
    baseline (``random:RUN`` has the shape of a run or export, ``random:S`` of a model fragment)."""
    weights: Literal["student", "teacher"] = "student"
    """Encoder used of a file that holds both."""
    heads: PositiveInt | None = None
    """Attention heads, for a file that does not state them; null: width / 64."""
    trust_remote_code: bool = False
    """Run the code that a folder or hub repository of transformers (``hf:``) brings."""
    task: str = "esc50"
    """File in ``bat/tasks`` or a dotted path; with ``data.csv`` the task is ``csv``."""
    seed: int = 0
    """All randomness depends on it: weights, order, dropout."""
    folds: list[int] | None = None
    """Number of folds held out in turn; null: all of the task's."""
    level: Literal["clip", "frame"] = "clip"
    """``frame``: one output per time patch, for events and tokens; averaged over time for labels of
    whole clips."""
    loss: Literal["task", "ce", "bce", "asl"] = "task"
    """``task``: the task's own; cross-entropy, binary cross-entropy, asymmetric loss."""
    shots: PositiveInt | None = None
    """Train on at most so many clips of each class, counted by a clip's first label and drawn by
    ``seed``, those of at most ``data.clip_seconds`` before longer ones; null: on all."""
    frames: PositiveInt | None = None
    """Frames of every clip; null: the task's number, or for custom data, which has none, each
    clip's own (padding is not attended to, and results do not depend on the batch)."""
    sample_rate: PositiveInt | None = None
    """Sample rate at which the encoder's weights are run; null: the checkpoint's."""
    n_fft: PositiveInt | None = None
    """Window and length of the Fourier transform in samples; null: the checkpoint's. A Kaldi front
    end has windows of 25 ms every 10 ms at any rate and does not use it."""
    hop_length: PositiveInt | None = None
    """Hop from frame to frame in samples; null: the checkpoint's."""
    pad: Literal["checkpoint", "spectrogram", "waveform", "clip", "fbank"] = "checkpoint"
    """Padding of short clips: zero frames (``spectrogram``; ``fbank``: before a Kaldi front end
    standardises, as EAT, SSLAM, AudioMAE and AST were trained), zero samples to the last frame
    (``waveform``), or zero samples to ``data.clip_seconds``, then zero frames (``clip``, the
    paper's supervised tasks); ``checkpoint``: as the encoder was trained."""
    pad_offset: Literal["start", "random"] = "start"
    """Start of a short training clip in its window; ``random`` requires padding of the waveform
    (``pad=clip`` or ``waveform``)."""
    statistics: str | None = None
    """Data set whose mean and deviation a Kaldi front end uses; null: the checkpoint's own, or
    for EAT, SSLAM and BEATs files, which do not state it, those of the task's data set."""
    cls: Literal["none", "mean"] | None = None
    """Class token of ``beats``, which has none: ``mean`` makes one of each block's mean patch, as
    its authors' code does; null: ``mean`` with ``protocol=bat`` unless ``head.cls`` is given, else
    the checkpoint's."""
    window_scores: bool = False
    """Write the probabilities of every held-out clip, or of each window of it, to a CSV in the run
    folder (``scores/``, fine-tuning: ``fold-K/scores.csv``). For labels of whole clips."""
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
    seeds: PositiveInt = 1
    """Trainings of each probe, with ``seed`` and the numbers after it for initialisation and
    dropout. The order of clips depends on ``seed`` alone, so all share each batch of features."""
    permute_labels: bool = False
    """Give every clip another clip's labels; results then show chance level."""
    bootstrap: CountOrZero = 1_000
    """Bootstrap resamples of the held-out clips for confidence intervals; 0: none."""
    confidence: OpenFraction = 0.95
    """Level of the confidence intervals."""
    finetuned: list[str] = field(default_factory=list)
    """Fine-tuning result for each of ``checkpoint`` in order, to show the gap: a run of
    bat-finetune, a number in percent, or ``none``."""
    heads_of: Literal["first", "all", "none"] = "first"
    """Trained heads that are saved: those of the first seed, of all, or of none."""
    protocol: Protocol = field(default_factory=Protocol)
    features: FeatureStore = field(default_factory=FeatureStore)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=PROBE_LR, betas=[0.9, 0.999], decay="matrices", warmup_steps=400
        )
    )
    train: ProbeTrain = field(default_factory=ProbeTrain)

    def problems(self) -> Iterator[str]:
        if not self.methods:
            yield "methods is empty: name a probe, e.g. --method cgp"
        if len(set(self.methods)) < len(self.methods):
            yield f"methods={list(self.methods)} names a probe twice"
        if 0 < self.bootstrap < 100:
            yield f"bootstrap={self.bootstrap} must be at least 100, or 0 for none"
        yield from self._overridden()
        if self.features.cache in ("memory", "disk"):
            for moving, remedy in (
                ("data.roll=true" if self.data.roll else "", "data.roll=false"),
                (f"data.noise={self.data.noise:g}" if self.data.noise else "", "data.noise=0"),
            ):
                if moving:
                    yield (
                        f"features.cache={self.features.cache} with {moving}: training clips "
                        f"differ each time; say {remedy}, or features.cache=off"
                    )
        if self.optim.layer_decay != 1:
            yield "optim.layer_decay is for bat-finetune; a probe has one rate"
        hardware = self.hardware
        alone = hardware.devices in ("auto", "1") and hardware.num_nodes == 1
        if not alone or hardware.strategy != "auto":
            yield (
                f"bat-probe runs on one device, not hardware.devices={hardware.devices} "
                f"strategy={hardware.strategy}: try hardware=gpu"
            )
        if hardware.activation_checkpointing:
            yield "hardware.activation_checkpointing: a frozen encoder has no backward pass"
        if self.log.wandb != "off":
            yield "log.wandb is for bat-pretrain and bat-finetune"
        for name in changed(self.data, ("shuffle", "window", "global_batch"), Data()):
            yield f"data.{name} is for bat-pretrain and bat-finetune: leave it away"
        yield from _of_pretraining(self.data)

    def _overridden(self) -> Iterator[str]:
        """Yields values of ``optim`` that ``protocol`` overrides or that do not fit it."""
        protocol, optim = self.protocol, self.optim
        tried = [*protocol.lrs, *protocol.prototype_lrs]
        if protocol.lrs and optim.lr not in (PROBE_LR, *tried):
            yield (
                f"optim.lr={optim.lr:g} with protocol.lrs={list(protocol.lrs)}: these are tried; "
                "say protocol.lrs= (and protocol.prototype_lrs=)"
            )
        if too_low := sorted({lr for lr in tried if 0 < lr < optim.min_lr}):
            yield (
                f"optim.min_lr={optim.min_lr:g} is above {too_low} of protocol.lrs and "
                "protocol.prototype_lrs, which would never be used: lower it"
            )
        decays, decay = list(protocol.weight_decays), optim.weight_decay
        if decays and decay not in (Optim().weight_decay, *decays):
            yield (
                f"optim.weight_decay={decay:g} with protocol.weight_decays={decays}: these are "
                f"tried; name it among them, or say optim.weight_decay={decays[0]:g}"
            )
        if protocol.sobol and not (decays or decay):
            yield (
                "protocol.sobol with optim.weight_decay=0, which has no logarithm: give a positive "
                "one, or positive protocol.weight_decays"
            )


@dataclass
class Finetune(Supervised):
    """Settings of ``bat-finetune``."""

    method: str = "linear"
    """Head on the encoder: any probe; ``linear`` is the paper's."""
    validate_every: CountOrZero = 0
    """Optimiser steps between validations, on the split ``valid`` or as ``bat-probe`` takes
    validation clips (a spare fold, else a part of the training clips); the best weights are
    evaluated, of equally good ones the later. 0: the weights after the last step."""
    drop_path: Rate = 0.1
    """Drop-path rate of the last block; rises linearly from 0 at the first."""
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(
        default_factory=lambda: Optim(lr=5e-5, layer_decay=0.75, decay="matrices", warmup_steps=400)
    )
    train: Train = field(default_factory=lambda: Train(steps=4_000, keep=1))
    health: Health = field(default_factory=lambda: Health(collapse="off"))

    def problems(self) -> Iterator[str]:
        collapse = ("collapse", "collapse_every", "min_rank", "min_std")
        for name in changed(self.health, collapse, Health(collapse="off")):
            yield f"health.{name} is for bat-pretrain: labels keep an encoder awake"
        if self.validate_every and self.hardware.shards:
            yield (
                f"validate_every={self.validate_every} with hardware.strategy="
                f"{self.hardware.strategy}: the weights of a step are not in one place; say "
                "hardware.strategy=ddp, or validate_every=0"
            )
        yield from _of_pretraining(self.data)


def _of_pretraining(data: Data) -> Iterator[str]:
    """Yields stream settings that do not apply to data held out by fold or split."""
    for name in changed(data, ("labels", "mix"), Data()):
        yield f"data.{name} is for bat-pretrain: leave it away"
