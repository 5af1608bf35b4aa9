"""Base classes of encoders, which map waveforms to the tokens of all blocks."""

from __future__ import annotations

import abc
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from bat import registry
from bat.audio.frontend import at_least
from bat.errors import UserError
from bat.nn.attention import Backend, take
from bat.nn.embed import PosLayout
from bat.types import Features, Grid, Views

Samples = TypeVar("Samples", int, Tensor)
"""A number of samples, or one for each clip, (B,)."""


class Encoder(nn.Module, abc.ABC):
    """Base class of audio encoders, which map waveforms to the tokens of all blocks.

    It divides time in steps of ``hop_seconds`` ("time patches", T of them) and frequency in F
    patches; an encoder without a frequency axis has F = 1. Guide: docs/add_an_encoder.md.

    Attributes: ``sample_rate`` (Hz), ``width`` D, ``depth`` L (blocks whose tokens it returns),
    ``has_cls`` (it has a class token), ``has_queries`` (it implements ``query_blocks``), ``heads``
    (of attention, or None), ``max_patches`` (maximum time patches at once: longer clips are encoded
    in chunks; None: no limit).
    """

    sample_rate: int
    width: int
    depth: int
    heads: int | None = None
    max_patches: int | None = None
    has_cls: bool
    has_queries: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def hop_seconds(self) -> float:
        """Seconds from one time patch to the next."""

    @abc.abstractmethod
    def inputs(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Tensor:
        """Maps (B, S) or (S,) at ``sample_rate`` to the input of ``features``, (B, ...), float32.

        This part is not trained and runs without autocast: a log-mel, or the scaled samples.

        Args:
            waveform: one clip a row, padded on the right.
            lengths: (B,) samples of each row; None: all S. Row i equals clip i encoded alone, in
                the part that ``first(inputs, time_patches(lengths[i]))`` keeps.
            frames: cut or pad each clip to this number of frames (``SpectrogramEncoder``).
        """

    @abc.abstractmethod
    def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
        """Returns the tokens of all blocks for ``inputs`` of clips of one length.

        ``entry``: also return the input of the first block and each chunk's class tokens; only for
        encoders with ``has_queries``.
        """

    @abc.abstractmethod
    def time_patches(self, samples: Samples) -> Samples:
        """Returns the time patches T of clips of ``samples`` samples encoded alone, at least 1."""

    @abc.abstractmethod
    def first(self, inputs: Tensor, patches: int) -> Tensor:
        """Returns the part of ``inputs`` that the first ``patches`` time patches are made of."""

    @classmethod
    @abc.abstractmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds from a state dict, strictly. ``config`` None: infer the shape from the tensors."""

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """Returns True if another project's weights hold this encoder (default: False).

        Args:
            names: of the tensors, without prefixes that wrappers gave to all (``bat.weights``).
            settings: ``config.json`` of the folder, or the mapping stored beside the weights
                (``cfg``, ``config``, ``args``); empty if there is none.
        """
        return False

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from another project's weights, names as published, strictly.

        ``settings``: see ``matches``. ``path``: the file or folder, for messages. ``heads``:
        attention heads, if the caller states them. Default: ``from_weights`` without ``config``.
        """
        return cls.from_weights(state, config=None, heads=heads)

    @classmethod
    def open(cls, name: str, *, trust_remote_code: bool) -> Self | None:
        """Returns the encoder ``ENCODER:name`` if this class reads it by itself (the default: None,
        ``bat.weights`` reads the file or folder). ``trust_remote_code``: code in it may be run."""
        return None

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns keywords that rebuild this encoder (JSON values)."""

    def layer_of(self, name: str) -> int:
        """Returns the layer of parameter ``name`` for layer-wise rates: 0 embedding, b + 1 block b,
        L + 1 the rest. Default: ``blocks.B.*`` by their number, others are the embedding."""
        found = re.match(r"blocks\.(\d+)\.", name)
        return int(found[1]) + 1 if found else 0

    def no_weight_decay(self) -> set[str]:
        """Returns names of parameters without decay in fine-tuning, besides the 1-D ones."""
        return set()

    def query_blocks(self, queries: Tensor, features: Features) -> Tensor:
        """Runs ``queries`` (L, q, D) through the frozen blocks -> (L, B, q, D). Queries of block l
        attend to the tokens that enter it, no token attends to them; only queries get gradients.

        ``features``: result of ``features(..., entry=True)``. Raises ``UserError`` if the encoder
        does not define it.
        """
        raise UserError(
            f"{type(self).__name__} has no query_blocks: vqt is not defined for this encoder"
        )

    def forward(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Features:
        """Maps (B, S) float32 at ``sample_rate`` to ``Features`` of all blocks.

        Args:
            waveform: one clip a row, padded on the right.
            lengths: (B,) samples of each row; None: all S. Padding of clips of several
                lengths has no effect: row i equals clip i encoded alone (up to rounding) in its
                first ``valid[i]`` time patches, and is zero after them.
            frames: cut or pad each clip to this number with zero frames, which the encoder
                attends to as it does to sound (the papers' protocol).
        """
        inputs = self.inputs(waveform, lengths, frames=frames)
        if frames is not None or lengths is None:
            return self.features(inputs)
        S = waveform.shape[-1]
        own = self.time_patches(lengths.clamp(1, S))
        return self.features_alone(inputs, own, total=self.time_patches(S))

    def embed(self, clips: Any, *, sample_rate: int | None = None, **how: Any) -> Any:
        """Embeds clips where the encoder is, without gradient, batched by itself: ``bat.embed``.

        Args:
            clips: NumPy or torch: one clip (S,), a batch (B, S), or a list of clips (S,) of any
                lengths, floats in [-1, 1]; or paths.
            sample_rate: of waveforms, Hz; they are resampled to the encoder's.
            how: as for ``bat.embed``: ``level="frame"``, ``layer="all"``, ``pool="mean"``,
                ``window=10.0``, ``batch=32``, ...

        Returns:
            (n, D) float32 NumPy, (n, L, D) for all blocks; a list of (T_i, D) at frame level or
            with windows.

        Raises:
            UserError: naming clips that are stereo, not finite, of unknown rate or unreadable.
        """
        import bat

        return bat.embed(clips, self, sample_rate=sample_rate, **how)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.parameters())
        return (
            f"{type(self).__name__}({in_units(size)} parameters, {self.sample_rate / 1000:g} kHz, "
            f"{self.depth} blocks x {self.width}, {1 / self.hop_seconds:.4g} frames/s, "
            f"{'' if self.has_cls else 'no '}class token)"
        )

    def features_alone(
        self, inputs: Tensor, patches: Tensor, *, total: int | None = None, entry: bool = False
    ) -> Features:
        """Returns ``features`` of clips of several lengths, without effect of their padding.

        Rows of equal length run together. ``patches`` (B,): valid time patches of each row of
        ``inputs``, at least 1. ``total``: T of the result, at least ``patches.max()``, the
        default.
        """
        extra = {"entry": True} if entry else {}
        of_row = patches.tolist()
        T = max(of_row) if total is None else total
        if set(of_row) == {T}:
            return self.features(self.first(inputs, T), **extra)
        chunks = 1 if self.max_patches is None else -(-T // self.max_patches)
        whole: dict[str, Tensor] = {}

        def put(name: str, part: Tensor | None, rows: Tensor, axis: int, size: int) -> None:
            """Writes ``part`` to its ``rows`` along ``axis`` of a zero tensor of all clips; the
            next axis has ``size`` entries."""
            if part is None:
                return
            if name not in whole:
                shape = (*part.shape[:axis], len(of_row), size, *part.shape[axis + 2 :])
                whole[name] = part.new_zeros(shape)
            own = whole[name].narrow(axis + 1, 0, part.shape[axis + 1])
            own.index_copy_(axis, rows, part)

        for own in sorted(set(of_row)):
            rows = (patches == own).nonzero().squeeze(1).to(inputs.device)
            found = self.features(self.first(inputs[rows], own), **extra)
            put("patches", found.patches, rows, 1, T)
            put("cls", found.cls, rows, 1, self.width)
            put("entry", found.entry, rows, 0, T)
            if entry and chunks > 1 and found.cls is not None:
                pieces = found.cls.unsqueeze(2) if found.pieces is None else found.pieces
                put("pieces", pieces, rows, 1, chunks)
        valid = patches.to(inputs.device, torch.int64)
        return Features(
            whole["patches"], whole.get("cls"), whole.get("entry"), whole.get("pieces"), valid
        )


class SpectrogramEncoder(Encoder):
    """Base class of encoders of spectrogram patches.

    Attributes: ``frontend`` (waveform to (B, 1, frames, mels), such as ``bat.audio.LogMel``),
    ``patch`` (frames of a patch), ``step`` (frames from one time patch to the next; default:
    ``patch``), ``grid`` (patches of one chunk; longer clips are split).
    """

    frontend: nn.Module
    patch: int
    grid: Grid

    @property
    def max_patches(self) -> int | None:  # type: ignore[override]
        """Time patches per chunk."""
        return self.grid.time

    @property
    def hop_seconds(self) -> float:
        return float(self.step * self.frontend.hop_length / self.sample_rate)  # type: ignore[operator]

    @property
    def step(self) -> int:
        return self.patch

    def patches_of(self, frames: int) -> int:
        """Returns the time patches of a spectrogram of ``frames`` frames."""
        return 1 + (frames - self.patch) // self.step

    def frames_of(self, patches: Any) -> Any:
        """Returns the frames that ``patches`` time patches (a number or a tensor) are made of."""
        return self.patch + (patches - 1) * self.step

    def inputs(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Tensor:
        """Maps (B, S) or (S,) at ``sample_rate`` to (B, 1, frames, mels) float32.

        ``frames`` None: as many as S samples give, rounded up to whole patches; row i then equals
        clip i alone in its first ``time_patches(lengths[i])`` patches, and is zero after them.
        """
        waveform = torch.atleast_2d(waveform)
        if waveform.dim() != 2:
            raise ValueError(f"waveform must be (B, S) or (S,), not {tuple(waveform.shape)}")
        if frames is not None:
            return self.frontend(waveform, frames=frames, lengths=lengths)
        frames = self.frames_of(self.time_patches(waveform.shape[1]))
        if lengths is None:
            return self.frontend(waveform, frames=frames)
        own = self.frames_of(self.time_patches(lengths.clamp(1, waveform.shape[1])))
        return self.frontend(waveform, frames=frames, lengths=lengths, row_frames=own)

    def time_patches(self, samples: Samples) -> Samples:
        """Returns the time patches of clips of ``samples`` samples encoded alone; the last may be
        partly zero frames."""
        front: Any = self.frontend
        frames: Samples = front.valid_frames(front.padded_samples(samples))
        more = at_least(frames - self.patch, 0)  # beyond the first; no negative number: in ONNX
        return 1 + (more + self.step - 1) // self.step  # division rounds towards zero

    def first(self, inputs: Tensor, patches: int) -> Tensor:
        """Returns the frames of the first ``patches`` time patches of (B, 1, frames, mels)."""
        return inputs[:, :, : self.frames_of(patches)]

    def query_alone(self, queries: Tensor, features: Features, valid: Tensor) -> Tensor:
        """Runs ``query_blocks`` on clips of several lengths, those of one length together."""
        patches, cls, entry, pieces, _ = features
        assert entry is not None, "features(..., entry=True)"
        parts, order = [], []
        for own in valid.unique().tolist():
            rows = (valid == own).nonzero().squeeze(1)
            P = -(-own // self.grid.time)
            alone = Features(
                patches[:, rows, :own],
                None if cls is None else cls[:, rows],
                entry[rows, :own],
                None if pieces is None or P == 1 else pieces[:, rows, :P],
            )
            parts.append(self.query_blocks(queries, alone))
            order.append(rows)
        return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()]


class MaskableEncoder(SpectrogramEncoder):
    """Base class of encoders that can encode a part of the patches, as masking objectives
    require. ``gate``, ``pos_layout`` and ``attention`` are settings for a decoder of the same kind
    (``bat.nn.decoder``)."""

    gate: bool = False
    pos_layout: PosLayout = "grid"
    attention: Backend = "auto"

    @abc.abstractmethod
    def embed_patches(self, spectrogram: Tensor) -> Tensor:
        """Embeds (B, 1, frames, mels) as (B, N, D) patch tokens with their position code."""

    @abc.abstractmethod
    def layers(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs the blocks over (B, n, D) embedded tokens with the class token prepended.

        Yields the end-of-block tokens and the MLP outputs of each block, both
        (B, 1 + n, D), so that a caller keeps only what it needs.
        """

    def view_layers(self, spectrogram: Tensor, views: Views) -> Iterator[Tensor]:
        """Yields the tokens (rows, 1 + n, D) of masked views after each block, class token first.

        ``spectrogram``: (B, 1, frames, mels); ``views``: ``rows = B * V`` masks, clip-major.
        Patches are embedded once a clip and gathered for each view.
        """
        tokens = self.embed_patches(spectrogram)  # (B, N, D)
        rows, n = views.keep_ids.shape
        visible = take(tokens, views.keep_ids.view(len(tokens), -1))  # (B, V n, D)
        for out, _mlp in self.layers(visible.view(rows, n, -1)):
            yield out

    def encode_views(self, spectrogram: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Returns the last block's class tokens (rows, D) and visible patch tokens (rows, n, D) of
        ``view_layers``."""
        for out in self.view_layers(spectrogram, views):  # only the last one is used
            last = out
        return last[:, 0], last[:, 1:]


def in_units(number: int) -> str:
    """Formats a number of parameters: ``86.9 M``, ``12.3 k``."""
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number / 1e3:.1f} k"


def find_encoder(name: str) -> type[Encoder]:
    """Returns the class of encoder ``name``: a file of ``bat/encoders``, or a dotted
    ``module.Class`` that is imported. Raises ``UserError`` listing the known ones."""
    return registry.find_class(name, Encoder, folder="encoders", key="encoder")  # type: ignore[type-abstract]
