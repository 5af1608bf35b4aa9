"""The sections of the schema that say how encoders are judged: heads, protocol, features, insight.

Rules and precedence are told in ``schema.py``, which puts the sections together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal


@dataclass
class Head:
    """Settings of the probes (docs/method.md 4); each takes its own of these."""

    prototypes: int = 10_000
    """K of ``cgp``; of ``protobin`` and ``protofloat`` where ``per_class`` is null."""
    per_class: int | str | None = None
    """Prototypes a class of ``protobin``, ``protofloat`` and ``proto``; ``task``: as many as
    *Unmute* has for the task (10 on AudioSet, else 20); null: ``prototypes`` in total (BAT's), and
    20 a class for ``proto``, which is bound to classes."""
    dropout: float = 0.2
    cls: Literal["patches", "mean"] | None = None
    """What stands in for the class token in ``cgp`` where the encoder has none: ``mean``: each
    block's mean patch, normalised and mixed as class tokens are; ``patches``: the mean similarity
    of the mixed patches. null: ``mean`` with ``protocol=bat``, else ``patches``."""
    norm: bool = True
    """LayerNorm before the output layer of ``linear``, ``lcgp``, ``mlp``, ``h2t`` and ``vqt``, and
    of a fine-tuned head."""
    vqt_norm: bool | None = None
    """The same for ``vqt`` alone; null: as ``norm``."""
    hidden: int | None = None
    """Hidden width of ``mlp``; null: the encoder's."""
    attention_heads: int | None = None
    """Heads of ``mhca``; null: 12, 16 where the encoder is 1024 wide, else width / 64."""
    pool_queries: int = 32
    """Queries of ``ep``."""
    queries: int = 10
    """Queries a block of ``vqt``."""
    lasso: float = 1e-4
    """Weight of the group lasso of ``h2t``."""
    orthogonality: float = 1.0
    """Weight of the orthogonality loss of ``proto``."""

    def for_task(self, per_class: int) -> Head:
        """These settings, with ``per_class`` in the place of ``task``."""
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
    """How a number comes about; ``protocol=bat`` and ``=unmute`` are the papers' constants."""

    name: str = "validated"
    """Said in the results: the fragment that these values are from."""
    selection: Literal["validation", "none"] = "validation"
    """``validation``: the learning rate is chosen on clips kept out of the training clips, never
    on the held-out ones; ``none``: nothing is chosen, all of them train, the last step counts."""
    metric: Literal["task", "map"] = "task"
    """What is best on the validation clips: the task's metric, or mAP in any case."""
    fraction: float = 0.2
    """Training clips kept out for that where the data has neither a split ``valid`` nor folds to
    spare (three or more: the fold after the held-out one)."""
    lrs: list[float] = field(default_factory=list)
    """Learning rates trained side by side; empty: ``optim.lr``."""
    prototype_lrs: list[float] = field(default_factory=list)
    """Those of probes with prototypes; empty: ``lrs``."""
    weight_decays: list[float] = field(default_factory=list)
    """Weight decays tried with each rate; empty: ``optim.weight_decay``."""
    sobol: int = 0
    """So many points of a Sobol sequence (log scale, between the least and the greatest rate and
    decay) instead of all pairs; 0: all pairs."""
    search: Literal["each", "first"] = "each"
    """Which seeds choose a rate and a weight decay: ``each`` its own, or the ``first``, whose
    values the other seeds are trained with."""
    look_every: int = 0
    """Steps between two looks at the validation clips, the best of which is kept; 0: at the end."""
    patience: int = 0
    """Looks without gain after which a candidate stops; 0: never."""

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
    """Optimiser steps of each round (a fold held out)."""
    epochs: float = 0.0
    """Passes over the training clips instead of ``steps``; the warm-up is then at most a tenth of
    them. 0: ``steps``."""
    min_steps: int = 0
    """With ``epochs``: no fewer steps than these, however few the clips."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    memory_gb: float = 8.0
    """Candidates trained side by side may need so much (weights, gradients, moments); more of them
    are trained in several passes over the same features, with the same results."""

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
    """Where frozen features are kept between steps; see ``bat/eval/feature_cache.py``."""

    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    """``off``: the encoder runs for every batch. ``auto``: memory where they fit ``memory_gb``;
    on a CPU also disk where they fit ``disk_gb``; else off."""
    memory_gb: float = 4.0
    disk_gb: float = 50.0
    folder: str = "runs/features"
    """Where caches on disk lie, each in a folder named after what it was made from."""

    def problems(self) -> list[str]:
        return [
            f"features.{name}={getattr(self, name)} must not be negative"
            for name in ("memory_gb", "disk_gb")
            if getattr(self, name) < 0
        ]


@dataclass
class Insight:
    """Where the information sits: what is measured besides the probes."""

    curve: bool = False
    """A linear probe on every block alone (``curve@BLOCK``), trained with the others."""
    encoder: bool = True
    """Attention sinks, token norms and effective rank of every block."""
    maps: int = 3
    """Classes of which the patches that prototypes select are drawn; 0: none."""
    clips: int = 64
    """Clips that the encoder's statistics are taken over."""

    def problems(self) -> list[str]:
        found = []
        if self.maps < 0:
            found.append(f"insight.maps={self.maps} must not be negative (0 is off)")
        if self.clips < 2:
            found.append(f"insight.clips={self.clips} must be at least 2")
        return found
