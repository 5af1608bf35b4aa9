"""Base class of pre-training objectives: a loss and the parts that only this loss needs.

An objective owns its masks, decoder, teacher and settings. The training loop hands it batches of
waveforms, minimises ``loss``, and asks it which encoders to export, evaluate and monitor; it
knows nothing else about it. A new objective is one file: docs/add_an_objective.md.

All randomness must depend on (seed, place in the stream) alone: derive it from the ``seed`` of
``build`` and from ``batch.positions`` (``bat.nn.masking.row_seeds``), never from the batch, the
rank or an earlier draw; then an interrupted and resumed run equals an uninterrupted one. Dropout
and drop path may use torch's global generator, which is seeded anew for each micro-batch and rank.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from bat import registry
from bat.encoders.base import Encoder, MaskableEncoder, SpectrogramEncoder
from bat.errors import UserError
from bat.nn.block import blocks_of
from bat.nn.decoder import CrossDecoder, ViTDecoder
from bat.types import Views, WaveBatch


class Objective(nn.Module, abc.ABC):
    """Base class of pre-training objectives. Parameters that require a gradient are trained."""

    @dataclass
    class Config:
        """Settings section ``objective``; subclasses add the fields of their objective."""

        name: str = ""
        """File in ``bat/objectives``, or a dotted ``module.Class``."""

        def problems(self) -> Iterable[str]:
            """Returns a message per broken rule, which names the settings. The range of a single
            value is declared in the field's type (``bat.ranges``)."""
            return []

        def problems_with(self, *, width: int, tokens: int) -> Iterable[str]:
            """Returns messages about settings that do not fit this width and number of patches."""
            del width, tokens
            return []

    graphs: ClassVar[tuple[str, ...]] = ()
    """Methods on tensors that ``hardware.compile=whole`` compiles, each to one graph."""
    collapse_advice: ClassVar[str] = ""
    """Settings to try against a collapse, named in the message that ends a collapsed run."""

    @classmethod
    @abc.abstractmethod
    def build(cls, config: Any, encoder: Encoder, *, seed: int) -> Self:
        """Builds the objective around a fresh ``encoder``. Works on the ``meta`` device too.

        ``config``: the objective's ``Config``; ``seed``: of the run, for deriving all randomness.
        Raises ``UserError`` for an encoder that lacks a required method (``maskable``).
        """

    @abc.abstractmethod
    def forward(self, batch: WaveBatch) -> dict[str, Tensor]:
        """Returns ``loss``, 0-dim float32 with a gradient, and further scalars for
        ``metrics.jsonl``, on the batch's device. ``batch.positions`` stays on the CPU. Scalars
        whose names contain ``loss`` are shown in the plot of the curves."""

    @abc.abstractmethod
    def encoders(self) -> dict[str, Encoder]:
        """Returns ``{"student": ...}``, the trained encoder, and ``"teacher"`` if there is one.

        All are exported under these names and monitored for collapse; the last one is what the
        online probes evaluate.
        """

    def after_step(self, step: int, *, skip: Tensor) -> None:
        """Called after each optimiser step, for example for a moving average of the weights.

        ``step``: optimiser steps done before this one. ``skip``: 0-dim on the device, 1.0 if
        the step was skipped for a non-finite loss or gradient: then nothing may change.
        """

    def units(self) -> list[nn.Module]:
        """Returns the modules that FSDP gathers one at a time, in order of use; they must be called
        by their ``forward``. The rest of the objective is gathered as a whole."""
        return [block for encoder in self.encoders().values() for block in blocks_of(encoder)]

    def describe(self) -> str:
        """Returns a short description for the log and the dry run."""
        return type(self).__name__

    def example_masks(self, batch: WaveBatch) -> Tensor | None:
        """Returns (B, N) bool, True for patches hidden from the encoder: one mask per clip, for
        ``plots/masks.png``. None: an objective without masks, no plot."""
        del batch
        return None

    def local_targets(self, batch: WaveBatch) -> tuple[str, Tensor] | None:
        """Returns the name of the scalar of ``forward`` that is the mean squared error to targets
        of patches, and these targets (B, N, P), float32 without gradient, one row per position.

        The online monitors compare that loss with the loss of a prediction from position alone.
        None: an objective without such targets, no comparison.
        """
        del batch
        return None

    def spectrogram(self, batch: WaveBatch) -> Tensor:
        """Maps (B, S) waves to (B, 1, frames, mels) float32 without gradient by the encoder's front
        end, cut or padded to the frames of its grid. Without a front end: ``encoder.inputs``."""
        encoder = next(iter(self.encoders().values()))
        frames = None
        if isinstance(encoder, SpectrogramEncoder):
            frames = encoder.grid.time * encoder.patch
        with torch.no_grad():
            return encoder.inputs(batch.waves, batch.lengths, frames=frames)

    def speed_up(
        self,
        *,
        compile: Literal["off", "blocks", "whole", "cudagraphs"] = "off",
        recompute: bool = False,
    ) -> None:
        """Enables compilation and checkpointing; numbers and state-dict names are unchanged.

        ``compile``: ``blocks``, each block; ``whole``, the front end and each of ``graphs`` as one
        graph with static shapes; ``cudagraphs``, the latter replayed as CUDA graphs.
        ``recompute``: recompute trained blocks in the backward pass.
        """
        for block in blocks_of(self):
            block.recompute = recompute and any(p.requires_grad for p in block.parameters())
            if compile == "blocks":
                block.compile(dynamic=False)  # there are few shapes, each gets its own graph
        if compile in ("off", "blocks"):
            return
        if not self.graphs:
            raise UserError(
                f"hardware.compile={compile}: {type(self).__name__} names no graphs to compile; "
                "say hardware.compile=blocks"
            )
        mode = "reduce-overhead" if compile == "cudagraphs" else "default"
        front = getattr(next(iter(self.encoders().values())), "frontend", None)
        if front is not None:
            front.compile(dynamic=False)
        for name in self.graphs:
            whole = torch.compile(getattr(self, name), dynamic=False, mode=mode)
            setattr(self, name, whole)


