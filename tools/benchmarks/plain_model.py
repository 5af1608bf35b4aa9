"""The plain student and teacher: how code of this kind (MAE, data2vec 2.0, EAT) is usually written.

Patch convolution over all patches of every view, then the visible ones gathered; separate ``qkv``
and ``gate`` linears; matmul-softmax-matmul; mask tokens appended and shuffled back (MAE); all
blocks of the decoder over all patches; every block's output kept for the targets. Names are the
paper's (docs/method.md 7), so weights go both ways strictly. Post-norm BAT only, no ablation, no
drop path.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.config.schema import Pretrain

EPS = 1e-6


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, n, D = x.shape
        qkv = self.qkv(x).reshape(B, n, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, n, d)
        weights = (q * self.scale) @ k.transpose(-2, -1)  # (B, H, n, n)
        out = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, n, D)
        return self.proj(out * torch.sigmoid(self.gate(x)))


class PlainMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = PlainAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.mlp = PlainMlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class PlainPatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, frames, mels) -> (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class PlainEncoder(nn.Module):
    pos_embed: Tensor

    def __init__(self, *, width: int, depth: int, heads: int, tokens: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PlainPatchEmbed(width, patch)
        self.register_buffer("pos_embed", torch.zeros(1, tokens, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pre_norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, 4.0) for _ in range(depth))

    def forward(self, spectrogram: Tensor, keep_ids: Tensor | None = None) -> list[Tensor]:
        """(rows, 1, frames, mels), one a view, and (rows, n) ids -> every block's (rows, 1 + n, D).

        Without ids all patches are seen.
        """
        x = self.patch_embed(spectrogram) + self.pos_embed  # (rows, N, D)
        if keep_ids is not None:
            x = torch.gather(x, 1, keep_ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pre_norm(x)
        layers = []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        return layers


class PlainDecoder(nn.Module):
    def __init__(
        self, encoder_width: int, *, width: int, depth: int, heads: int, ratio: float, tokens: int
    ) -> None:
        super().__init__()
        self.in_proj = (
            nn.Linear(encoder_width, width, bias=False) if width != encoder_width else nn.Identity()
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, ratio) for _ in range(depth))
        self.out_proj = nn.Linear(width, encoder_width, bias=False)

    def forward(self, visible: Tensor, restore_ids: Tensor) -> Tensor:
        """(rows, n, D) visible tokens and (rows, N) places -> (rows, N, D) predictions."""
        x = self.in_proj(visible)
        rows, n, D = x.shape
        hidden = self.mask_token.repeat(rows, restore_ids.shape[1] - n, 1)
        x = torch.cat([x, hidden], dim=1)
        x = torch.gather(x, 1, restore_ids.unsqueeze(-1).repeat(1, 1, D))  # (rows, N, D)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.out_proj(x)


class PlainStudent(nn.Module):
    def __init__(self, encoder: PlainEncoder, decoder: PlainDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, spectrogram: Tensor, keep_ids: Tensor, restore_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (rows, D) and predictions (rows, N, D)."""
        x = self.encoder(spectrogram, keep_ids)[-1]
        return x[:, 0], self.decoder(x[:, 1:], restore_ids)


class PlainTeacher(nn.Module):
    def __init__(self, encoder: PlainEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(B, 1, frames, mels) -> targets (B, N, D): all blocks stacked in float32."""
        layers = self.encoder(spectrogram)
        stacked = torch.stack([layer[:, 1:].float() for layer in layers])  # (L, B, N, D)
        L, B, N, D = stacked.shape
        channels = stacked.reshape(L * B, N, D).transpose(1, 2)  # (L B, D, N)
        channels = F.instance_norm(channels, eps=EPS)
        mean = channels.transpose(1, 2).reshape(L, B, N, D).mean(0)
        return F.layer_norm(mean, (D,), eps=EPS)


def plain_model(config: Pretrain) -> tuple[PlainStudent, PlainTeacher]:
    """Student and teacher of a configuration of the paper's kind; weights are to be loaded."""
    model, front, objective = config.model, config.frontend, config.objective
    usual = (
        model.gate
        and model.norm_order == "post"
        and model.mlp_ratio == 4
        and model.drop_path == 0
        and objective.decoder in ("vit12h", "vit6h")
        and (objective.target, objective.global_target) == ("eob", "patch_mean")
        and objective.target_centering == "none"
    )
    assert usual, "the plain step is BAT's own, no ablation"
    tokens = (front.frames // model.patch) * (front.n_mels // model.patch)
    encoder = PlainEncoder(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        tokens=tokens,
        patch=model.patch,
    )
    decoder = PlainDecoder(
        model.width,
        width=objective.width_in(model.width),
        depth=objective.decoder_depth,
        heads=12 if objective.decoder == "vit12h" else 6,
        ratio=4.0 if objective.decoder == "vit12h" else 2.0,
        tokens=tokens,
    )
    return PlainStudent(encoder, decoder), PlainTeacher(encoder)
