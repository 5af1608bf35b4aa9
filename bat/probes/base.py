"""Base class of probes: ``Features`` of all blocks to logits (docs/method.md 4).

At ``clip`` level a probe gives one answer per clip, (B, C); at ``frame`` level one per time patch,
(B, T, C). The optimiser decays matrices only; a probe lists matrices without decay (prototypes) in
``no_weight_decay``. A probe that mixes the blocks returns their weights in ``layer_gate``; the gate
is a result of its own, it shows in which blocks the task's information lies.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from bat import registry
from bat.errors import UserError
from bat.types import Features, Needs

Level = Literal["clip", "frame"]

ORDER = (
    *("linear", "mlp", "lcgp", "h2t", "mhca", "ep", "simpool", "abmilp", "vqt"),
    *("proto", "protofloat", "protobin", "cgp", "asr"),
)
"""Order of the probes in ``all``: class tokens, attention over patches, prototypes, sequences."""


class Size(TypedDict):
    """Keywords that every probe takes and hands on to ``Probe``."""

    classes: int
    """Classes C of the task."""
    width: int
    """Width D of the encoder."""
    depth: int
    """Blocks L of the encoder."""
    has_cls: bool
    """The encoder has a class token."""
    level: NotRequired[Level]


class Probe(nn.Module):
    """Base class of all probes; see ``Size`` for its arguments.

    Subclasses add the head settings they use (``prototypes``, ``dropout``, ``norm``) as
    keyword-only arguments; one that takes ``encoder`` is given the frozen backbone itself.
    """

    levels: ClassVar[tuple[Level, ...]] = ("clip", "frame")
    """Levels at which the probe is defined."""
    outputs_per_patch: ClassVar[int] = 1
    """Outputs per time patch at frame level; more than one: for targets of tokens alone."""
    has_prototypes: ClassVar[bool] = False
    """True for probes with prototypes: they need a higher learning rate and a grid of their own."""

    def __init__(
        self, *, classes: int, width: int, depth: int, has_cls: bool, level: Level = "clip"
    ) -> None:
        super().__init__()
        if level not in ("clip", "frame"):
            raise UserError(f"level={level} is not known: clip or frame")
        check_level(type(self), level)
        self.classes = classes
        self.width = width
        self.depth = depth
        self.has_cls = has_cls
        self.level = level

    def forward(self, features: Features) -> Tensor:
        """Computes logits (B, C) at clip level, (B, T * outputs_per_patch, C) at frame level.

        They depend only on a clip's own patches (``features.inside()``), however much padding the
        batch has; at frame level the answers in padding are not used.
        """
        raise NotImplementedError

    def inside(self, features: Features) -> Tensor | None:
        """(B, T * outputs_per_patch) bool, True for outputs within each clip; None: all."""
        inside = features.inside()
        return None if inside is None else inside.repeat_interleave(self.outputs_per_patch, dim=1)

    @classmethod
    def needs(cls, *, has_cls: bool, level: Level) -> Needs:
        """Returns the features that the probe reads of an encoder of this kind."""
        return Needs("all")

    def training_loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor
    ) -> Tensor:
        """Returns the loss to minimise: ``loss(logits, targets)`` plus terms of the probe."""
        return loss(logits, targets)

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        """Returns the logits to evaluate, by name suffix: one entry per reader of the probe."""
        return {"": logits}

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters with two or more axes that must not decay."""
        return set()

    def layer_gate(self) -> Tensor | None:
        """Returns the block weights (L,), summing to 1, detached; None if blocks are not mixed."""
        return None


class Dropout(nn.Dropout):
    """Dropout whose mask can be drawn from a ``seed`` instead of the global generator.

    Probes that draw from nothing else are trained in threads, where a global generator would give
    each of them numbers that depend on the others. The seed counts on the CPU only.
    """

    seed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seed is None or not self.training or x.device.type != "cpu":
            return super().forward(x)
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return x * kept.div_(1 - self.p)


