"""EAT and SSLAM encoders (fairseq data2vec 2.0 files): BAT's block without its gate.

Patches and post-norm blocks are the same; the front end is the legacy Kaldi filter bank with the
data set's statistics. The file's position table may be longer than the 512 rows that are used.
Fresh weights are drawn as EAT draws them: linears N(0, 0.02), the class token N(0, 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from bat.encoders.bat import BAT
from bat.encoders.strict import demand
from bat.errors import UserError

PREFIX = "modality_encoders.IMAGE."
POSITIONS = 512

NAMES = {
    "extra_tokens": "cls_token",
    "fixed_positional_encoder.positions": "pos_embed",
    "local_encoder.proj.weight": "patch_embed.proj.weight",
    "local_encoder.proj.bias": "patch_embed.proj.bias",
    "context_encoder.norm.weight": "pre_norm.weight",
    "context_encoder.norm.bias": "pre_norm.bias",
}
"""Map of names below ``modality_encoders.IMAGE.`` to the encoder's; ``blocks.*`` are unchanged. Hub
folders use them without that prefix, and ``pre_norm.*``."""

NOT_THE_ENCODER = (
    f"{PREFIX}decoder.",
    "recon_proj.",
    "cls_proj.",
    "shared_decoder.",
)
"""Entries of a pre-training file besides the encoder (with ``center``)."""
HUB_FIXED = {
    **{"layer_norm_first": False, "norm_eps": 1e-6, "norm_affine": True, "qkv_bias": True},
    **{"in_chans": 1, "mel_bins": 128},
}
"""Fixed settings, with the names of ``config.json`` in EAT's hub folders."""


class EAT(BAT):
    """An EAT or SSLAM encoder."""

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds from the names of an original file or of a bat export, both strictly."""
        if config is None:
            state = rename(state)
        return super().from_weights(state, config=config, heads=heads)

    @classmethod
    def matches(cls, names: Collection[str], settings: Mapping[str, Any]) -> bool:
        if "model_variant" in settings or "model_type" in settings:
            return "model_variant" in settings or settings["model_type"] in ("eat", "sslam")
        return "extra_tokens" in names or any(n.startswith("modality_encoders.") for n in names)

    @classmethod
    def from_file(
        cls,
        state: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Any],
        path: Path,
        heads: int | None,
    ) -> Self:
        """Builds from a file of fairseq or a hub folder; see ``Encoder.from_file``."""
        demand(settings, HUB_FIXED, str(path))
        heads = settings.get("num_heads") if heads is None else heads
        return cls.from_weights(state, config=None, heads=heads)

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("gate", False)
        keywords.setdefault("pos_layout", "eat")
        if keywords.get("frontend") is None:
            keywords["frontend"] = {"kind": "eat"}
        super().__init__(**keywords)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        patches = self.patch_embed.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.cls_token)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the encoder's tensors under the paper's names; raises an error for unknown names."""
    renamed, unknown = {}, []
    for name, tensor in state.items():
        own = NAMES.get(name.removeprefix(PREFIX), name)
        if own not in renamed and (own in NAMES.values() or name.startswith("blocks.")):
            renamed[own] = tensor
        elif name != "center" and not name.startswith(NOT_THE_ENCODER):
            unknown.append(name[:100])
    if unknown:
        raise UserError(
            f"not an EAT / SSLAM file as we know it; unexpected: {', '.join(unknown[:40])}"
        )
    if "pos_embed" in renamed and renamed["pos_embed"].dim() == 3:
        renamed["pos_embed"] = renamed["pos_embed"][:, :POSITIONS]
    return renamed


ENCODER = EAT