class Student(nn.Module):
    """Encoder and decoder under the names of the paper's weight files. The training checkpoints of
    an objective that keeps them as ``self.student`` can be loaded as an encoder."""

    def __init__(self, encoder: MaskableEncoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def predict(self, spectrogram: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Returns the class tokens (rows, D) of masked views and the predictions (rows, m, P) of
        ``views.predict_ids``. ``spectrogram``: (B, 1, frames, mels); ``rows = B * V``."""
        if isinstance(self.decoder, CrossDecoder):
            layers = torch.stack([*self.encoder.view_layers(spectrogram, views)])
            return layers[-1, :, 0], self.decoder(layers, views)
        cls, visible = self.encoder.encode_views(spectrogram, views)
        return cls, self.decoder(visible, views)


def transformer_decoder(encoder: MaskableEncoder, *, cross: bool, **sizes: Any) -> nn.Module:
    """Builds a ``ViTDecoder`` of the encoder's kind of blocks, or a ``CrossDecoder``.

    ``sizes``: keywords that both take (width, depth, heads, mlp_ratio, out_width).
    """
    kind: dict[str, Any] = {"pos_layout": encoder.pos_layout, "attention": encoder.attention}
    if cross:
        return CrossDecoder(encoder.width, encoder.depth, encoder.grid, **kind, **sizes)
    return ViTDecoder(encoder.width, encoder.grid, gate=encoder.gate, **kind, **sizes)


def maskable(encoder: Encoder, objective: str) -> MaskableEncoder:
    """Returns ``encoder`` if it can encode a part of its patches, else raises ``UserError``."""
    if not isinstance(encoder, MaskableEncoder):
        raise UserError(
            f"objective {objective} hides patches, which {type(encoder).__name__} cannot do (it is "
            "no MaskableEncoder): choose another model.backbone or objective"
        )
    return encoder


def check_encoders(objective: Objective) -> None:
    """Raise ``UserError`` unless ``encoders()`` names a student, and a teacher or nothing else."""
    encoders = objective.encoders()
    if "student" not in encoders or not {"student", "teacher"}.issuperset(encoders):
        raise UserError(
            f"{type(objective).__name__}.encoders() must return {{'student': encoder}}, and "
            f"'teacher' if there is one; it returns {', '.join(map(repr, encoders)) or 'none'}"
        )


def check_scalars(objective: Objective, scalars: Any) -> dict[str, Tensor]:
    """Returns what ``forward`` has returned, or raises ``UserError`` if that is not scalars."""
    name = f"{type(objective).__name__}.forward"
    if not isinstance(scalars, dict) or "loss" not in scalars:
        raise UserError(f"{name} must return a dictionary with 'loss'")
    for key, value in scalars.items():
        if not isinstance(value, Tensor) or value.ndim:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name} returns {shape} as {key!r}: each entry is a 0-dim tensor")
    return scalars


def find_objective(name: str) -> type[Objective]:
    """Returns the class of objective ``name``: a file of this folder, or a dotted ``module.Class``.

    Raises ``UserError`` naming the known ones, or the problem with an external class.
    """
    found = registry.find_class(name, Objective, folder="objectives", key="objective.name")  # type: ignore[type-abstract]
    config = found.Config
    if not issubclass(config, Objective.Config) or "__dataclass_fields__" not in vars(config):
        raise UserError(f"{name}.Config must be a @dataclass, a subclass of Objective.Config")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"{name} lacks {', '.join(missing)}: docs/add_an_objective.md says what")
    return found
