"""Settings of how encoders are evaluated: heads, protocol, features, diagnostics.

Rules and precedence are described in ``schema.py``, which combines the sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal


@dataclass
class Head:
    """Settings of the probes (docs/method.md 4); each probe uses those that apply to it."""

    prototypes: int = 10_000
    """K of ``cgp``, and of ``protobin`` and ``protofloat`` if ``per_class`` is null."""
    per_class: int | str | None = None
    """Prototypes per class of ``protobin``, ``protofloat`` and ``proto``; ``task``: as many as
    *Unmute* has for the task (10 on AudioSet, else 20); null: ``prototypes`` in total (BAT's), and
    20 per class for ``proto``, whose prototypes belong to classes."""
    dropout: float = 0.2
    cls: Literal["patches", "mean"] | None = None
    """Replacement of the class token in ``cgp`` for encoders without one; ``mean``: each block's
    mean patch, normalised and mixed as class tokens are; ``patches``: the mean similarity of the
    mixed patches; null: ``mean`` with ``protocol=bat``, else ``patches``."""
    norm: bool = True
    """LayerNorm before the output layer of ``linear``, ``lcgp``, ``mlp``, ``h2t`` and ``vqt``, and
    of a fine-tuned head."""
    vqt_norm: bool | None = None
    """The same for ``vqt`` alone; null: as ``norm``."""
    hidden: int | None = None
    """Hidden width of ``mlp``; null: the encoder's width."""
    attention_heads: int | None = None
    """Heads of ``mhca``; null: 12, 16 for an encoder 1024 wide, else width / 64."""
    pool_queries: int = 32
    """Queries of ``ep``."""
    queries: int = 10
    """Queries per block of ``vqt``."""
    lasso: float = 1e-4
    """Weight of the group lasso of ``h2t``."""
    orthogonality: float = 1.0
    """Weight of the orthogonality loss of ``proto``."""

    def for_task(self, per_class: int) -> Head:
        """Returns these settings with ``task`` replaced by the number per class."""
        return replace(self, per_class=per_class) if self.per_class == "task" else self

    def problems(self) -> list[str]:
        found = []
        for name in ("prototypes", "pool_queries", "queries"):
            if getattr(self, name) < 1:
                found.append(f"head.{name}={getattr(self, name)} must be at least 1")
        for name in ("per_class", "hidden", "attention_heads"):
            value, more = getattr(self, name), ", task" if name == "per_class" else ""
            if isinstance(value, str) and value != "task":
                found.append(f"head.{name}={value} must be a number{more}, or null")
            elif isinstance(value, int) and value < 1:
                found.append(f"head.{name}={value} must be at least 1{more}, or null")
        for name in ("lasso", "orthogonality"):
            if getattr(self, name) < 0:
                found.append(f"head.{name}={getattr(self, name)} must not be negative (0 is off)")
        if not 0 <= self.dropout < 1:
            found.append(f"head.dropout={self.dropout} must lie in [0, 1)")
        return found


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
    fraction: float = 0.2
    """Fraction of the training clips used as validation clips if the data has neither a split
    ``valid`` nor spare folds (three or more folds: the fold after the held-out one)."""
    lrs: list[float] = field(default_factory=list)
    """Learning rates trained side by side; empty: ``optim.lr``."""
    prototype_lrs: list[float] = field(default_factory=list)
    """Learning rates of probes with prototypes; empty: ``lrs``."""
    weight_decays: list[float] = field(default_factory=list)
    """Weight decays tried with each rate; empty: ``optim.weight_decay``."""
    sobol: int = 0
    """Points of a Sobol sequence (log scale, between the least and the greatest rate and decay)
    to try instead of all pairs; 0: all pairs."""
    search: Literal["each", "first"] = "each"
    """Seeds that select a rate and a weight decay: ``each`` its own, or the ``first``, whose values
    are used for the other seeds."""
    look_every: int = 0
    """Steps between validations, the best of which is kept; 0: only at the end."""
    patience: int = 0
    """Validations without improvement after which a candidate stops; 0: never."""

    def problems(self) -> list[str]:
        found = []
        if self.selection == "none":
            for each in fields(self):
                value = getattr(self, each.name)
                if each.name in ("name", "selection") or value == getattr(Protocol(), each.name):
                    continue
                found.append(
                    f"protocol.{each.name}={value} with protocol.selection=none: nothing is "
                    f"chosen; say protocol.selection=validation, or leave {each.name} away"
                )
        for name in ("lrs", "prototype_lrs"):
            if any(v <= 0 for v in getattr(self, name)):
                found.append(f"protocol.{name}={list(getattr(self, name))} must be positive")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                found.append(f"protocol.{name}={list(getattr(self, name))} names a rate twice")
        if any(v < 0 for v in self.weight_decays):
            found.append(f"protocol.weight_decays={list(self.weight_decays)}: none is negative")
        if len(set(self.weight_decays)) < len(self.weight_decays):
            found.append(f"protocol.weight_decays={list(self.weight_decays)} names one twice")
        for name in ("sobol", "look_every", "patience"):
            if getattr(self, name) < 0:
                found.append(f"protocol.{name}={getattr(self, name)} must not be negative")
        if self.sobol and len(self.lrs) < 2:
            found.append(
                f"protocol.sobol={self.sobol} draws between protocol.lrs: give two or more"
            )
        if self.sobol and 0 in self.weight_decays:
            found.append("protocol.weight_decays holds 0, which has no logarithm: with sobol give "
                         "positive ones")  # fmt: skip
        if self.patience and not self.look_every:
            found.append("protocol.patience counts looks: give protocol.look_every=STEPS too")
        if not 0 < self.fraction < 1:
            found.append(f"protocol.fraction={self.fraction} must lie strictly between 0 and 1")
        return found


STEPS = 4_000


@dataclass
class ProbeTrain:
    steps: int = STEPS
    """Optimiser steps of each fold."""
    epochs: float = 0.0
    """Passes over the training clips instead of ``steps``; the warm-up is then at most a tenth of
    them. 0: ``steps``."""
    min_steps: int = 0
    """With ``epochs``: minimum number of steps."""
    log_every: int = 50
    """Steps between lines of metrics."""
    memory_gb: float = 8.0
    """Memory for candidates trained side by side (weights, gradients, moments); if more is needed,
    they are trained in several passes over the same features, with the same results."""

    def problems(self) -> list[str]:
        found = [
            f"train.{name}={getattr(self, name)} must be at least 1"
            for name in ("steps", "log_every")
            if getattr(self, name) < 1
        ]
        if self.epochs < 0:
            found.append(f"train.epochs={self.epochs} must not be negative (0: train.steps)")
        if self.epochs > 0 and self.steps != STEPS:
            found.append(
                f"train.steps={self.steps} with train.epochs={self.epochs:g}: these decide; say "
                "train.epochs=0 too (and train.min_steps=0), or train.min_steps="
            )
        if self.min_steps < 0 or (self.min_steps and not self.epochs):
            found.append(f"train.min_steps={self.min_steps} is the least with train.epochs: >= 0")
        if self.memory_gb <= 0:
            found.append(f"train.memory_gb={self.memory_gb} must be positive")
        return found


@dataclass
class FeatureStore:
    """Cache of frozen features between steps; see ``bat/eval/feature_cache.py``."""

    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    """``off``: the encoder runs for every batch. ``auto``: memory if they fit ``memory_gb``;
    on a CPU also disk if they fit ``disk_gb``; else off."""
    memory_gb: float = 4.0
    disk_gb: float = 50.0
    folder: str = "runs/features"
    """Folder of the caches on disk; each has a subfolder named by a hash of its inputs."""

    def problems(self) -> list[str]:
        return [
            f"features.{name}={getattr(self, name)} must not be negative"
            for name in ("memory_gb", "disk_gb")
            if getattr(self, name) < 0
        ]


@dataclass
class Insight:
    """Diagnostics of encoders, measured in addition to the probes."""

    curve: bool = False
    """Train a linear probe on every single block (``curve@BLOCK``) with the others."""
    encoder: bool = True
    """Measure attention sinks, token norms and effective rank of every block."""
    maps: int = 3
    """Number of classes for which the patches selected by prototypes are plotted; 0: none."""
    clips: int = 64
    """Number of clips used for the encoder's statistics."""

    def problems(self) -> list[str]:
        found = []
        if self.maps < 0:
            found.append(f"insight.maps={self.maps} must not be negative (0 is off)")
        if self.clips < 2:
            found.append(f"insight.clips={self.clips} must be at least 2")
        return found
