"""Diagnostics of encoders: statistics of the blocks, patches that prototypes select, monitors.

``sinks``: share of the attention that the most attended token receives (``nn/sinks.py``), mean over
clips and heads; also with every gate of the encoder opened (factor 1 instead of the sigmoid), which
shows how much of it the trained gates account for. ``norms``, ``rank`` and ``spread`` of patches
and class tokens: see ``collapse.py``; the latter two are None if there are too few clips,
or if all of them sound the same.

For clips in chunks only the first chunk is used. With a fixed number of ``frames``, patches that
begin after a clip's end are excluded from norms, rank and spread; attention includes them, so they
count in sinks.
Computed in float32 whatever the run's precision (see ``collapse.py`` for the reason).

``knn_scores``, ``lidar`` and RankMe (``collapse.effective_rank`` with ``RANKME_EPS``) are functions
of vectors; ``bat/train/monitors.py`` says which vectors a pre-training run gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bat.audio.frontend import LogMel
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.collapse import SAME, TokenStatistics, plain_float32
from bat.eval.features import device_of, encode, evaluating, to_device
from bat.nn.attention import Attention
from bat.nn.losses import to_clip
from bat.nn.sinks import sink_share
from bat.probes.base import Probe
from bat.probes.maps import evidence
from bat.types import WaveBatch

MAX_HOP = 512
"""Largest hop in samples between frames of pictures of encoders without a spectrogram."""


@torch.no_grad()
def encoder_statistics(
    backbone: Encoder, batches: Iterable[WaveBatch], *, frames: int | None
) -> dict[str, Any]:
    """Returns the statistics above over all clips of ``batches``: JSON values, lists by block.

    ``frames`` of each clip; None: each clip has its own number.

    ``{"clips": n, "sinks": {"gate on": [L], "gate off": [L] | None, "uniform": 1 / tokens, mean
    over clips} | None,
    "norms": {"patches": [[mean, std, max]], "cls": ...}, "rank": {"patches": [L], "cls": ...},
    "spread": {"patches": [L], "cls": ...}}``; ``cls`` is None without class token, ``sinks`` for an
    encoder that does not attend by ``bat.nn.attention`` once per block. Weights, modes and random
    state are left unchanged. Raises ``UserError`` if no clip is readable or features are not
    finite.
    """
    device, L = device_of(backbone), backbone.depth
    patches = [TokenStatistics() for _ in range(L)]
    classes = [TokenStatistics() for _ in range(L)] if backbone.has_cls else []
    input_statistics, sinks = TokenStatistics(), _Sinks(backbone)
    draws = torch.Generator().manual_seed(0)
    with plain_float32(backbone, device.type):
        for batch in (batch for batch in batches if batch.keys):
            waves, lengths = batch.waves.to(device), batch.lengths.to(device)
            inputs = backbone.inputs(waves, lengths, frames=frames)
            T = backbone.time_patches(waves.shape[1])
            if frames is not None and isinstance(backbone, SpectrogramEncoder):
                T = backbone.patches_of(frames)
            T = min(T, backbone.max_patches or T)
            inputs = backbone.first(inputs, T)
            valid = torch.full_like(lengths, T)
            if frames is None:
                valid = torch.minimum(valid, backbone.time_patches(lengths))
            with sinks.recorded("gate on"):
                features = backbone.features_alone(inputs, valid, total=T)
            if sinks.gated:
                with sinks.recorded("gate off"), opened(sinks.gated):
                    backbone.features_alone(inputs, valid, total=T)
            _check(features.patches, batch.keys)
            B, bands = len(batch.keys), features.patches.shape[3]
            steps, inside, steps_inside = _time_steps(backbone, waves, lengths, inputs, T)
            input_statistics.add(steps, steps_inside, steps_inside.float())
            draw = torch.rand(B, T * bands, generator=draws).to(device)
            for statistics, block in zip(patches, features.patches, strict=True):
                statistics.add(block.flatten(1, 2), inside.repeat_interleave(bands, dim=1), draw)
            if classes and features.cls is not None:
                for statistics, block in zip(classes, features.cls, strict=True):
                    statistics.add(block[:, None], inside[:, :1], draw[:, :1])
    if not input_statistics.clips:
        raise UserError("none of the clips for diagnostics.encoder can be read")
    same = (input_statistics.spread() or 0.0) < SAME

    def by_kind(what: str, *, known: bool = True) -> dict[str, Any]:
        return {
            kind: [getattr(block, what)() if known else None for block in blocks] or None
            for kind, blocks in (("patches", patches), ("cls", classes))
        }

    return {
        "clips": input_statistics.clips,
        "sinks": sinks.shares(input_statistics.clips),
        "norms": by_kind("norms"),
        "rank": by_kind("rank", known=not same),
        "spread": by_kind("spread", known=not same),
    }


def best_clips(logits: Tensor, targets: Tensor, *, count: int) -> list[tuple[int, int]]:
    """Returns pairs (class, row): for each of ``count`` classes its clip with the highest score.

    ``logits`` and ``targets`` (n, C). The classes are those with most clips, ties in order of the
    labels; there are fewer pairs if fewer classes have any clip.
    """
    has = targets > 0
    clips = has.sum(0)
    order = clips.argsort(descending=True, stable=True)[:count]
    classes = sorted(int(c) for c in order if clips[c])
    best = logits.float().masked_fill(~has, -math.inf).argmax(0)  # (C,)
    return [(c, int(best[c])) for c in classes]


@torch.no_grad()
def prototype_maps(
    probe: Probe,
    backbone: Encoder,
    batches: Iterable[WaveBatch],
    *,
    classes: Sequence[int],
    labels: Sequence[str],
    frames: int | None,
    autocast: torch.dtype | None = None,
    top: int = 10,
) -> list[dict[str, Any]]:
    """Returns the patches that a class's prototypes select in clips, for ``report.probe_plots``.

    ``batches`` of ``eval_loader(index, ids)``; ``classes[i]`` is the class to explain in the
    i-th of these; ``labels`` names all classes. One dictionary per readable clip: ``label``,
    ``key``, ``logit``, ``spectrogram`` (frames, mels), ``evidence`` (T, F) (``probes/maps.py``),
    ``hop_ms`` between frames and ``seconds``, the length of the clip in the picture. Raises
    ``UserError`` for a probe without prototypes.
    """
    found = []
    with evaluating(backbone), evaluating(probe):
        for batch in batches:
            if not batch.keys:
                continue
            pictures, steps = spectrograms(backbone, batch, frames)
            features = encode(backbone, batch, frames=frames, autocast=autocast)
            features = to_device(features, device_of(probe))
            with torch.autocast(device_of(probe).type, autocast, enabled=autocast is not None):
                logits = to_clip(probe(features), features.inside()).float().cpu()  # (B, C)
            for row, key in enumerate(batch.keys):
                wanted = classes[int(batch.positions[row])]
                one = features.clip(row)
                picture = pictures[row, : one.patches.shape[2] * steps]
                hop = 1000 * backbone.hop_seconds / steps
                seconds = int(batch.lengths[row]) / backbone.sample_rate
                found.append(
                    {
                        "label": labels[wanted],
                        "key": key,
                        "logit": float(logits[row, wanted]),
                        "spectrogram": picture.cpu().numpy(),
                        "evidence": evidence(probe, one, wanted, top=top).map[0].cpu().numpy(),
                        "hop_ms": hop,
                        "seconds": min(seconds, len(picture) * hop / 1000),
                    }
                )
    return found


def _time_steps(
    backbone: Encoder, waves: Tensor, lengths: Tensor, inputs: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns frames or samples of clips (B, n, numbers), a mask (B, T) of the time patches that
    begin within the clip, and a mask (B, n) of the n steps that do."""
    steps = torch.arange(T, device=inputs.device)
    if isinstance(backbone, SpectrogramEncoder):
        front: Any = backbone.frontend
        inside = steps * backbone.step < front.valid_frames(lengths)[:, None]
        frames = inputs[:, 0, : T * backbone.step]
        return frames, inside, inside.repeat_interleave(backbone.step, dim=1)
    inside = steps < backbone.time_patches(lengths)[:, None]
    hop = round(backbone.hop_seconds * backbone.sample_rate)
    waves = F.pad(waves, (0, max(0, T * hop - waves.shape[1])))[:, : T * hop]
    return waves.unflatten(1, (T, hop)), inside, inside


