"""The probes of docs/method.md 4 the slow way: loops over everything.

Tokens are (L, B, T, F, D), class tokens (L, B, D); weights are those of ``bat.probes``.
"""

import torch
from torch import Tensor, nn


def direction(x: Tensor) -> Tensor:
    """A vector divided by its L2 norm."""
    return x / (x * x).sum() ** 0.5


def mixed(layers: Tensor, gate: Tensor) -> Tensor:
    """``sum_l gate_l n(layers_l)`` of vectors (L, D) -> (D,)."""
    total = torch.zeros_like(layers[0])
    for weight, vector in zip(gate, layers, strict=True):
        total = total + weight * direction(vector)
    return total


def three(similarities: Tensor, middle: Tensor) -> Tensor:
    """[min, middle, max] of one prototype."""
    return torch.stack([similarities.min(), middle, similarities.max()])


def cgp(
    patches: Tensor,
    cls: Tensor | None,
    layer_logits: Tensor,
    prototypes: Tensor,
    weight: Tensor,
    bias: Tensor,
    level: str,
    *,
    mean_as_cls: bool = False,
) -> Tensor:
    """Logits (B, C) or (B, T, C). ``mean_as_cls``: each block's mean patch is its class token."""
    _, B, T, freqs, _ = patches.shape
    if mean_as_cls:
        count = T * freqs
        cls = sum(patches[:, :, t, f] for t in range(T) for f in range(freqs)) / count  # (L, B, D)
    gate = layer_logits.exp() / layer_logits.exp().sum()
    answers = []
    for b in range(B):
        tokens = [[mixed(patches[:, b, t, f], gate) for f in range(freqs)] for t in range(T)]
        groups = tokens if level == "frame" else [[z for row in tokens for z in row]]
        for group in groups:
            row = []
            for prototype in prototypes:
                p = direction(prototype)
                s = torch.stack([(z * p).sum() for z in group])
                middle = s.mean()
                if level == "clip" and cls is not None:
                    middle = (mixed(cls[:, b], gate) * p).sum()
                row.append(three(s, middle))
            answers.append(weight @ torch.cat(row) + bias)
    logits = torch.stack(answers)
    return logits.view(B, T, -1) if level == "frame" else logits


def protobin(
    patches: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, level: str, *, signs: bool
) -> Tensor:
    """Logits; ``signs``: of binary prototypes (no straight-through gradient here: forward only),
    else of real-valued ones."""
    used = torch.where(prototypes >= 0, 1.0, -1.0) if signs else prototypes
    return best(patches, used, level) @ weight.T + bias


def pooled(
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None = None,
    *,
    low: bool = True,
    signs: bool = False,
) -> Tensor:
    """[min, middle, max] with all similarities stored: (G, M, D), (K, D), (G, D) -> (G, K, P)."""
    if signs:  # straight through: forward the sign, backward the identity
        sign = torch.where(prototypes >= 0, 1.0, -1.0)
        prototypes = prototypes + (sign - prototypes).detach()
    directions = prototypes / (prototypes * prototypes).sum(-1, keepdim=True) ** 0.5
    s = torch.einsum("gmd,kd->gmk", tokens, directions)
    columns = [s.min(1).values] if low else []
    if middle is not None:
        columns.append(torch.einsum("gd,kd->gk", middle, directions))
    return torch.stack([*columns, s.max(1).values], -1)


def proto(
    patches: Tensor, prototypes: Tensor, class_weights: Tensor, bias: Tensor, level: str
) -> Tensor:
    """Logits; prototypes class by class, each class sees its own."""
    s, J = best(patches, prototypes, level), class_weights.shape[1]
    rows = [
        sum(class_weights[c, j] * s[..., c * J + j] for j in range(J)) + bias[c]
        for c in range(len(class_weights))
    ]
    return torch.stack(rows, -1)


def orthogonality(prototypes: Tensor, classes: int) -> Tensor:
    """Mean over classes of the squared cosines of all pairs, and of 1 - 1 on the diagonal."""
    total = torch.zeros(())
    for own in prototypes.chunk(classes):
        for i, p in enumerate(own):
            for k, other in enumerate(own):
                cosine = (direction(p) * direction(other)).sum()
                total = total + (cosine - int(i == k)) ** 2
    return total / classes


