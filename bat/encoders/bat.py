"""The Better Audio Transformer's encoder (docs/method.md 2).

16 x 16 patches of the log-mel -> linear embedding -> fixed sin-cos position code -> visible tokens
kept -> class token (no code) -> LayerNorm -> L gated blocks. State-dict names are the paper's.
Clips longer than the position table are cut into chunks of its length, each encoded separately from
position 0; patch tokens are concatenated along time, class tokens averaged (unweighted).

``query_blocks`` runs a few learned tokens through the frozen blocks. They attend to the tokens and
no token attends to them, so the tokens are not recomputed. Keys and values are not computed either:
``q . (W_k z) = (W_k^T q) . z`` and ``sum_i w_i W_v z_i = W_v sum_i w_i z_i``, which is
2 n q H D multiplications a block instead of 2 n D^2 (a sixth at q = 10, H = 12, D = 768) and stores
nothing of the tokens' size for the backward pass. The key bias shifts all scores of a query equally
and cancels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bat.encoders.base import MaskableEncoder
from bat.encoders.strict import (
    MAX_DEPTH,
    Range,
    block_count,
    check_settings,
    demand,
    in_short,
    keywords_of,
    load_strictly,
    make_frontend,
)
from bat.errors import UserError
from bat.nn.attention import Backend
from bat.nn.block import EPS, Block, init_linears
from bat.nn.decoder import TOKEN_STD
from bat.nn.embed import PatchEmbed, PosLayout, position_code
from bat.types import Features, Grid

HEAD_WIDTH = 64
"""Channels per head for files that do not state the number of heads."""
MAX_TOKENS = 1 << 20
SETTINGS: dict[str, Range] = {
    "width": (int, 4, 16_384),
    "depth": (int, 1, MAX_DEPTH),
    "heads": (int, 1, 1024),
    "patch": (int, 1, 512),
    "mlp_ratio": (float, 0.01, 64),
    "gate": bool,
    "norm_order": ("post", "pre"),
    "pre_norm": bool,
    "layer_scale": (float, -1e6, 1e6),
    "pos_layout": get_args(PosLayout),
    "drop_path": (float, 0, 0.999),
    "attention": get_args(Backend),
}
"""Ranges of settings, except ``grid`` and ``frontend``; ``layer_scale`` may also be None."""
HUB_FIXED = {
    **{"qkv_bias": True, "layer_norm_eps": 1e-6, "pos_trainable": False},
    **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    **{"f_min": 0, "top_db": 80, "feature_normalization": "per_sample_minmax_after_db"},
}
"""Fixed settings, with the names of ``config.json`` in BAT's hub folder."""
HUB_FRONT = ("f_min", "top_db", "feature_normalization")
"""Those of the front end; a folder that says its ``frontend`` may have others."""
HUB_NAMES = {
    **{"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"gate": "use_gate", "drop_path": "drop_path_rate", "layer_scale": "init_scale_values"},
    **{"mlp_ratio": "mlp_ratio", "pre_norm": "pre_norm", "pos_layout": "pos_layout"},
}
"""Names of settings there."""


class BAT(MaskableEncoder):
    """Encoder of the Better Audio Transformer; the defaults are Base."""

    has_cls = True
    has_queries = True

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        grid: Grid = Grid(64, 8),  # noqa: B008  (frozen)
        patch: int = 16,
        mlp_ratio: float = 4.0,
        gate: bool = True,
        norm_order: Literal["post", "pre"] = "post",
        pre_norm: bool = True,
        layer_scale: float | None = None,
        pos_layout: PosLayout = "reference",
        drop_path: float = 0.0,
        attention: Backend = "auto",
        frontend: dict[str, Any] | None = None,
    ) -> None:
        """``grid``: patches of one chunk. ``frontend``: keywords of ``make_frontend``.

        Raises ``UserError`` for a setting of the wrong type or out of range (``SETTINGS``).
        """
        super().__init__()
        self._config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        checked = {k: v for k, v in self._config.items() if k in SETTINGS}
        if layer_scale is None:
            del checked["layer_scale"]
        check_settings("encoder", checked, SETTINGS)
        _check_grid(grid)
        if width % heads or width % 4:
            raise UserError(f"encoder: width={width}: a multiple of heads={heads} and of 4")
        self.width, self.depth, self.heads = width, depth, heads
        self.patch, self.grid = patch, grid
        self.gate, self.pos_layout, self.attention = gate, pos_layout, attention
        frontend = {} if frontend is None else frontend
        self.frontend = make_frontend(**keywords_of(make_frontend, frontend, "frontend"))
        self.sample_rate = int(self.frontend.sample_rate)  # type: ignore[arg-type]
        self.patch_embed = PatchEmbed(patch, width)
        self.register_buffer("pos_embed", position_code(width, grid, pos_layout))  # (1, N, D)
        self.cls_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, width))
        self.pre_norm = nn.LayerNorm(width, eps=EPS) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=mlp_ratio,
                gate=gate,
                norm_order=norm_order,
                layer_scale=None if layer_scale is None else float(layer_scale),
                attention=attention,
            )
            for _ in range(depth)
        )
        self.set_drop_path(drop_path)
        init_linears(self)

    def embed_patches(self, spectrogram: Tensor) -> Tensor:
        """Embeds (B, 1, frames, mels) as (B, N, D) patch tokens with their position code.

        ``frames`` must not exceed the grid's; for fewer, the first rows of the code are used.
        """
        time, freq = self._patches(spectrogram)
        if time > self.grid.time:
            raise ValueError(f"{time} time patches, the position table has {self.grid.time}")
        x = self.patch_embed(spectrogram)  # (B, N, D), time-major
        return x + self.pos_embed[:, : time * freq]  # type: ignore[index]

    def enter(self, tokens: Tensor) -> Tensor:
        """Maps (B, n, D) embedded tokens to the input of the first block, (B, 1 + n, D)."""
        cls = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return self.pre_norm(torch.cat([cls, tokens], dim=1))

    def layers(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.enter(tokens)
        for block in self.blocks:
            x, mlp = block(x)
            yield x, mlp

    def features(self, spectrogram: Tensor, *, entry: bool = False) -> Features:
        """Maps (B, 1, frames, mels) of any length to ``Features`` of all blocks."""
        _, freq = self._patches(spectrogram)
        step = self.grid.time * self.patch
        patches, classes, entries = [], [], []
        for chunk in spectrogram.split(step, dim=2):
            tokens = self.embed_patches(chunk)  # (B, n, D)
            out = self._all_layers(tokens)  # (L, B, 1 + n, D)
            classes.append(out[:, :, 0])
            patches.append(out[:, :, 1:].unflatten(2, (-1, freq)))  # (L, B, t, F, D)
            if entry:
                entries.append(self.enter(tokens)[:, 1:].unflatten(1, (-1, freq)))
        if len(patches) == 1:
            return Features(patches[0], classes[0], entries[0] if entry else None)
        pieces = torch.stack(classes, dim=2)  # (L, B, P, D)
        return Features(
            torch.cat(patches, dim=2),
            pieces.mean(2),
            torch.cat(entries, dim=1) if entry else None,
            pieces if entry else None,
        )

    def query_blocks(self, queries: Tensor, features: Features) -> Tensor:
        """See ``Encoder.query_blocks``; for a long clip the mean over its chunks."""
        if features.valid is not None:
            return self.query_alone(queries, features, features.valid)
        patches, cls, entry, pieces, _ = features
        assert entry is not None, "features(..., entry=True)"
        assert cls is not None
        pieces = cls.unsqueeze(2) if pieces is None else pieces  # (L, B, P, D)
        first = _frozen(self.pre_norm, self.cls_token.detach()).expand(len(entry), -1, -1)
        step, blocks = self.grid.time, []
        assert pieces.shape[2] == -(-patches.shape[2] // step)
        for b, block in enumerate(self.blocks):
            before = entry if b == 0 else patches[b - 1]  # (B, T, F, D)
            chunks = []
            for p, chunk in enumerate(before.split(step, dim=1)):
                at = first if b == 0 else pieces[b - 1, :, p : p + 1]  # (B, 1, D)
                chunks.append(_query(block, queries[b], at, chunk.flatten(1, 2)))  # type: ignore[arg-type]
            blocks.append(torch.stack(chunks).mean(0) if len(chunks) > 1 else chunks[0])
        return torch.stack(blocks)

    def _all_layers(self, tokens: Tensor) -> Tensor:
        """Maps (B, n, D) embedded tokens to the tokens of all blocks, (L, B, 1 + n, D)."""
        layers = self.layers(tokens)
        if torch.is_grad_enabled():
            return torch.stack([x for x, _ in layers])
        first, _ = next(layers)
        out = first.new_empty(self.depth, *first.shape)  # written in place, without a second copy
        out[0] = first
        for block, (x, _) in enumerate(layers, start=1):
            out[block] = x
        return out

    def set_drop_path(self, rate: float) -> None:
        """Sets the drop-path rate of the last block; the others rise linearly from 0."""
        for b, block in enumerate(self.blocks):
            block.drop_path.set(rate * b / max(1, self.depth - 1), active=rate > 0)  # type: ignore[union-attr, operator]

    def layer_of(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        embedding = name.startswith("patch_embed.") or name in ("cls_token", "pos_embed")
        return 0 if embedding else self.depth + 1

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def config(self) -> dict[str, Any]:
        return {**self._config, "grid": [self.grid.time, self.grid.freq]}

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds strictly from a state dict of the paper's names; see ``Encoder.from_weights``."""
        keywords = shape_of(state) if config is None else keywords_of(BAT, config, "encoder")
        absent = [n for n in ("width", "depth", "grid", "patch") if n not in keywords]
        if absent:
            raise UserError(f"encoder: {', '.join(absent)} not given: the settings are incomplete")
        if heads is not None:
            keywords["heads"] = heads
        if keywords.get("heads") is None:
            keywords["heads"] = _usual_heads(keywords["width"])
        grid = keywords["grid"]
        if not isinstance(grid, Grid):
            if not isinstance(grid, list | tuple) or len(grid) != 2:
                raise UserError("encoder: grid must be two numbers, patches in time and frequency")
            keywords["grid"] = Grid(*grid)
        _check_size(keywords, state)
        model = cls(**keywords)
        mels, rows = model.frontend.n_mels, model.grid.freq * model.patch
        if mels != rows:
            raise UserError(
                f"encoder: n_mels={mels} of the front end, {rows} mel bins of the patch grid"
            )
        load_strictly(model, state, "the weight file")
        return model

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        """See ``Encoder.matches``. A plain ViT with a last norm (AudioMAE, M2D) is not one."""
        if settings.get("model_type", "bat") != "bat" or "model_variant" in settings:
            return False
        own = {"pre_norm.weight", "blocks.0.attn.gate.weight"}
        return "cls_token" in names and not (
            own.isdisjoint(names) and {"norm.weight", "fc_norm.weight"} & set(names)
        )

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from the paper's files and hub folder; see ``Encoder.from_file``."""
        config = hub_keywords(settings, str(path)) if "model_type" in settings else None
        heads = settings.get("num_heads") if heads is None else heads
        return cls.from_weights(state, config=config, heads=heads)

    def _patches(self, spectrogram: Tensor) -> tuple[int, int]:
        frames, mels = spectrogram.shape[2:]
        if frames % self.patch or mels != self.grid.freq * self.patch:
            raise ValueError(
                f"spectrogram of {frames} frames x {mels} mels: frames must be a multiple of "
                f"{self.patch} and mels {self.grid.freq * self.patch}"
            )
        return frames // self.patch, mels // self.patch


def shape_of(state: Mapping[str, Tensor], *, mels: int = 128) -> dict[str, Any]:
    """Infers constructor keywords from a state dict (all except the number of heads).

    ``load_strictly`` rejects a position table longer than a whole number of time patches.
    """
    needed = {
        "cls_token": 3,
        "pos_embed": 3,
        "patch_embed.proj.weight": 4,
        "blocks.0.mlp.fc1.weight": 2,
    }
    absent = [n for n in needed if n not in state]
    if absent:
        found = ", ".join(n[:100] for n in list(state)[:8]) or "nothing"
        raise UserError(f"not a BAT encoder: {', '.join(absent)} missing. The file holds {found}")
    for name, axes in needed.items():
        if state[name].dim() != axes or 0 in state[name].shape:
            raise UserError(f"not a BAT encoder: {name} has the shape {tuple(state[name].shape)}")
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    if mels % patch:
        raise UserError(f"not a BAT encoder: {mels} mel bins in patches of {patch}")
    depth = block_count(state, "BAT")
    freq = mels // patch
    return {
        "width": width,
        "depth": depth,
        "patch": patch,
        "grid": Grid(state["pos_embed"].shape[1] // freq, freq),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "gate": "blocks.0.attn.gate.weight" in state,
        "pre_norm": "pre_norm.weight" in state,
        "layer_scale": 1.0 if "blocks.0.ls1.s" in state else None,
    }


def hub_keywords(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns the constructor keywords for ``config.json`` of BAT's hub folder.

    Raises ``UserError`` for another encoder's and for sides that are no whole number of patches;
    ``from_weights`` checks the rest.
    """
    said = config.get("frontend")  # all settings of the front end, written by bat-export
    free = () if said is None else HUB_FRONT
    demand(config, {name: value for name, value in HUB_FIXED.items() if name not in free}, what)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "input_shape", "patch_size")
    absent = [name for name in names if name not in config]
    if absent:
        raise UserError(f"{what} does not say {', '.join(absent)}")
    shape, patch = config["input_shape"], config["patch_size"]
    chunk = config.get("chunk_time_patches", 64)
    patch = patch if isinstance(patch, list) else [patch, patch]
    sides = [*shape, *patch, chunk] if isinstance(shape, list) else []
    if (
        len(sides) != 5
        or any(type(x) is not int or x < 1 for x in sides)
        or (patch[0] != patch[1] or shape[0] % patch[0] or shape[1] % patch[1])
    ):
        raise UserError(
            f"{what}: input_shape={in_short(shape)}, patch_size={in_short(config['patch_size'])} "
            f"and chunk_time_patches={in_short(chunk)} are no whole number of square patches"
        )
    first = config.get("layer_norm_first", False)
    front = ("sample_rate", "n_fft", "hop_length", "n_mels")
    if said is None:
        said = {name: config[name] for name in front if name in config}
    return {
        **{own: config[name] for own, name in HUB_NAMES.items() if name in config},
        "patch": patch[0],
        "grid": [min(chunk, shape[0] // patch[0]), shape[1] // patch[1]],
        "norm_order": ("post", "pre")[first] if isinstance(first, bool) else first,
        "frontend": said,
    }


def _check_size(keywords: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises ``UserError`` if an encoder of these settings would be far larger than ``state``,
    before it is built. ``load_strictly`` compares names and shapes exactly."""
    sizes = {k: v for k, v in keywords.items() if k in ("width", "depth", "mlp_ratio")}
    check_settings("encoder", sizes, SETTINGS)
    width, grid = sizes["width"], keywords["grid"]
    _check_grid(grid)
    block = (4 + 2 * sizes.get("mlp_ratio", 4.0)) * width**2
    numbers = int(sizes["depth"] * block + grid.tokens * width)
    held = sum(t.numel() for t in state.values())
    if numbers > 4 * held + (1 << 24):
        raise UserError(
            f"encoder: depth={sizes['depth']}, width={width}, {grid.tokens} patches: about "
            f"{numbers} numbers, and the weight file holds {held}: it does not fit"
        )


def _check_grid(grid: Grid) -> None:
    sides = {"grid.time": grid.time, "grid.freq": grid.freq}
    check_settings("encoder", sides, dict.fromkeys(sides, (int, 1, MAX_TOKENS)))


def _usual_heads(width: int) -> int:
    if type(width) is not int or width % HEAD_WIDTH:
        raise UserError(
            f"the file does not say its number of heads and its width {width} is not a multiple "
            f"of {HEAD_WIDTH}: give it, load_encoder(path, heads=4) or heads=4"
        )
    return width // HEAD_WIDTH


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """Computes ``module(x)`` without gradients to its parameters."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, weights, (x,))


def _query(block: Block, queries: Tensor, cls: Tensor, patches: Tensor) -> Tensor:
    """Runs ``queries`` (q, D), which attend to cls (B, 1, D) and patches (B, n, D), through
    ``block`` -> (B, q, D). No drop path, since the encoder is frozen and in eval mode."""
    attn, post, D = block.attn, block.norm_order == "post", queries.shape[-1]
    if not torch.is_autocast_enabled(queries.device.type):  # autocast casts by itself
        cls, patches = cls.to(queries.dtype), patches.to(queries.dtype)
    x = queries if post else _frozen(block.norm1, queries)
    if not post:
        cls, patches = _frozen(block.norm1, cls), _frozen(block.norm1, patches)
    weight, bias = attn.qkv.weight.detach(), attn.qkv.bias.detach()
    heads = (attn.heads, -1)
    with torch.autocast(x.device.type, enabled=False):  # negligible: once for all clips
        q = F.linear(x, weight[:D], bias[:D]).unflatten(-1, heads)  # (q, H, d)
        keys = weight[D : 2 * D].unflatten(0, heads)  # (H, d, D)
        directions = torch.einsum("qhd,hdc->hqc", q, keys).flatten(0, 1)  # (H q, D)
        directions = directions * q.shape[-1] ** -0.5
    scores = [directions @ z.transpose(1, 2) for z in (cls, patches)]  # (B, H q, 1), (B, H q, n)
    share = torch.cat(scores, dim=-1).softmax(-1)
    read = share[..., :1] * cls + share[..., 1:] @ patches  # (B, H q, D)
    values = weight[2 * D :].unflatten(0, heads)  # (H, d, D)
    out = torch.einsum("bhqc,hdc->bqhd", read.unflatten(1, heads), values).flatten(2)
    out = out + bias[2 * D :]  # (B, q, D): shares sum to 1
    if attn.gate is not None:
        out = out * torch.sigmoid(_frozen(attn.gate, x))
    x = queries + _frozen(block.ls1, _frozen(attn.proj, out))
    if post:
        x = _frozen(block.norm1, x)
        return _frozen(block.norm2, x + _frozen(block.ls2, _frozen(block.mlp, x)))
    return x + _frozen(block.ls2, _frozen(block.mlp, _frozen(block.norm2, x)))


ENCODER = BAT
