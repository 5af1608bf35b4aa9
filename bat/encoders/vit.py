"""The pre-norm vision transformer that AudioMAE, M2D, AST and Dasheng share.

    x_0 = [leading tokens, patch tokens]
    y_l = x_(l-1) + Attn(LN(x_(l-1)));   x_l = y_l + MLP(LN(y_l)),   l = 1 .. L

Features of block l are x_l, those of the last block LN(x_L) (``norm``). Tokens are time-major here,
also where the published code has them frequency-major: attention does not depend on their order,
and position codes are reordered with them. Clips longer than ``max_patches`` are encoded in chunks,
each from position 0, the last one shorter; class tokens are averaged over the chunks.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

import torch
from torch import Tensor, nn

from bat.encoders.base import Encoder
from bat.encoders.bat import MAX_TOKENS, SETTINGS
from bat.encoders.strict import block_count, build_strictly, check_settings, in_short, keywords_of
from bat.errors import UserError
from bat.nn.attention import Backend
from bat.nn.block import EPS, Block
from bat.types import Features, Grid

OWN = ("own", "norm_eps", "last_norm")
"""Keywords of ``ViT`` that subclasses set; the others are theirs too."""


class Shape(TypedDict, total=False):
    """Keywords that the subclasses of ``ViT`` pass on to it."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    drop_path: float
    attention: Backend


