"""The BEATs encoder (iter3 and iter3+ files, pre-trained or fine-tuned).

16 x 16 patches (no bias) -> LN -> linear -> time-major tokens x; no class token. Then

    x = LN(x + GELU(conv(x)))               128 taps along the tokens, 16 groups, weight-normed
    x = LN1(c x + Attn(x));  x = LN2(c x + W2 GELU(W1 x)),  c = (2 L)^(1/4), in each of L blocks
    Attn: softmax(q k^T / sqrt(d) + G * R) v per head
    R[h, i, j] = table[bucket(j - i), h], shared by all blocks;  G[h, i] = g1 (g2 a_h - 1) + 2,
    (g1, g2) = sigmoid of the sums of four outputs each of a linear map of q_i

Every LayerNorm has eps 1e-5. Clips longer than 64 time patches are cut into chunks of 64, each
encoded from position 0; patch tokens are joined along time. Block names below ``blocks.B.`` are
the published ones below ``encoder.layers.B.``; the table, which files list once a layer, is stored
once. Dropouts and layer drop of a file's ``cfg`` are 0 here, in fine-tuning too.

The reference's "class token" of a block is the mean of its patch tokens: ``cls="mean"`` gives it
(for long clips the plain mean over chunks). Probes of an encoder without one use the mean patch,
``cgp`` with ``head.cls=mean`` in the same place: the same for clips of one chunk.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bat.encoders.base import SpectrogramEncoder
from bat.encoders.strict import (
    Range,
    block_count,
    build_strictly,
    check_settings,
    demand,
    keywords_of,
    make_frontend,
)
from bat.errors import UserError
from bat.types import Features, Grid

log = logging.getLogger("bat")

PATCH, CHUNK = 16, 64
TAPS, GROUPS = 128, 16
BUCKETS, MAX_DISTANCE = 320, 800
MASK = 1 << 24
"""Numbers of the additive attention mask that are computed at a time (64 MB)."""
SETTINGS: dict[str, Range] = {
    "width": (int, 16, 16_384),
    "depth": (int, 1, 512),
    "heads": (int, 1, 1024),
    "embed_width": (int, 1, 16_384),
    "mlp_width": (int, 1, 65_536),
    "cls": ("none", "mean"),
}
FIXED = {
    **{"activation_fn": "gelu", "layer_norm_first": False, "deep_norm": True, "conv_bias": False},
    **{"conv_pos": TAPS, "conv_pos_groups": GROUPS, "relative_position_embedding": True},
    **{"num_buckets": BUCKETS, "max_distance": MAX_DISTANCE, "gru_rel_pos": True},
    **{"input_patch_size": PATCH},
}
"""Settings of ``cfg`` that are fixed here."""
ABSENT = {
    **{"deep_norm": False, "relative_position_embedding": False, "gru_rel_pos": False},
    **{"max_distance": 1280},
}
"""Values of settings that a ``cfg`` does not state."""
SIZES = {
    **{"width": "encoder_embed_dim", "depth": "encoder_layers", "heads": "encoder_attention_heads"},
    **{"embed_width": "embed_dim", "mlp_width": "encoder_ffn_embed_dim"},
}
"""Names of sizes in ``cfg``."""
NAMES = {
    "patch_embedding.weight": "patch_embed.weight",
    "layer_norm.": "embed_norm.",
    "post_extract_proj.": "embed_proj.",
    "encoder.pos_conv.0.weight_g": "pos_g",
    "encoder.pos_conv.0.weight_v": "pos_v",
    "encoder.pos_conv.0.parametrizations.weight.original0": "pos_g",
    "encoder.pos_conv.0.parametrizations.weight.original1": "pos_v",
    "encoder.pos_conv.0.bias": "pos_bias",
    "encoder.layer_norm.": "pos_norm.",
    "encoder.layers.": "blocks.",
}
"""Map of beginnings of published names to those here."""
TABLE = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")
HEAD = "predictor."


class SelfAttention(nn.Module):
    """Attention with a gated relative position bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor) -> Tensor:
        """Maps queries (B, m, D), ``memory`` (B, n, D) and R (H, m, n) to (B, m, D)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, ., d)
            for part in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        gates = self.grep_linear(q).float().unflatten(-1, (2, 4)).sum(-1).sigmoid()
        g1, g2 = gates.chunk(2, dim=-1)  # (B, H, m, 1)
        gate = g1 * (g2 * self.grep_a - 1) + 2
        step = max(1, MASK // bias.numel())  # clips at a time
        done = []
        for part in zip(*(t.split(step) for t in (q, k, v, gate)), strict=True):
            args = (bias, *part)
            if torch.is_grad_enabled():  # masks are computed again instead of stored
                done.append(checkpoint(_attend, *args, use_reentrant=False))
            else:
                done.append(_attend(*args))
        return self.out_proj(torch.cat(done).transpose(1, 2).flatten(2))


def _attend(bias: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(gate * bias).to(q.dtype))


class DeepNormBlock(nn.Module):
    """Post-norm block whose residuals are scaled by ``c``."""

    def __init__(self, width: int, heads: int, mlp_width: int, c: float) -> None:
        super().__init__()
        self.c = c
        self.self_attn = SelfAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        """Maps (B, m, D) to the same; ``memory`` (B, n, D): attended tokens, None: x itself."""
        attended = self.self_attn(x, bias, x if memory is None else memory)
        x = self.self_attn_layer_norm(self.c * x + attended)
        return self.final_layer_norm(self.c * x + self.fc2(_gelu(self.fc1(x))))


class BEATs(SpectrogramEncoder):
    """A BEATs encoder; the defaults are iter3's."""

    has_cls = False
    has_queries = True
    patch = PATCH

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        embed_width: int = 512,
        mlp_width: int = 3072,
        cls: Literal["none", "mean"] = "none",
        frontend: dict[str, Any] | None = None,
    ) -> None:
        """``embed_width``: of the patch embedding. ``cls``: ``mean``: each block's mean patch is
        its class token. ``frontend``: keywords of ``make_frontend``; default: kind ``beats``.

        Raises ``UserError`` for a setting of the wrong type or out of range (``SETTINGS``).
        """
        super().__init__()
        self._config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_settings(
            "encoder", {k: v for k, v in self._config.items() if k in SETTINGS}, SETTINGS
        )
        if width % heads or width % GROUPS:
            raise UserError(f"encoder: width={width}: a multiple of heads={heads} and of {GROUPS}")
        frontend = {"kind": "beats"} if frontend is None else frontend
        self.frontend = make_frontend(**keywords_of(make_frontend, frontend, "frontend"))
        self.sample_rate = int(self.frontend.sample_rate)  # type: ignore[arg-type]
        if int(self.frontend.n_mels) % PATCH:  # type: ignore[arg-type]
            raise UserError(f"frontend: n_mels={self.frontend.n_mels}: a multiple of {PATCH}")
        self.grid = Grid(CHUNK, int(self.frontend.n_mels) // PATCH)  # type: ignore[arg-type]
        self.width, self.depth, self.heads, self.has_cls = width, depth, heads, cls == "mean"
        self.patch_embed = nn.Conv2d(1, embed_width, PATCH, PATCH, bias=False)
        self.embed_norm = nn.LayerNorm(embed_width)
        self.embed_proj = nn.Linear(embed_width, width)
        self.pos_g = nn.Parameter(torch.empty(1, 1, TAPS))
        self.pos_v = nn.Parameter(torch.empty(width, width // GROUPS, TAPS))
        self.pos_bias = nn.Parameter(torch.zeros(width))
        self.pos_norm = nn.LayerNorm(width)
        self.relative_bias = nn.Embedding(BUCKETS, heads)
        c = (2 * depth) ** 0.25
        self.blocks = nn.ModuleList(DeepNormBlock(width, heads, mlp_width, c) for _ in range(depth))
        self._init()

    def _init(self) -> None:
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Linear | nn.Embedding):
                continue
            nn.init.normal_(layer.weight, 0, 0.02)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
            if name.endswith(("q_proj", "k_proj")):
                nn.init.xavier_normal_(layer.weight)
            elif name.endswith(("v_proj", "out_proj", "fc1", "fc2")):
                nn.init.xavier_normal_(layer.weight, gain=(8 * self.depth) ** -0.25)
        nn.init.normal_(self.pos_v, 0, (4 / (TAPS * self.width)) ** 0.5)
        with torch.no_grad():
            self.pos_g.copy_(self.pos_v.norm(dim=(0, 1), keepdim=True))

    def enter(self, spectrogram: Tensor) -> Tensor:
        """Maps one chunk (B, 1, frames, mels) to the input of the first block, (B, N, D)."""
        x = self.patch_embed(spectrogram).flatten(2).transpose(1, 2)  # (B, N, E), time-major
        x = self.embed_proj(self.embed_norm(x))  # (B, N, D)
        weight = self.pos_g * self.pos_v / self.pos_v.norm(dim=(0, 1), keepdim=True)
        x_t = x.transpose(1, 2)  # (B, D, N)
        near = F.conv1d(x_t, weight, self.pos_bias, padding=TAPS // 2, groups=GROUPS)[..., :-1]
        return self.pos_norm(x + _gelu(near).transpose(1, 2))

    def bias(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns R (H, m, n) of token numbers ``rows`` (m,) and ``columns`` (n,)."""
        bucket = _bucket(columns[None, :] - rows[:, None])  # (m, n)
        return self.relative_bias.weight[bucket].permute(2, 0, 1).contiguous()

    def features(self, spectrogram: Tensor, *, entry: bool = False) -> Features:
        """Maps (B, 1, frames, mels) of any length to ``Features`` of all blocks."""
        freq = self.grid.freq
        patches, classes, entries = [], [], []
        for chunk in spectrogram.split(CHUNK * PATCH, dim=2):
            x = self.enter(chunk)  # (B, N, D)
            if entry:
                entries.append(x.unflatten(1, (-1, freq)))
            numbers = torch.arange(x.shape[1], device=x.device)
            bias, blocks = self.bias(numbers, numbers), []
            for block in self.blocks:
                x = block(x, bias)
                blocks.append(x)
            out = torch.stack(blocks)  # (L, B, N, D)
            patches.append(out.unflatten(2, (-1, freq)))  # (L, B, t, F, D)
            classes.append(out.mean(2))
        pieces = torch.stack(classes, dim=2)  # (L, B, P, D)
        return Features(
            torch.cat(patches, dim=2),
            pieces.mean(2) if self.has_cls else None,
            torch.cat(entries, dim=1) if entry else None,
            pieces if self.has_cls and entry and len(classes) > 1 else None,
        )

    def query_blocks(self, queries: Tensor, features: Features) -> Tensor:
        """See ``Encoder.query_blocks``. Queries have the token numbers 0 .. q - 1, in front of the
        tokens'; for a long clip the mean over its chunks."""
        if features.valid is not None:
            return self.query_alone(queries, features, features.valid)
        entry, q = features.entry, queries.shape[1]
        assert entry is not None, "features(..., entry=True)"
        results = []
        for b, block in enumerate(self.blocks):
            weights = {name: p.detach() for name, p in block.named_parameters()}
            before = entry if b == 0 else features.patches[b - 1]  # (B, T, F, D)
            own, chunks = queries[b].expand(len(entry), -1, -1), []
            for chunk in before.split(CHUNK, dim=1):
                tokens = chunk.flatten(1, 2).detach()
                if not torch.is_autocast_enabled(own.device.type):
                    tokens = tokens.to(own.dtype)
                numbers = torch.arange(q + tokens.shape[1], device=own.device)
                bias = self.bias(numbers[:q], numbers[q:]).detach()
                chunks.append(functional_call(block, weights, (own, bias, tokens)))
            results.append(torch.stack(chunks).mean(0))
        return torch.stack(results)

    def layer_of(self, name: str) -> int:
        return 1 if name.startswith("relative_bias.") else super().layer_of(name)

    def no_weight_decay(self) -> set[str]:
        names = (name for name, _ in self.named_parameters())
        return {n for n in names if n.endswith("grep_a") or n.startswith("relative_bias.")}

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds strictly from the names of this class, which state ``heads``."""
        keywords = shape_of(state) if config is None else keywords_of(cls, config, "encoder")
        return build_strictly(cls, keywords, state, "the weight file")

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        return {"patch_embedding.weight", "post_extract_proj.weight"} <= set(names)

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from published names; ``settings``: the file's ``cfg``. See ``from_weights``."""
        renamed = rename(state, path)
        if "encoder_layers" in settings:
            sizes = {name: shape_of(renamed)[own] for own, name in SIZES.items()}
            demand({**ABSENT, **settings}, FIXED | sizes, str(path))
        else:
            log.warning("%s states no cfg: taken as an iter3 encoder of BEATs", path)
        return cls.from_weights(renamed, config=None, heads=heads)


def rename(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns a published file's tensors under the names of ``BEATs``, without the classifier;
    unknown names stay. Raises ``UserError`` if the layers' tables of relative biases differ."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(HEAD):
            log.warning("%s: set aside, no part of the encoder: %s", path, name[:100])
        elif TABLE.fullmatch(name):
            first = renamed.setdefault("relative_bias.weight", tensor)
            if not torch.equal(first, tensor):
                raise UserError(f"{path}: {name[:100]} is not the table of the other layers")
        else:
            begin = next((start for start in NAMES if name.startswith(start)), "")
            renamed[NAMES.get(begin, "") + name.removeprefix(begin)] = tensor
    return renamed


def shape_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infers constructor keywords from a state dict with the names of ``BEATs``."""
    needed = {
        "patch_embed.weight": 4,
        "embed_proj.weight": 2,
        "relative_bias.weight": 2,
        "blocks.0.fc1.weight": 2,
    }
    wrong = [n for n, axes in needed.items() if n not in state or state[n].dim() != axes]
    if wrong:
        raise UserError(f"not a BEATs encoder: {', '.join(wrong)} missing or of another shape")
    width, embed_width = state["embed_proj.weight"].shape
    return {
        "width": width,
        "depth": block_count(state, "BEATs"),
        "heads": state["relative_bias.weight"].shape[1],
        "embed_width": embed_width,
        "mlp_width": state["blocks.0.fc1.weight"].shape[0],
    }


def _bucket(offset: Tensor) -> Tensor:
    """Returns the buckets of offsets (key minus query number): half for each sign, exact up to
    half of those, then logarithmic up to ``MAX_DISTANCE``."""
    half = BUCKETS // 2
    exact = half // 2
    far = offset.abs()
    share = (far.float() / exact).clamp(min=1).log() / math.log(MAX_DISTANCE / exact)
    rough = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return (offset > 0) * half + torch.where(far < exact, far, rough)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).to(x.dtype)


ENCODER = BEATs
