"""Evidence maps: the patches that speak for a class, for probes with prototypes.

A prototype k depends on a clip through the patches it picks: the one with the highest similarity
and, in ``cgp``, also the one with the lowest. The contribution of a pick to class c's logit is

    v[c, k, e] = w[c, k, e] * s[k, e],                  e: lowest or highest

the output layer's weight times the similarity there, with its own sign. The contribution of a
prototype is the sum of its v; the ``top`` prototypes with the largest are the strongest of this
class on this clip, and the map is the sum of their v at the patches they picked. All other terms of
the logit (the other prototypes, the bias, the class token of ``cgp`` or its mean over patches) have
no position among the patches and are omitted. At frame level a prototype picks one patch in every
time patch, over frequency; v is divided by T there, as in the clip's mean logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bat.errors import UserError
from bat.probes.base import Probe, fill_padding, known_probes
from bat.probes.cgp import CGP
from bat.probes.mixing import mix_normalised
from bat.probes.proto import Proto
from bat.probes.protobin import ProtoBin
from bat.types import Features


class Evidence(NamedTuple):
    """Evidence for a class. E is 2 (lowest, highest) for ``cgp``, else 1; S is 1, or T at frame
    level."""

    map: Tensor
    """Evidence for the class at each patch, (B, T, F)."""
    prototypes: Tensor
    """The strongest prototypes, the strongest first, (B, top)."""
    contribution: Tensor
    """Contribution of each to the logit, (B, top)."""
    patches: Tensor
    """Patches they pick, as ``t * F + f``, (B, top, E, S)."""


@torch.no_grad()
def evidence(probe: Probe, features: Features, class_id: int, *, top: int = 10) -> Evidence:
    """Returns the map above for ``class_id`` on each clip of ``features``, float32.

    Raises ``UserError`` for a probe without prototypes.
    """
    tokens, prototypes, weight, signs, first = _reading(probe, features, class_id)
    B, T, F, _ = tokens.shape
    frame = probe.level == "frame"
    S, E = T if frame else 1, weight.shape[1]
    groups = tokens.flatten(0, 1) if frame else fill_padding(tokens, features).flatten(1, 2)
    similarity, picks = torch.ops.bat.pool_prototypes(
        groups, prototypes, None, E == 2, signs, tokens.dtype
    )  # of groups (B S, M, D): (B S, K, E), (K, E, B S)
    value = (similarity * weight / S).unflatten(0, (B, S)).permute(0, 2, 3, 1)  # (B, K, E, S)
    inside = features.inside()
    if frame and inside is not None:  # the mean is over the clip's own time patches
        own = inside[:, None, None]  # (B, 1, 1, S)
        value = (value * S / own.sum(-1, keepdim=True)).masked_fill(~own, 0.0)
    at = picks.long().unflatten(2, (B, S)).permute(2, 0, 1, 3)  # (B, K, E, S)
    if frame:
        at = at + F * torch.arange(T, device=at.device)
    total = value.sum((2, 3))  # (B, K)
    contribution, best = total.topk(min(top, total.shape[1]))  # (B, top)
    rows = torch.arange(B, device=best.device)[:, None]
    at, value = at[rows, best], value[rows, best]  # (B, top, E, S)
    flat = torch.zeros(B, T * F, dtype=value.dtype, device=value.device)
    flat.scatter_add_(1, at.flatten(1), value.flatten(1))
    return Evidence(flat.view(B, T, F), best + first, contribution, at)


class _Reading(NamedTuple):
    """Tokens, prototypes and output weights by which a probe scores a class."""

    tokens: Tensor
    """Tokens (B, T, F, D)."""
    prototypes: Tensor
    """Prototypes (K, D)."""
    weight: Tensor
    """Weights (K, E)."""
    signs: bool = False
    first: int = 0
    """Number of the first of these prototypes among the probe's."""


def _reading(probe: Probe, features: Features, class_id: int) -> _Reading:
    if isinstance(probe, CGP):
        tokens = mix_normalised(features.patches, probe.layer_logits.softmax(0))
        ends = probe.fc.weight[class_id].unflatten(0, (-1, 3))[:, ::2]  # (K, 2)
        return _Reading(tokens, probe.prototypes, ends)
    if not isinstance(probe, ProtoBin | Proto):
        raise UserError(
            f"{type(probe).__name__} has no prototypes whose patches could be drawn; these have: "
            + ", ".join(name for name, p in known_probes().items() if p.has_prototypes)
        )
    last = features.patches[-1:]
    tokens = mix_normalised(last, last.new_ones(1))
    if isinstance(probe, ProtoBin):
        weight = probe.fc.weight[class_id][:, None]
        return _Reading(tokens, probe.prototypes, weight, signs=probe.signs)
    weight = probe.class_weights[class_id][:, None]  # (J, 1)
    first = class_id * len(weight)
    return _Reading(tokens, probe.prototypes[first : first + len(weight)], weight, first=first)
