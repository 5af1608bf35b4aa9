"""Settings of how encoders are evaluated: heads, protocol, features, diagnostics.

Rules and precedence are described in ``schema.py``, which combines the sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from bat.ranges import (
    AtLeastTwo,
    CountOrZero,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Rate,
    changed,
)


@dataclass
class Head:
    """Settings of the probes (docs/method.md 4); each probe uses those that apply to it."""

    prototypes: PositiveInt = 10_000
    """K of ``cgp``, and of ``protobin`` and ``protofloat`` if ``per_class`` is null."""
    per_class: PositiveInt | str | None = None
    """Prototypes per class of ``protobin``, ``protofloat`` and ``proto``; ``task``: as many as
    *Unmute* has for the task (10 on AudioSet, else 20); null: ``prototypes`` in total (BAT's), and
    20 per class for ``proto``, whose prototypes belong to classes."""
    dropout: Rate = 0.2
    """Dropout rate before the output layer."""
    cls: Literal["patches", "mean"] | None = None
    """Replacement of the class token in ``cgp`` for encoders without one; ``mean``: each block's
    mean patch, normalised and mixed as class tokens are; ``patches``: the mean similarity of the
    mixed patches; null: ``mean`` with ``protocol=bat``, else ``patches``."""
    norm: bool = True
    """LayerNorm before the output layer of ``linear``, ``lcgp``, ``mlp``, ``h2t`` and ``vqt``, and
    of a fine-tuned head."""
    vqt_norm: bool | None = None
    """The same for ``vqt`` alone; null: as ``norm``."""
    hidden: PositiveInt | None = None
    """Hidden width of ``mlp`` (null: the encoder's width), and of each direction of the LSTM of
    ``asr`` (null: 512)."""
    attention_heads: PositiveInt | None = None
    """Heads of ``mhca``; null: 12, 16 for an encoder 1024 wide, else width / 64."""
    pool_queries: PositiveInt = 32
    """Queries of ``ep``."""
    queries: PositiveInt = 10
    """Queries per block of ``vqt``."""
    lasso: NonNegativeFloat = 1e-4
    """Weight of the group lasso of ``h2t``."""
    orthogonality: NonNegativeFloat = 1.0
    """Weight of the orthogonality loss of ``proto``."""

    def for_task(self, per_class: int) -> Head:
        """Returns these settings with ``task`` replaced by the number per class."""
        return replace(self, per_class=per_class) if self.per_class == "task" else self

    def problems(self) -> Iterator[str]:
        if isinstance(self.per_class, str) and self.per_class != "task":
            yield f"head.per_class={self.per_class} must be a number, task, or null"


@dataclass
class Protocol:
    """The evaluation protocol; ``protocol=bat`` and ``=unmute`` are the papers' constants."""

    name: str = "validated"
    """Name of the fragment that these values are from; recorded in the results."""
    selection: Literal["validation", "none"] = "validation"
    """``validation``: the learning rate is selected on clips split off the training clips, never
    on the test clips; ``none``: nothing is selected, all clips train, the last step counts."""
    metric: Literal["task", "map"] = "task"
    """Metric that selects on the validation clips: the task's own, or mAP for any task."""
    fraction: OpenFraction = 0.2
    """Fraction of the training clips used as validation clips if the data has neither a split
    ``valid`` nor spare folds (three or more folds: the fold after the held-out one)."""
    lrs: list[PositiveFloat] = field(default_factory=list)
    """Learning rates trained side by side; empty: ``optim.lr``."""
    prototype_lrs: list[PositiveFloat] = field(default_factory=list)
    """Learning rates of probes with prototypes; empty: ``lrs``."""
    weight_decays: list[NonNegativeFloat] = field(default_factory=list)
    """Weight decays tried with each rate; empty: ``optim.weight_decay``."""
    sobol: CountOrZero = 0
    """Points of a Sobol sequence (log scale, between the least and the greatest rate and decay)
    to try instead of all pairs; 0: all pairs."""
    search: Literal["each", "first"] = "each"
    """Seeds that select a rate and a weight decay: ``each`` its own, or the ``first``, whose values
    are used for the other seeds."""
    look_every: CountOrZero = 0
    """Steps between validations, the best of which is kept; 0: only at the end."""
    patience: CountOrZero = 0
    """Validations without improvement after which a candidate stops; 0: never."""

    def problems(self) -> Iterator[str]:
        if self.selection == "none":
            rest = tuple(f.name for f in fields(self) if f.name not in ("name", "selection"))
            for name in changed(self, rest, Protocol()):
                yield (
                    f"protocol.{name}={getattr(self, name)} with protocol.selection=none: nothing "
                    f"is chosen; say protocol.selection=validation, or leave {name} away"
                )
        for name in ("lrs", "prototype_lrs", "weight_decays"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                yield f"protocol.{name}={list(values)} names a value twice"
        if self.sobol and len(self.lrs) < 2:
            yield f"protocol.sobol={self.sobol} draws between protocol.lrs: give two or more"
        if self.sobol and 0 in self.weight_decays:
            yield "protocol.weight_decays holds 0, which has no logarithm: omit it with sobol"
        if self.patience and not self.look_every:
            yield "protocol.patience counts validations: give protocol.look_every=STEPS too"


@dataclass
class ProbeTrain:
    steps: PositiveInt = 4_000
    """Optimiser steps of each fold."""
    epochs: NonNegativeFloat = 0.0
    """Passes over the training clips instead of ``steps``; the warm-up is then at most a tenth of
    them. 0: ``steps``."""
    min_steps: CountOrZero = 0
    """With ``epochs``: minimum number of steps."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics."""
    memory_gb: PositiveFloat = 8.0
    """Memory for candidates trained side by side (weights, gradients, moments); if more is needed,
    they are trained in several passes over the same features, with the same results."""

    def problems(self) -> Iterator[str]:
        if self.epochs > 0 and self.steps != ProbeTrain().steps:
            yield (
                f"train.steps={self.steps} with train.epochs={self.epochs:g}: these decide; say "
                "train.epochs=0 too (and train.min_steps=0), or train.min_steps="
            )
        if self.min_steps and not self.epochs:
            yield f"train.min_steps={self.min_steps} is the least with train.epochs: give it too"


@dataclass
class FeatureStore:
    """Cache of frozen features between steps; see ``bat/eval/feature_cache.py``."""

    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    """``off``: the encoder runs for every batch. ``auto``: memory if they fit ``memory_gb``;
    on a CPU also disk if they fit ``disk_gb``; else off."""
    memory_gb: NonNegativeFloat = 4.0
    """Most memory that cached features may take."""
    disk_gb: NonNegativeFloat = 50.0
    """Most disk space that cached features may take."""
    folder: str = "runs/features"
    """Folder of the caches on disk; each has a subfolder named by a hash of its inputs."""


@dataclass
class Diagnostics:
    """Diagnostics of encoders, measured in addition to the probes."""

    curve: bool = False
    """Train a linear probe on every single block (``curve@BLOCK``) with the others."""
    encoder: bool = True
    """Measure attention sinks, token norms and effective rank of every block."""
    maps: CountOrZero = 3
    """Number of classes for which the patches selected by prototypes are plotted; 0: none."""
    clips: AtLeastTwo = 64
    """Number of clips used for the encoder's statistics."""