def best(patches: Tensor, prototypes: Tensor, level: str) -> Tensor:
    """Highest cosine to each prototype, (B, K) or (B, T, K)."""
    _, B, T, freqs, _ = patches.shape
    groups = []
    for b in range(B):
        tokens = [[direction(patches[-1, b, t, f]) for f in range(freqs)] for t in range(T)]
        groups += tokens if level == "frame" else [[z for row in tokens for z in row]]
    rows = [
        torch.stack([torch.stack([(z * direction(p)).sum() for z in g]).max() for p in prototypes])
        for g in groups
    ]
    found = torch.stack(rows)
    return found.view(B, T, -1) if level == "frame" else found


def mhca(tokens: Tensor, query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """One query, H heads, keys and values of every token: (N, D) -> (D,)."""
    k, v = tokens @ keys.T, tokens @ values.T  # (N, D)
    parts = []
    for q_h, k_h, v_h in zip(query.chunk(heads), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        share = (k_h @ q_h / len(q_h) ** 0.5).softmax(0)
        parts.append(share @ v_h)
    return torch.cat(parts)


def ep(tokens: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """Each query pools its own chunk of the values: (N, D) -> (D_out,)."""
    chunks = (tokens @ values.T).chunk(len(queries), 1)
    shares = [(tokens @ q / len(q) ** 0.5).softmax(0) for q in queries]
    return torch.cat([share @ chunk for share, chunk in zip(shares, chunks, strict=True)])


def simpool(tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(N, D) -> (D,)."""
    rows = [(z - z.mean()) / (z.var(unbiased=False) + 1e-6) ** 0.5 * scale + shift for z in tokens]
    x = torch.stack(rows)
    share = (x @ x.mean(0) / x.shape[1] ** 0.5).softmax(0)
    return share @ x


def abmilp(
    tokens: Tensor, weight: Tensor, bias: Tensor, score: Tensor, score_bias: Tensor
) -> Tensor:
    """(N, D) -> (D,)."""
    scores = [score[0] @ torch.tanh(weight @ z + bias) + score_bias[0] for z in tokens]
    return torch.stack(scores).softmax(0) @ tokens


def through_block(block: nn.Module, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, q, D) and tokens (B, n, D) through a block of ``bat.nn.block``; both attend to
    the tokens only. Keys and values of all tokens, one head after the other."""
    attn, q = block.attn, queries.shape[1]
    every = torch.cat([queries, x], 1)
    normed = block.norm1(every) if block.norm_order == "pre" else every
    to_q, to_k, to_v = attn.qkv(normed).chunk(3, -1)
    heads = zip(*(t.chunk(attn.heads, -1) for t in (to_q, to_k[:, q:], to_v[:, q:])), strict=True)
    mixed = torch.cat(
        [(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in heads], -1
    )
    if attn.gate is not None:
        mixed = mixed * torch.sigmoid(attn.gate(normed))
    every = every + block.ls1(attn.proj(mixed))
    if block.norm_order == "post":
        every = block.norm1(every)
        every = block.norm2(every + block.ls2(block.mlp(every)))
    else:
        every = every + block.ls2(block.mlp(block.norm2(every)))
    return every[:, :q], every[:, q:]


def query_blocks(encoder: nn.Module, spectrogram: Tensor, queries: Tensor) -> Tensor:
    """Learned tokens (L, q, D) beside the encoder's own, from the spectrogram: (L, B, q, D)."""
    chunks = []
    for chunk in spectrogram.split(encoder.grid.time * encoder.patch, dim=2):
        tokens = encoder.embed_patches(chunk)
        cls = encoder.cls_token.expand(len(tokens), -1, -1)
        x = encoder.pre_norm(torch.cat([cls, tokens], 1))
        became = []
        for block, own in zip(encoder.blocks, queries, strict=True):
            out, x = through_block(block, own.expand(len(x), -1, -1), x)
            became.append(out)
        chunks.append(torch.stack(became))
    return torch.stack(chunks).mean(0)