def check_level(probe: type[Probe], level: Level) -> None:
    """Raise ``UserError`` if ``probe`` is not defined at ``level``."""
    if level not in probe.levels:
        raise UserError(
            f"probe {_name_of(probe)} is not defined at {level} level. Those that are: "
            + ", ".join(name for name, p in known_probes().items() if level in p.levels)
        )


def _name_of(probe: type[Probe]) -> str:
    return next((name for name, p in known_probes().items() if p is probe), probe.__name__)


def mix_blocks(layers: Tensor, gate: Tensor) -> Tensor:
    """Returns ``sum_l gate_l layers_l`` in float32: (L, ...), (L,) -> (...)."""
    return torch.tensordot(gate.float(), layers.float(), dims=1)


def mean_patch(tokens: Tensor, features: Features) -> Tensor:
    """Returns the mean over each clip's own patches: (..., B, T, F, D) -> (..., B, D).

    The type is at least float32. ``tokens`` must be zero where ``features`` have padding.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if features.valid is None:
        return tokens.mean((-3, -2), dtype=dtype)
    count = features.valid * tokens.shape[-2]  # (B,)
    return tokens.sum((-3, -2), dtype=dtype) / count[:, None]


def fill_padding(tokens: Tensor, features: Features) -> Tensor:
    """Replaces padding in ``tokens`` (B, T, F, D) by the clip's first token, which changes no
    minimum and no maximum over a clip's patches."""
    inside = features.inside()
    if inside is None:
        return tokens
    return torch.where(inside[..., None, None], tokens, tokens[:, :1, :1])


def known_probes() -> dict[str, type[Probe]]:
    """Returns all probes of this folder by name."""
    found: dict[str, type[Probe]] = {}
    for module in registry.known("probes"):
        found |= getattr(importlib.import_module(f"bat.probes.{module}"), "PROBES", {})
    return dict(sorted(found.items()))


def find_probe(name: str) -> type[Probe]:
    """Returns the class of probe ``name``, or of a dotted path ``package.module.Class``.

    Raises ``UserError`` that lists the known ones.
    """
    return registry.find_class(name, Probe, folder="probes", key="probe", table=known_probes())


def expand(methods: Sequence[str], *, level: Level, encoder: bool = True) -> list[str]:
    """Returns ``methods`` with ``all`` replaced by every probe of this folder defined at ``level``.

    ``encoder``: a frozen encoder is available; without one ``all`` omits the probes built from it
    (``vqt``). Probes of several outputs a patch (``asr``) are for tokens and must be named. Raises
    ``UserError`` for one named twice.
    """
    known = known_probes()
    ordered = [n for n in ORDER if n in known] + [n for n in known if n not in ORDER]
    everything = [
        n
        for n in ordered
        if level in known[n].levels
        and known[n].outputs_per_patch == 1
        and (encoder or not takes_encoder(known[n]))
    ]
    named = [n for method in methods for n in (everything if method == "all" else [method])]
    twice = [n for n, count in Counter(named).items() if count > 1]
    if twice:
        raise UserError(f"methods={','.join(methods)} names {', '.join(twice)} more than once")
    return named


def takes_encoder(probe: type[Probe]) -> bool:
    """Return True if the probe is built from the frozen encoder, not only from its features."""
    return "encoder" in inspect.signature(probe).parameters


def build_probe(
    name: str,
    *,
    classes: int,
    width: int,
    depth: int,
    has_cls: bool,
    level: Level = "clip",
    encoder: nn.Module | None = None,
    **head: Any,
) -> Probe:
    """Builds probe ``name`` for an encoder of ``width`` D and ``depth`` L.

    ``head``: see ``config.Head``; each probe gets the settings it has an argument for, and the
    frozen ``encoder`` if it is built from it. Raises ``UserError`` for an unknown name or level,
    settings that do not fit the encoder, and an encoder that is needed and not given.
    """
    cls = find_probe(name)
    takes = inspect.signature(cls).parameters
    own = {key: value for key, value in head.items() if key in takes}
    if takes_encoder(cls):
        own["encoder"] = encoder
    return cls(classes=classes, width=width, depth=depth, has_cls=has_cls, level=level, **own)
