"""The Better Audio Transformer (BAT) for transformers: encoder and audio classification.

16 x 16 patches of a log-mel spectrogram -> linear embedding -> fixed sin-cos position code -> class
token -> LayerNorm -> blocks whose attention has a sigmoid gate. Without the gate it is the encoder
of EAT and SSLAM.

``input_values`` are (B, 1, frames, mels) as ``BatFeatureExtractor`` makes them (``input_features``
is another name of the same). ``attention_mask`` (B, T) is 1 for the time patches of each clip's
own sound; padding changes nothing. Spectrograms longer than one chunk are cut into chunks, each
encoded from position 0; patch tokens are concatenated along time, class tokens averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .configuration_bat import BatConfig


@dataclass
class BatModelOutput(ModelOutput):
    """Output of ``BatModel``; N = T F patch tokens, token i at time i // F and frequency i % F."""

    last_hidden_state: Tensor | None = None
    """(B, 1 + N, D) tokens after the last block, the class token first."""
    pooler_output: Tensor | None = None
    """(B, D) class token after the last block."""
    patch_tokens: Tensor | None = None
    """(B, D, T, F) patch tokens after the last block."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, 1 + N, D) tokens after each block."""


class BatPatchEmbed(nn.Module):
    def __init__(self, config: BatConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(1, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds (B, 1, frames, mels) as (B, N, D), time-major."""
        return self.proj(x).flatten(2).transpose(1, 2)


class BatAttention(nn.Module):
    def __init__(self, config: BatConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if config.use_gate else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps (B, n, D) to (B, n, D); ``mask`` (B, 1, 1, n) bool, True for the keys to see."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        return self.proj(out)


class BatMlp(nn.Module):
    def __init__(self, config: BatConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class BatLayerScale(nn.Module):
    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.s = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s


class BatBlock(nn.Module):
    def __init__(self, config: BatConfig, drop_path: float) -> None:
        super().__init__()
        width, scale = config.hidden_size, config.init_scale_values
        self.first, self.drop_path = config.layer_norm_first, drop_path
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = BatAttention(config)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = BatMlp(config)
        self.ls1 = nn.Identity() if scale is None else BatLayerScale(width, scale)
        self.ls2 = nn.Identity() if scale is None else BatLayerScale(width, scale)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.first:
            x = x + self._dropped(self.ls1(self.attn(self.norm1(x), mask)))
            return x + self._dropped(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self._dropped(self.ls1(self.attn(x, mask))))
        return self.norm2(x + self._dropped(self.ls2(self.mlp(x))))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Drops the branch of some rows in training (stochastic depth)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class BatPreTrainedModel(PreTrainedModel):
    config_class = BatConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    _no_split_modules = ["BatBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, BatLayerScale):
            nn.init.constant_(module.s, module.value)
        elif isinstance(module, BatModel):
            nn.init.normal_(module.cls_token, std=0.02)


class BatModel(BatPreTrainedModel):
    """The encoder."""

    pos_embed: Tensor

    def __init__(self, config: BatConfig) -> None:
        super().__init__(config)
        patch = config.patch_size
        self.time = min(config.chunk_time_patches, config.input_shape[0] // patch)
        self.freq = config.input_shape[1] // patch
        width, depth = config.hidden_size, config.num_hidden_layers
        self.patch_embed = BatPatchEmbed(config)
        code = position_code(width, self.time, self.freq, config.pos_layout)
        self.register_buffer("pos_embed", code)  # (1, N, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pre_norm = norm if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            BatBlock(config, config.drop_path_rate * b / max(1, depth - 1)) for b in range(depth)
        )
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BatModelOutput | tuple[Any, ...]:
        """Encodes (B, 1, frames, mels); see the head of the file and ``BatModelOutput``.

        ``frames`` that are no whole number of patches are filled up with zeros. Raises
        ``ValueError`` for another shape, of the input or of ``attention_mask`` (B, T).
        """
        x = input_features if input_values is None else input_values
        patch, mels = self.config.patch_size, self.freq * self.config.patch_size
        if x is None:
            raise ValueError("give input_values, (B, 1, frames, mels)")
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[3] != mels:
            raise ValueError(f"input_values of {tuple(x.shape)}: (B, 1, frames, {mels}) wanted")
        B, T = len(x), -(-x.shape[2] // patch)
        if attention_mask is not None and attention_mask.shape != (B, T):
            raise ValueError(f"attention_mask of {tuple(attention_mask.shape)}: ({B}, {T}) wanted")
        t = min(T, self.time)
        P = -(-T // t)  # chunks of t time patches
        inside = x.new_ones(B, T) if attention_mask is None else attention_mask
        inside = F.pad(inside.bool(), (0, P * t - T))  # (B, P t)
        x = F.pad(x, (0, 0, 0, P * t * patch - x.shape[2]))
        x = self.patch_embed(x.reshape(B * P, 1, t * patch, mels).to(self.cls_token.dtype))
        x = x + self.pos_embed[:, : t * self.freq].to(x.dtype)
        x = self.pre_norm(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        keys = inside.reshape(B * P, t).repeat_interleave(self.freq, dim=1)
        keys = F.pad(keys, (1, 0), value=True)[:, None, None]  # (B P, 1, 1, 1 + t F)
        mask = None if attention_mask is None and P * t == T else keys
        wanted = self.config.output_hidden_states
        wanted = wanted if output_hidden_states is None else output_hidden_states
        states = []
        for b, block in enumerate(self.blocks):
            x = block(x, mask)
            if wanted or b == len(self.blocks) - 1:
                states.append(self._whole(x, inside, T))
        last = states[-1]
        out = BatModelOutput(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            patch_tokens=last[:, 1:].unflatten(1, (T, self.freq)).permute(0, 3, 1, 2),
            hidden_states=tuple(states) if wanted else None,
        )
        return out if self._as_dict(return_dict) else out.to_tuple()

    def _whole(self, x: Tensor, inside: Tensor, T: int) -> Tensor:
        """Joins chunks: (B P, 1 + t F, D) to (B, 1 + T F, D), padding zero."""
        B, D = len(inside), x.shape[-1]
        P = len(x) // B
        used = inside.reshape(B, P, -1).any(-1)
        used = (used | ~used.any(1, keepdim=True)).to(x.dtype).unsqueeze(-1)  # (B, P, 1)
        cls = (x[:, 0].reshape(B, P, D) * used).sum(1, keepdim=True) / used.sum(1, keepdim=True)
        tokens = x[:, 1:].reshape(B, -1, D)  # (B, P t F, D)
        padding = ~inside.repeat_interleave(self.freq, dim=1)
        tokens = tokens.masked_fill(padding[..., None], 0.0)[:, : T * self.freq]
        return torch.cat([cls, tokens], dim=1)

    def _as_dict(self, asked: bool | None) -> bool:
        return bool(getattr(self.config, "return_dict", True)) if asked is None else asked


class BatHead(nn.Module):
    """LayerNorm, dropout and a linear layer on the class token."""

    def __init__(self, config: BatConfig) -> None:
        super().__init__()
        assert config.num_labels is not None
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, eps=1e-6) if config.head_norm else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout)
        self.fc = nn.Linear(width, config.num_labels)

    def forward(self, cls: Tensor) -> Tensor:
        return self.fc(self.dropout(self.norm(cls)))


class BatForAudioClassification(BatPreTrainedModel):
    """The encoder with a linear head. ``problem_type`` ``multi_label_classification``: targets
    (B, C) and binary cross-entropy; else targets (B,) and cross-entropy."""

    def __init__(self, config: BatConfig) -> None:
        super().__init__(config)
        self.encoder = BatModel(config)
        self.head = BatHead(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Returns logits (B, C), and the loss if ``labels`` are given."""
        encoded = self.encoder(
            input_values=input_values,
            attention_mask=attention_mask,
            input_features=input_features,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.head(encoded.pooler_output)
        loss = None
        if labels is not None:
            if self.config.problem_type == "multi_label_classification":
                loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
            else:
                loss = F.cross_entropy(logits, labels)
        out = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return out if self.encoder._as_dict(return_dict) else out.to_tuple()


def position_code(width: int, time: int, freq: int, layout: str) -> Tensor:
    """Returns the 2-D sin-cos table (1, N, D): half of the channels encode time, half frequency."""
    row = torch.arange(time * freq, dtype=torch.float64)
    at = (row % time, row // time) if layout == "reference" else (row // freq, row % freq)
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [x[:, None] * omega for x in (reversed(at) if layout == "eat" else at)]
    return torch.cat([f for a in angles for f in (a.sin(), a.cos())], dim=1)[None].float()
