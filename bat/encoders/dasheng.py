"""Dasheng's encoder: a pre-norm ViT on frames of 40 ms, without class token or frequency axis.

Front end (``bat.audio.frontend.DbMel``): 64 mel bins, windows of 32 ms every 10 ms, decibels not
below 120 dB under the clip's maximum; then a batch norm of each bin (``init_bn``). A token is 4
frames of all bins (F = 1); a learned code of its time and one for all frequencies are added.
Clips of more than 252 tokens (10 s) are encoded in chunks, the last one shorter, as the package
``dasheng`` 0.0.9 does. Clip embedding: mean over time.

Files: ``{model, config}`` of Zenodo (front end's tables and ``num_batches_tracked`` left out), and
hub folders, whose names have ``encoder.`` in front (a fine-tuned one's ``outputlayer`` left out).

Departures: the floor is the clip's, where torchaudio takes the batch's maximum, so that a clip does
not depend on its batch; ``init_bn`` uses its running statistics in training too, for the same
reason. Clips below 30 ms are padded with zero samples to one token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.audio.frontend import DbMel
from bat.encoders.base import Samples
from bat.encoders.bat import MAX_TOKENS
from bat.encoders.strict import build_strictly, check_settings, demand
from bat.encoders.vit import Shape, ViT, shape_of, without
from bat.errors import UserError
from bat.nn.block import init_linears
from bat.nn.embed import BandEmbed

MELS, STEP = 64, 4
"""Mel bins, and frames of a token."""
FIXED = {
    **{"n_fft": 512, "win_size": 512, "hop_size": 160, "n_mels": MELS, "f_min": 0, "f_max": 8000},
    **{"center": True, "top_db": 120, "qkv_bias": True, "init_values": None},
    **{"patch_size": [MELS, STEP], "patch_stride": [MELS, STEP]},
}
"""Fixed settings, with the names of ``config`` in the files."""
ROOT = "encoder."
LEFT_OUT = ("front_end.", "init_bn.1.num_batches_tracked", "outputlayer.")
"""Beginnings of the names that are no part of the encoder."""


class RunningNorm(nn.Module):
    """Batch norm by its running statistics, also in training: (B, C, n) -> (B, C, n)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Dasheng(ViT):
    """Dasheng's encoder; the defaults are Base."""

    has_cls = False
    learned = ("time_pos_embed", "freq_pos_embed")
    sample_rate = 16000

    def __init__(
        self,
        *,
        tokens: int = 252,
        **shape: Unpack[Shape],
    ) -> None:
        """``tokens``: of one chunk. Raises ``UserError`` for settings of the wrong type or out of
        range."""
        super().__init__(own={"tokens": tokens}, **shape)
        check_settings("encoder", {"tokens": tokens}, {"tokens": (int, 1, MAX_TOKENS)})
        self.max_patches = tokens
        self.frontend = DbMel(
            n_fft=512,
            n_mels=MELS,
            pad="clip",
            clip_seconds=160 * (STEP - 1) / self.sample_rate,
            crop="spectrogram",
        )
        self.init_bn = nn.ModuleDict({"1": RunningNorm(MELS)})
        self.patch_embed = BandEmbed((MELS, STEP), self.width)
        self.time_pos_embed = nn.Parameter(0.02 * torch.randn(1, self.width, 1, tokens))
        self.freq_pos_embed = nn.Parameter(0.02 * torch.randn(1, self.width, 1, 1))
        init_linears(self)

    @property
    def hop_seconds(self) -> float:
        return STEP * self.frontend.hop_length / self.sample_rate

    def time_patches(self, samples: Samples) -> Samples:
        """Returns the tokens of clips of ``samples`` samples; the last frames may be in none."""
        frames = self.frontend.valid_frames(self.frontend.padded_samples(samples))
        patches: Samples = frames // STEP
        return patches

    def inputs(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Tensor:
        """Maps (B, S) or (S,) to decibels (B, 1, frames, 64); see ``Encoder.inputs``."""
        if frames is not None:
            raise UserError(f"frames={frames}: Dasheng takes clips at their own length")
        waveform = torch.atleast_2d(waveform)
        frames = STEP * self.time_patches(waveform.shape[-1])
        spectrogram: Tensor = self.frontend(waveform, frames, lengths)
        return spectrogram

    def first(self, inputs: Tensor, patches: int) -> Tensor:
        return inputs[:, :, : patches * STEP]

    def embed_patches(self, inputs: Tensor) -> Tensor:
        x = self.init_bn["1"](inputs[:, 0].transpose(1, 2))  # (B, 64, frames)
        x = self.patch_embed(x.transpose(1, 2)[:, None])  # (B, T, 1, D)
        code = self.time_pos_embed[..., : x.shape[1]] + self.freq_pos_embed  # (1, D, 1, T)
        return x + code.permute(0, 3, 2, 1)

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """See ``Encoder.matches``."""
        marks = ("time_pos_embed", "freq_pos_embed", "init_bn.1.running_var")
        return any({root + n for n in marks} <= set(names) for root in ("", ROOT))

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from Zenodo's files or hub folders; see ``Encoder.from_file``."""
        given = settings.get("encoder_kwargs")  # hub folders have them in there
        given = {**settings, **(given if isinstance(given, dict) else {})}
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        demand(given, FIXED, str(path))
        state = without({n.removeprefix(ROOT): t for n, t in state.items()}, *LEFT_OUT)
        heads = given.get("num_heads") if heads is None else heads
        keywords = shape_of(state, {"time_pos_embed": 4}, path=path, kind="Dasheng", heads=heads)
        keywords["tokens"] = state["time_pos_embed"].shape[3]
        return build_strictly(cls, keywords, state, str(path))


ENCODER = Dasheng
