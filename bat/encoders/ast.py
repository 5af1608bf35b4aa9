"""The Audio Spectrogram Transformer (AST): a pre-norm ViT on overlapping patches.

Front end: Kaldi filter bank with AST's statistics, zero frames before standardising. Patches of 16
mel bins x 16 frames every 10 bins and 10 frames: (T, F) = (101, 12) in 1024 frames, so a time patch
is 160 ms long and the hop 100 ms. Class token and distillation token stand in front, with rows 0
and 1 of the learned position table (1, 2 + F T, D), which is frequency-major: row ``2 + T f + t``.
The clip's embedding (``cls``) is the mean of the two tokens, after the last norm in the last block.

Other lengths than the table's, as the original code builds its table for them: fewer time patches
take the middle columns, more take the table stretched bilinearly in time. (transformers' AST takes
1024 frames only: ``frames=1024`` pads as it does.) The frames of a clip are filled up to a whole
patch by zero frames.

Files: the original's (``module.v.*``) and transformers' of version 4 and 5, whose epsilon in norms
is 1e-12 (the original's 1e-6). A table of 12 time patches is the Speech Commands model's, and has
its statistics. AST was trained with labels: a supervised encoder in every comparison.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.encoders.base import SpectrogramEncoder
from bat.encoders.strict import build_strictly, check_settings, demand, keywords_of, make_frontend
from bat.encoders.vit import Shape, ViT, make_grid, shape_of, without
from bat.errors import UserError
from bat.nn.block import init_linears
from bat.nn.embed import BandEmbed
from bat.types import Grid

PATCH, STRIDE, MELS = 16, 10, 128
FREQ = 1 + (MELS - PATCH) // STRIDE
FRONTEND = {"kind": "eat", "statistics": "audioset-ast", "pad": "fbank", "n_mels": MELS}
SPEECH_COMMANDS = {"statistics": "speechcommands-ast"}
FIXED = {
    **{"patch_size": PATCH, "frequency_stride": STRIDE, "time_stride": STRIDE},
    **{"num_mel_bins": MELS, "qkv_bias": True, "hidden_act": "gelu"},
}
"""Fixed settings, with the names of transformers' ``config.json``."""
PREFIXES = ("audio_spectrogram_transformer.", "v.")
LEFT_OUT = ("classifier.", "mlp_head.", "head.", "head_dist.")
"""Beginnings of the classifiers' names."""
RENAMED = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+)\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"\1.attn.\2."),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.(?:output\.dense|mlp\.fc2)\.", r"\1.mlp.fc2."),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
)
"""Beginnings of transformers' names (of version 4 and 5) and of the original's, which are ours."""


class AST(ViT, SpectrogramEncoder):
    """The Audio Spectrogram Transformer; the defaults are Base, trained on AudioSet."""

    has_cls = True
    learned = ("cls_token", "dist_token", "pos_embed")
    max_patches = None
    step = STRIDE

    def __init__(
        self,
        *,
        grid: Grid = Grid(101, FREQ),  # noqa: B008  (frozen)
        eps: float = 1e-12,
        frontend: dict[str, Any] | None = None,
        **shape: Unpack[Shape],
    ) -> None:
        """``grid``: patches of the position table. ``eps``: of the norms. ``frontend``: keywords of
        ``make_frontend``. Raises ``UserError`` for settings of the wrong type or out of range.
        """
        check_settings("encoder", {"eps": eps}, {"eps": (float, 0, 1)})
        own = {"grid": grid, "eps": eps, "frontend": frontend}
        super().__init__(own=own, norm_eps=eps, **shape)
        self.patch, self.grid = PATCH, make_grid(grid)
        given = keywords_of(make_frontend, {**FRONTEND, **(frontend or {})}, "frontend")
        self.frontend = make_frontend(**given)
        if (self.grid.freq, self.frontend.n_mels) != (FREQ, MELS):
            raise UserError(f"encoder: {MELS} mel bins are {FREQ} patches, not {self.grid.freq}")
        self.sample_rate = int(self.frontend.sample_rate)  # type: ignore[arg-type]
        self.patch_embed = BandEmbed((PATCH, PATCH), self.width, stride=(STRIDE, STRIDE))
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + self.grid.tokens, self.width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.width))
        init_linears(self)
        for token in (self.pos_embed, self.cls_token, self.dist_token):
            nn.init.trunc_normal_(token, std=0.02)

    def embed_patches(self, inputs: Tensor) -> Tensor:
        x = self.patch_embed(inputs)  # (B, t, F, D)
        table = self.pos_embed[:, 2:].transpose(1, 2).unflatten(2, (FREQ, -1))  # (1, D, F, T)
        t, T = x.shape[1], self.grid.time
        if t < T:
            start = T // 2 - t // 2
            table = table[..., start : start + t]
        elif t > T:
            table = F.interpolate(table, (FREQ, t), mode="bilinear")
        return x + table.permute(0, 3, 2, 1)

    def leading(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1) + self.pos_embed[:, :2]

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """See ``Encoder.matches``."""
        marks = {"dist_token", "embeddings.distillation_token"}
        marks |= {prefix + name for prefix in PREFIXES for name in marks}
        return not marks.isdisjoint(names)

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from the original's files or transformers'; see ``Encoder.from_file``."""
        what = f"{path}, as AST"
        demand(settings, FIXED, str(path))
        published = any("embeddings." in name for name in state)  # by transformers
        state, given = rename(state), settings.get("num_attention_heads")
        heads = given if heads is None else heads
        keywords = shape_of(state, {"pos_embed": 3}, path=path, kind="AST", heads=heads)
        rows = state["pos_embed"].shape[1] - 2
        if rows < FREQ or rows % FREQ:
            raise UserError(
                f"{what}: pos_embed of {rows + 2} rows, not 2 and {FREQ} for each time patch"
            )
        keywords["grid"] = Grid(rows // FREQ, FREQ)
        keywords["eps"] = settings.get("layer_norm_eps", 1e-12 if published else 1e-6)
        if rows // FREQ == 12:
            keywords["frontend"] = SPEECH_COMMANDS
        return build_strictly(cls, keywords, state, str(path))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the encoder's tensors under the names of this file, classifiers left out.

    Queries, keys and values of transformers become one tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name
        for prefix in PREFIXES:
            own = own.removeprefix(prefix)
        for pattern, ours in RENAMED:
            own = re.sub(f"^{pattern}", ours, own)
        if own in renamed:
            raise UserError(f"not an AST file: it holds {own} twice, once as {name[:100]}")
        renamed[own] = tensor
    renamed = without(renamed, *LEFT_OUT)
    for name in [n for n in renamed if ".attn.q." in n]:
        three = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(n in renamed for n in three):
            renamed[name.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(n) for n in three])
    return renamed


ENCODER = AST