def spectrograms(backbone: Encoder, batch: WaveBatch, frames: int | None) -> tuple[Tensor, int]:
    """Returns spectrograms (B, frames, mels) of a batch, for pictures, and frames per time patch.

    The spectrogram is the encoder's own, or a log-mel if it has none.
    """
    waves, lengths = batch.waves.to(device_of(backbone)), batch.lengths.to(device_of(backbone))
    if isinstance(backbone, SpectrogramEncoder):
        return backbone.inputs(waves, lengths, frames=frames)[:, 0], backbone.step
    hop = round(backbone.hop_seconds * backbone.sample_rate)
    steps = -(-hop // MAX_HOP)
    front = LogMel(sample_rate=backbone.sample_rate, hop_length=hop // steps).to(waves.device)
    count = steps * backbone.time_patches(waves.shape[1])
    return front(waves, frames=count, lengths=lengths)[:, 0], steps


def _check(patches: Tensor, keys: Sequence[str]) -> None:
    for number, block in enumerate(patches, start=1):
        finite = block.isfinite().flatten(1).all(1)
        if not finite.all():
            key = keys[int((~finite).nonzero()[0])]
            raise UserError(
                f"the encoder's features are not finite (clip {key}, block {number}): its weights "
                "are damaged; diagnostics.encoder=false leaves its statistics out"
            )


class _Sinks:
    """Sink shares of every block, summed over clips."""

    def __init__(self, backbone: Encoder) -> None:
        found = [part for part in backbone.modules() if isinstance(part, Attention)]
        self.attentions = found if len(found) == backbone.depth else []
        self.gated = [part for part in self.attentions if part.gate is not None]
        self.total: dict[str, Tensor] = {}
        self.uniform = 0.0

    @contextmanager
    def recorded(self, name: str) -> Iterator[None]:
        """Records the attention of forward passes of the encoder under ``name``."""
        total = self.total.setdefault(name, torch.zeros(len(self.attentions), dtype=torch.float64))

        def record(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]  # (B, n, D)
            if name == "gate on" and attention is self.attentions[0]:
                self.uniform += x.shape[0] / x.shape[1]
            total[self.attentions.index(attention)] += float(sink_share(attention, x).mean(1).sum())

        hooks = [part.register_forward_pre_hook(record) for part in self.attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def shares(self, clips: int) -> dict[str, Any] | None:
        if not self.attentions:
            return None
        off = (self.total["gate off"] / clips).tolist() if self.gated else None
        on = (self.total["gate on"] / clips).tolist()
        return {"gate on": on, "gate off": off, "uniform": self.uniform / clips}


@contextmanager
def opened(attentions: Sequence[Attention]) -> Iterator[None]:
    """Opens the gates (factor 1) without changing any weight."""
    gates = [part.gate for part in attentions]
    try:
        for part in attentions:
            part.gate = None
        yield
    finally:
        for part, gate in zip(attentions, gates, strict=True):
            part.gate = gate


KS = (10, 20, 100, 200)
"""Neighbours of ``knn_scores``, as DINO evaluates."""
TEMPERATURE = 0.07
RANKME_EPS = 1e-7


def knn_scores(
    train: Tensor, labels: Tensor, queries: Tensor, *, ks: Sequence[int] = KS
) -> dict[int, Tensor]:
    """Returns for each k the label average over a query's k nearest neighbours, (m, C) float64.

    Nearest by cosine; the average is weighted by ``softmax(cosine / 0.07)`` over the k neighbours
    (Caron et al. 2021, arXiv 2104.14294), so several labels a clip give a score per class, too. A k
    above n is n, under its own number.

    Args:
        train: vectors (n, D) of the clips with known labels.
        labels: their labels (n, C) in [0, 1].
        queries: vectors (m, D).
    """
    known, labels = F.normalize(train.double(), dim=1), labels.double()
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for some in F.normalize(queries.double(), dim=1).split(1024):
        similar, at = (some @ known.T).topk(min(max(ks), len(known)), dim=1)  # descending
        for k, scores in found.items():
            weights = (similar[:, :k] / TEMPERATURE).softmax(1)  # (m, k)
            scores.append((weights[..., None] * labels[at[:, :k]]).sum(1))
    return {k: torch.cat(scores) for k, scores in found.items()}


def lidar(views: Tensor, *, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Returns LiDAR (Thilak et al. 2024, arXiv 2312.04000) of views (n, q, D) of n clips.

    It is the number of directions in which clips differ more than views of one clip do, the
    effective rank of linear discriminant analysis with a class per clip; at most min(D, n - 1):

        S_b = sum_i (m_i - m) (m_i - m)^T / (n - 1)             m_i: mean of clip i, m: of all
        S_w = sum_ij (x_ij - m_i) (x_ij - m_i)^T / (n (q - 1)) + delta I
        l   = eigenvalues of S_w^(-1/2) S_b S_w^(-1/2), at least 0;   p = (l + eps) / sum(l + eps)
        exp(- sum p ln p)

    NaN if ``views`` are not finite. Needs n >= 2 and q >= 2.
    """
    x = views.detach().double().cpu()
    n, q, D = x.shape
    if not x.isfinite().all():
        return math.nan
    means = x.mean(1)  # (n, D)
    between = (means - means.mean(0)) / math.sqrt(n - 1)
    within = (x - means[:, None]).flatten(0, 1) / math.sqrt(n * (q - 1))
    values, vectors = torch.linalg.eigh(within.T @ within)
    # l are the squared singular values of the root of S_b times S_w^(-1/2)
    white = between @ (vectors * (values.clamp(min=0) + delta).rsqrt())  # (n, D)
    share = torch.zeros(D, dtype=torch.float64)
    found = torch.linalg.svdvals(white).square()
    share[: len(found)] = found
    share = (share + eps) / (share + eps).sum()
    return float(torch.special.entr(share).sum().exp())
