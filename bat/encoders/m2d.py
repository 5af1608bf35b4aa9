"""M2D's encoder: a pre-norm ViT on patches of a Slaney mel spectrogram.

Front end (``bat.audio.frontend.LnMel``): 80 bins from 50 Hz, windows of 25 ms every 10 ms,
``(ln(x + 2^-23) - mean) / std`` with the weight file's ``norm_stats``; zero frames after that up to
a whole patch. The patches of 608 frames are (T, F) = (38, 5), and other sizes of the published
files are read from their tensors: ``80x1001p16x16``, ``80x200p16x4``, ``80x608p80x2``. The files
are frequency-major: row ``1 + T f + t`` of the position table belongs to patch (t, f), and the
convolution has frequency first. Longer clips are encoded in chunks, as published.

The class token takes part in attention and is not used: ``has_cls`` is False. The published clip
embedding joins the F patches of a time (3,840 numbers) and averages over time.

``norm_stats`` (mean, deviation) is a setting here, not a weight; files of 2022 have none and take
-7.1 / 4.2, and their names are AudioMAE's, so they are read as ``m2d:FILE``. A file with ``p32k``
in its name or its folder's is one for 32 kHz: no tensor says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from bat.audio.frontend import LnMel
from bat.encoders.base import SpectrogramEncoder
from bat.encoders.strict import build_strictly, check_settings
from bat.encoders.vit import Shape, ViT, make_grid, make_pad, shape_of, without
from bat.errors import UserError
from bat.nn.block import init_linears
from bat.nn.embed import BandEmbed, position_code
from bat.types import Grid

NORM_STATS = (-7.1, 4.2)
"""Mean and deviation for files without ``norm_stats``."""
MELS = 80
PREFIX = "ar.runtime.backbone."
"""Prefix in files fine-tuned with EVAR, below ``module.``."""
LEFT_OUT = (
    *("decoder_embed.", "mask_token", "decoder_pos_embed", "decoder_blocks.", "decoder_norm."),
    *("decoder_pred.", "target_blocks.", "target_norm.", "offline_predictor.", "audio_proj."),
    *("text_proj.", "head."),
)
"""Beginnings of the names that are no part of the encoder."""


class M2D(ViT, SpectrogramEncoder):
    """M2D's encoder; the defaults are Base on 80 x 608 in patches of 16 x 16."""

    has_cls = False

    def __init__(
        self,
        *,
        grid: Grid = Grid(38, 5),  # noqa: B008  (frozen)
        patch: Sequence[int] = (16, 16),
        norm_stats: Sequence[float] = NORM_STATS,
        sample_rate: int = 16000,
        frontend: dict[str, Any] | None = None,
        **shape: Unpack[Shape],
    ) -> None:
        """``grid``: patches of one chunk. ``patch``: mel bins and frames of a patch.
        ``norm_stats``: mean and deviation of the front end. ``frontend``: its ``pad`` and
        ``clip_seconds``. Raises ``UserError`` for settings of the wrong type or out of range.
        """
        own: dict[str, Any] = {"grid": grid, "sample_rate": sample_rate, "frontend": frontend}
        for name, pair, kind in (("patch", patch, int), ("norm_stats", norm_stats, float)):
            if not isinstance(pair, list | tuple) or [type(x) for x in pair] != [kind, kind]:
                raise UserError(f"encoder: {name}={pair!r}: two numbers ({kind.__name__})")
            own[name] = list(pair)
        super().__init__(own=own, **shape)
        self.grid, (bins, self.patch) = make_grid(grid), patch
        check_settings("encoder", {"sample_rate": sample_rate}, {"sample_rate": (int, 8000, 96000)})
        if min(patch) < 1 or self.grid.freq * bins != MELS:
            raise UserError(f"encoder: {grid} of patches {patch}: not {MELS} mel bins in all")
        self.sample_rate = sample_rate
        self.frontend = LnMel(
            mean=norm_stats[0],
            std=norm_stats[1],
            sample_rate=sample_rate,
            n_fft=sample_rate // 40,
            hop_length=sample_rate // 100,
            n_mels=MELS,
            f_min=50.0,
            slaney=True,
            **make_pad(frontend),
        )
        self.patch_embed = BandEmbed((bins, self.patch), self.width)
        T, F = self.grid.time, self.grid.freq
        code = position_code(self.width, self.grid, "grid").unflatten(1, (T, F))  # (1, T, F, D)
        code = torch.cat([torch.zeros(1, 1, self.width), code.transpose(1, 2).flatten(1, 2)], dim=1)
        self.register_buffer("pos_embed", code)  # (1, 1 + F T, D), frequency-major
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.width))
        init_linears(self)

    def embed_patches(self, inputs: Tensor) -> Tensor:
        x = self.patch_embed(inputs)  # (B, T, F, D)
        code = self.pos_embed[:, 1:].unflatten(1, (self.grid.freq, -1)).transpose(1, 2)  # type: ignore[index]
        return x + code[:, : x.shape[1]]

    def leading(self) -> Tensor:
        return self.cls_token + self.pos_embed[:, :1]  # type: ignore[index]

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """See ``Encoder.matches``. A file of 2022 without decoder is taken for AudioMAE's."""
        marks = {"norm_stats", "target_blocks.0.norm1.weight"}
        backbone = f"{PREFIX}cls_token"
        return backbone in names or ("cls_token" in names and not marks.isdisjoint(names))

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from an encoder alone, a training file or a fine-tuned one; see
        ``Encoder.from_file``."""
        what = f"{path}, as M2D"
        state = {n.removeprefix(PREFIX): t for n, t in without(state, *LEFT_OUT).items()}
        stats = state.pop("norm_stats", torch.tensor(NORM_STATS, dtype=torch.float64))
        if stats.shape != (2,):
            raise UserError(f"{what}: norm_stats of shape {tuple(stats.shape)}, not (2,)")
        needed = {"pos_embed": 3, "patch_embed.proj.weight": 4}
        keywords = shape_of(state, needed, path=path, kind="M2D", heads=heads)
        bins, frames = state["patch_embed.proj.weight"].shape[2:]
        rows, freq = state["pos_embed"].shape[1] - 1, MELS // bins
        if MELS % bins or rows < freq or rows % freq:
            raise UserError(
                f"{what}: pos_embed of {rows + 1} rows for patches of {bins} mel bins of {MELS}"
            )
        wide = "p32k" in path.name or "p32k" in path.parent.name
        keywords |= {
            "grid": Grid(rows // freq, freq),
            "patch": (bins, frames),
            "norm_stats": stats.tolist(),
            "sample_rate": 32000 if wide else 16000,
        }
        return build_strictly(cls, keywords, state, str(path))


ENCODER = M2D
