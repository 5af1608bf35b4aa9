"""Base class of the front ends: checks, crops, pads and masks in float32.

See ``frontend`` for the meaning of the settings ``pad`` and ``crop``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.errors import UserError

Pad = Literal["spectrogram", "waveform", "clip"]
Crop = Literal["waveform", "spectrogram"]


class FrontEnd(nn.Module, abc.ABC):
    """Base of the two front ends: the call, cropping and padding, the float32 tables.

    Attributes:
        sample_rate: Hz the waveform must have.
        hop_length: samples from frame to frame.
        n_mels: mel bands.
        clip_samples: samples that ``pad="clip"`` pads to, else 0.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        hop_length: int,
        n_mels: int,
        pad: Pad,
        crop: Crop,
        clip_seconds: float | None,
    ) -> None:
        super().__init__()
        for name, value, known in (("pad", pad, Pad), ("crop", crop, Crop)):
            if value not in get_args(known):
                raise UserError(f"{name}={value!r}: one of {', '.join(get_args(known))}")
        if (pad == "clip") != (clip_seconds is not None):
            raise UserError(
                f"pad={pad!r} with clip_seconds={clip_seconds}: pad='clip' pads to clip_seconds, "
                "and nothing else uses them"
            )
        if clip_seconds is not None and not 0 < clip_seconds < math.inf:
            raise UserError(f"clip_seconds={clip_seconds}: a positive number of seconds")
        for name, number in (
            ("sample_rate", sample_rate),
            ("hop_length", hop_length),
            ("n_mels", n_mels),
        ):
            if number < 1:
                raise UserError(f"{name}={number}: at least 1")
        self.sample_rate = sample_rate
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.pad = pad
        self.crop = crop
        self.clip_samples = round((clip_seconds or 0) * sample_rate)

    def forward(
        self,
        waveform: Tensor,
        frames: int,
        lengths: Tensor | None = None,
        *,
        row_frames: Tensor | None = None,
    ) -> Tensor:
        """Returns the batch as spectrograms of ``frames`` frames.

        Args:
            waveform: (B, S) floating point in [-1, 1] at ``sample_rate``.
            frames: time frames of the result.
            lengths: (B,) integer, valid samples of each row (0 counts as 1); None: all S.
            row_frames: (B,) integer, at most ``frames``: the value of ``frames`` if each row were
                computed alone (``pad="waveform"`` pads to it); None: ``frames``.

        Returns:
            (B, 1, frames, n_mels) float32, zero beyond each clip's valid frames.

        Raises:
            UserError: a waveform that is not (B, S) floating point, ``frames`` below 1, ``lengths``
                that are not (B,).
        """
        _check(waveform, frames, lengths)
        with torch.autocast(waveform.device.type, enabled=False):
            x = waveform.to(self.window.dtype)  # (B, S)
            most = self.max_samples(frames)
            if self.crop == "waveform" and x.shape[1] > most:
                x = x[:, :most]
            if lengths is None:
                valid = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
            else:
                valid = lengths.to(x.device, torch.int64).clamp(1, x.shape[1])  # (B,)
                x = zero_beyond(x, valid)
            x = self._centre(x, valid)
            if self.pad == "waveform":
                x, full = extend(x, valid, (frames - 1) * self.hop_length)
                if row_frames is not None:
                    own = (row_frames.to(x.device, torch.int64) - 1) * self.hop_length
                    full = torch.maximum(valid, own)
                valid = full
            elif self.pad == "clip":
                fits = self.clip_samples if self.crop == "spectrogram" else most
                x, valid = extend(x, valid, min(self.clip_samples, fits))
            x, shown = self._transform(x, valid)  # (B, T, F), (B, T, 1)
            x = x.masked_fill(~shown, 0.0)
            # crops where frames are too many, appends zeros where too few
            return F.pad(x, (0, 0, 0, frames - x.shape[1])).unsqueeze(1)  # (B, 1, frames, F)

    @overload
    def valid_frames(self, lengths: int) -> int: ...

    @overload
    def valid_frames(self, lengths: Tensor) -> Tensor: ...

    def valid_frames(self, lengths: Tensor | int) -> Tensor | int:
        """Returns the frames of clips of ``lengths`` samples, before any cropping or padding."""
        return self._count(lengths)

    @overload
    def padded_samples(self, lengths: int) -> int: ...

    @overload
    def padded_samples(self, lengths: Tensor) -> Tensor: ...

    def padded_samples(self, lengths: Tensor | int) -> Tensor | int:
        """Returns the signal samples of clips of ``lengths`` samples after ``pad="clip"`` has
        padded them; else ``lengths``."""
        if isinstance(lengths, Tensor):
            return lengths.clamp(min=self.clip_samples)
        return max(lengths, self.clip_samples)

    @abc.abstractmethod
    def _count(self, lengths: Tensor | int) -> Tensor | int: ...

    @abc.abstractmethod
    def max_samples(self, frames: int) -> int:
        """Returns the samples beyond which a clip would have more than ``frames`` frames."""

    @abc.abstractmethod
    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms (B, S) to all frames (B, T, F), and a mask of the valid ones (B, T, 1)
        bool."""

    @abc.abstractmethod
    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns window and filter bank, float32."""

    def _centre(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x

    def _shown(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        return (steps < self.valid_frames(lengths)[:, None]).unsqueeze(-1)  # (B, T, 1)

    def _make_tables(self, device: torch.device | None = None) -> None:
        window, filters = self._tables(device or torch.get_default_device())
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrontEnd:
        # casting a model to bfloat16 must not round the tables, and leaving the meta device must
        # not leave them empty (they are in no state dict that could fill them)
        stale = self.window.is_meta
        super()._apply(fn, recurse)
        stale = stale or self.window.dtype not in (torch.float32, torch.float64)
        if stale and not self.window.is_meta:
            self._make_tables(self.window.device)
        return self


def _check(waveform: Tensor, frames: int, lengths: Tensor | None) -> None:
    if waveform.ndim != 2 or waveform.shape[1] < 1:
        raise UserError(f"waveform of shape {tuple(waveform.shape)}: give (clips, samples)")
    if not waveform.is_floating_point():
        raise UserError(f"waveform of {waveform.dtype}: give floating point in [-1, 1]")
    if frames < 1:
        raise UserError(f"frames={frames}: at least 1")
    if lengths is not None and lengths.shape != waveform.shape[:1]:
        raise UserError(f"lengths of shape {tuple(lengths.shape)} for {len(waveform)} clips")


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(beyond, 0.0)  # (B, S)


def extend(x: Tensor, lengths: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Pads clips shorter than ``samples`` with zeros up to there, which count as signal."""
    return F.pad(x, (0, max(0, samples - x.shape[1]))), lengths.clamp(min=samples)
