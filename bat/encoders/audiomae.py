"""AudioMAE's encoder: a pre-norm ViT on 16 x 16 patches of the Kaldi filter bank.

Front end: Kaldi filter bank with AudioMAE's own statistics, zero frames before standardising. The
patches of 1024 frames are (T, F) = (64, 8). The position code is fixed; its table is made on an
(F, T) grid and added to time-major tokens (``pos_layout="reference"`` of ``bat.nn.embed``), so the
file's own table is used, row ``1 + 8 t + f`` for patch (t, f). Row 0, of the class token, is zero.

The class token has no loss in AudioMAE's training: the mean of the patches is its usual embedding.
Files: pre-training (the decoder is left out), fine-tuned (``fc_norm`` after pooling instead of
``norm``: no norm over tokens), timm's ports. Licence of the published weights: CC-BY-NC 4.0.

Departures: clips shorter than 1024 frames use the first rows of the table (``frames=1024`` pads
them as published), longer ones are encoded in chunks of 1024 frames (nothing is published).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from bat.encoders.base import SpectrogramEncoder
from bat.encoders.strict import build_strictly, keywords_of, make_frontend
from bat.encoders.vit import Shape, ViT, make_grid, shape_of, without
from bat.errors import UserError
from bat.nn.block import init_linears
from bat.nn.embed import PatchEmbed, position_code
from bat.types import Grid

FRONTEND = {"kind": "eat", "statistics": "audioset-ast", "pad": "fbank"}
PATCH = 16
OWN = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
FOREIGN = {
    *("pre_norm.weight", "blocks.0.attn.gate.weight"),  # BAT
    *("norm_stats", "target_blocks.0.norm1.weight", "dist_token"),  # M2D, AST
}
LEFT_OUT = ("decoder_", "mask_token", "head.", "fc_norm.")
"""Beginnings of the names of a pre-training file's decoder and a fine-tuned file's classifier."""


class AudioMAE(ViT, SpectrogramEncoder):
    """AudioMAE's encoder; the defaults are Base."""

    has_cls = True

    def __init__(
        self,
        *,
        grid: Grid = Grid(64, 8),  # noqa: B008  (frozen)
        norm: bool = True,
        frontend: dict[str, Any] | None = None,
        **shape: Unpack[Shape],
    ) -> None:
        """``grid``: patches of one chunk. ``norm``: a last norm over tokens. ``frontend``: keywords
        of ``make_frontend``. Raises ``UserError`` for settings of the wrong type or out of range.
        """
        super().__init__(
            own={"grid": grid, "norm": norm, "frontend": frontend}, last_norm=norm, **shape
        )
        self.patch, self.grid = PATCH, make_grid(grid)
        given = {**FRONTEND, "n_mels": self.grid.freq * PATCH, **(frontend or {})}
        self.frontend = make_frontend(**keywords_of(make_frontend, given, "frontend"))
        if self.frontend.n_mels != self.grid.freq * PATCH:
            raise UserError(f"encoder: n_mels={self.frontend.n_mels} for {self.grid}: omit n_mels")
        self.sample_rate = int(self.frontend.sample_rate)  # type: ignore[arg-type]
        self.patch_embed = PatchEmbed(PATCH, self.width)
        code = position_code(self.width, self.grid, "reference")
        self.register_buffer("pos_embed", torch.cat([torch.zeros(1, 1, self.width), code], dim=1))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.width))
        init_linears(self)

    def embed_patches(self, inputs: Tensor) -> Tensor:
        x = self.patch_embed(inputs)  # (B, N, D), time-major
        x = x + self.pos_embed[:, 1 : 1 + x.shape[1]]  # type: ignore[index]
        return x.unflatten(1, (-1, self.grid.freq))

    def leading(self) -> Tensor:
        return self.cls_token + self.pos_embed[:, :1]  # type: ignore[index]

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """See ``Encoder.matches``. M2D's files of 2022 have these names too and are refused by
        their position table."""
        return set(names) >= OWN and FOREIGN.isdisjoint(names) and "model_type" not in settings

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from AudioMAE's files or timm's ports; see ``Encoder.from_file``."""
        state, freq = without(state, *LEFT_OUT), 8
        keywords = shape_of(state, {"pos_embed": 3}, path=path, kind="AudioMAE", heads=heads)
        rows = state["pos_embed"].shape[1]
        if rows < 1 + freq or (rows - 1) % freq:
            raise UserError(
                f"{path} is no AudioMAE file: its position table pos_embed has {rows} rows, not 1 "
                f"and {freq} for each time patch. M2D's files of 2022 have the same names: say "
                f"m2d:{path}"
            )
        keywords |= {"grid": Grid((rows - 1) // freq, freq), "norm": "norm.weight" in state}
        return build_strictly(cls, keywords, state, str(path))


ENCODER = AudioMAE