class ViT(Encoder):
    """Base class: blocks and their features. Subclasses have ``embed_patches`` and ``leading``.

    Attributes: ``learned``, the parameters beside the blocks that never decay.
    """

    learned: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")

    def __init_subclass__(cls) -> None:
        """The signature of a subclass names the shared keywords beside its own."""
        super().__init_subclass__()
        both = (
            *inspect.signature(ViT.__init__).parameters.values(),
            *inspect.signature(cls.__init__).parameters.values(),
        )
        named = [p for p in both if p.kind is p.KEYWORD_ONLY and p.name not in OWN]
        cls.__signature__ = inspect.Signature(list({p.name: p for p in named}.values()))  # type: ignore[attr-defined]

    def __init__(
        self,
        *,
        own: dict[str, Any],
        norm_eps: float = EPS,
        last_norm: bool = True,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attention: Backend = "auto",
    ) -> None:
        """Makes blocks and last norm. ``own``: the subclass's own keywords, kept for ``config``.

        Raises ``UserError`` for a setting of the wrong type or out of range.
        """
        super().__init__()
        shape: dict[str, Any] = {"width": width, "depth": depth, "heads": heads}
        shape |= {"mlp_ratio": mlp_ratio, "drop_path": drop_path, "attention": attention}
        check_settings("encoder", shape, SETTINGS)
        if width % heads or width % 4:
            raise UserError(f"encoder: width={width}: a multiple of heads={heads} and of 4")
        if "grid" in own:
            own = {**own, "grid": make_grid(own["grid"])}
        self._config: dict[str, Any] = {**shape, **own}
        self.width, self.depth, self.heads = width, depth, heads
        self.attention: Backend = attention
        self.blocks = nn.ModuleList(
            Block(
                width, heads, mlp_ratio=mlp_ratio, gate=False, norm_order="pre", attention=attention
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if last_norm else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
        self.set_drop_path(drop_path)

    @abc.abstractmethod
    def embed_patches(self, inputs: Tensor) -> Tensor:
        """Embeds the input of one chunk as (B, T, F, D) with position codes."""

    def leading(self) -> Tensor | None:
        """Returns the tokens in front of the patches, (1, k, D), with position codes."""
        return None

    def chunks(self, inputs: Tensor) -> Sequence[Tensor]:
        """Splits inputs (B, 1, frames, mels) into chunks of at most ``max_patches``."""
        if self.max_patches is None:
            return (inputs,)
        return inputs.split(self.first(inputs, self.max_patches).shape[2], dim=2)

    def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
        """Maps inputs of clips of one length to ``Features`` of all blocks."""
        assert not entry, "no query_blocks here"
        found = [self._layers(self.embed_patches(chunk)) for chunk in self.chunks(inputs)]
        patches = [p for p, _ in found]
        cls = torch.stack([lead.mean(2) for _, lead in found]).mean(0) if self.has_cls else None
        return Features(patches[0] if len(found) == 1 else torch.cat(patches, dim=2), cls)

    def _layers(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, T, F, D) embedded tokens to the patch tokens of all blocks, (L, B, T, F, D), and
        the leading ones, (L, B, k, D)."""
        x, lead = tokens.flatten(1, 2), self.leading()
        k = 0 if lead is None else lead.shape[1]
        if lead is not None:
            x = torch.cat([lead.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, k + N, D)
        blocks: list[Tensor] = []
        whole = None if torch.is_grad_enabled() else x.new_empty(self.depth, *x.shape)
        for b, block in enumerate(self.blocks):
            x, _ = block(x)
            out = self.norm(x) if b == self.depth - 1 else x
            if whole is None:
                blocks.append(out)
            else:  # written in place, without a second copy
                whole[b] = out
        whole = torch.stack(blocks) if whole is None else whole
        return whole[:, :, k:].unflatten(2, tokens.shape[1:3]), whole[:, :, :k]

    def set_drop_path(self, rate: float) -> None:
        """Sets the drop-path rate of the last block; the others rise linearly from 0."""
        for b, block in enumerate(self.blocks):
            block.drop_path.set(rate * b / max(1, self.depth - 1), active=rate > 0)  # type: ignore[union-attr, operator]

    def layer_of(self, name: str) -> int:
        return self.depth + 1 if name.startswith("norm.") else super().layer_of(name)

    def no_weight_decay(self) -> set[str]:
        return set(self.learned)

    def config(self) -> dict[str, Any]:
        grid = self._config.get("grid")
        return self._config | ({} if grid is None else {"grid": [grid.time, grid.freq]})

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds strictly from a bat export, or from published names without ``config``."""
        if config is None:
            return cls.from_file(state, settings={}, path=Path("the weight file"), heads=heads)
        keywords = keywords_of(cls, config, "encoder")
        keywords |= {} if heads is None else {"heads": heads}
        return build_strictly(cls, keywords, state, "the weight file")


def make_grid(grid: Any) -> Grid:
    """Returns ``grid``, or two numbers, as a ``Grid``; raises ``UserError`` for others."""
    sides = [grid.time, grid.freq] if isinstance(grid, Grid) else grid
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise UserError("encoder: grid must be two numbers, patches in time and frequency")
    named = dict(zip(("grid.time", "grid.freq"), sides, strict=True))
    check_settings("encoder", named, dict.fromkeys(named, (int, 1, MAX_TOKENS)))
    return Grid(*sides)


def make_pad(given: Any) -> dict[str, Any]:
    """Returns the keywords ``pad`` and ``clip_seconds`` of a front end that is fixed otherwise."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not set(given) <= {"pad", "clip_seconds"}:
        raise UserError(f"frontend={in_short(given)}: here it takes pad and clip_seconds only")
    return dict(given)


def without(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with none of ``names``."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(names)}


def shape_of(
    state: Mapping[str, Tensor],
    axes: Mapping[str, int],
    *,
    path: Path,
    kind: str,
    heads: int | None,
) -> dict[str, Any]:
    """Infers width, depth, heads and MLP ratio from a state dict.

    ``axes``: further names that must be there, with their numbers of axes. ``path``, ``kind``: the
    file and the encoder's name, for messages. ``heads`` None: 64
    channels a head, or 80 if the width is 1280 (Dasheng 0.6B). Raises ``UserError`` for a state
    dict of another kind.
    """
    needed = {"blocks.0.norm1.weight": 1, "blocks.0.mlp.fc1.weight": 2, **axes}
    wrong = [
        f"{name} {tuple(state[name].shape) if name in state else 'missing'}"
        for name, n in needed.items()
        if name not in state or state[name].dim() != n or 0 in state[name].shape
    ]
    if wrong:
        found = ", ".join(n[:100] for n in list(state)[:8]) or "nothing"
        raise UserError(f"{path}, as {kind}: {'; '.join(wrong)}. It holds {found}")
    width = state["blocks.0.norm1.weight"].shape[0]
    if heads is None:
        each = 80 if width == 1280 else 64
        if width % each:
            raise UserError(
                f"{path} does not say its number of heads and its width {width} is not a multiple "
                f"of {each}: give it, load_encoder(path, heads=4) or heads=4"
            )
        heads = width // each
    ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    return {"width": width, "depth": block_count(state, kind), "heads": heads, "mlp_ratio": ratio}
