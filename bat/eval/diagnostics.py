"""What an encoder's blocks are like, and which patches a probe's prototypes listen to.

``sinks``: the share of attention that the most attended token draws (``nn/sinks.py``), mean over
clips and heads; also with every gate of the encoder opened (factor 1 instead of the sigmoid), which
tells how much of it the trained gates take upon themselves. ``norms``, ``rank`` and ``spread`` of
patches and class tokens: see ``token_statistics.py``; the latter two are None where too few clips
were given to say, or all of them sound the same.

Of clips in chunks the first chunk counts. With a fixed number of ``frames``, patches that begin
behind a clip's end are left out of norms, rank and spread; attention sees them, so in sinks they
count.
In float32, whatever the run computes in (``collapse.py`` says why).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.collapse import SAME, plain_float32
from bat.eval.features import device_of, encode, evaluating, to_device
from bat.eval.token_statistics import TokenStatistics
from bat.nn.attention import Attention
from bat.nn.sinks import sink_share
from bat.probes.base import Probe
from bat.probes.maps import evidence
from bat.tasks.losses import to_clip
from bat.types import WaveBatch

CLIPS_AT_A_TIME = 8


@torch.no_grad()
def encoder_statistics(
    backbone: Encoder, batches: Iterable[WaveBatch], *, frames: int | None
) -> dict[str, Any]:
    """The statistics above over all clips of ``batches``: JSON values, lists by block.

    ``frames`` of each clip; None: each clip has its own number.

    ``{"clips": n, "sinks": {"gate on": [L], "gate off": [L] | None, "uniform": 1 / tokens, mean
    over clips} | None,
    "norms": {"patches": [[mean, std, max]], "cls": ...}, "rank": {"patches": [L], "cls": ...},
    "spread": {"patches": [L], "cls": ...}}``; ``cls`` is None without class token, ``sinks`` for an
    encoder that does not attend by ``bat.nn.attention`` once a block. Weights, modes and random
    state stay as they were. Raises ``UserError`` where no clip is readable or features are not
    finite.
    """
    device, L = device_of(backbone), backbone.depth
    patches = [TokenStatistics() for _ in range(L)]
    classes = [TokenStatistics() for _ in range(L)] if backbone.has_cls else []
    sound, sinks = TokenStatistics(), _Sinks(backbone)
    draws = torch.Generator().manual_seed(0)
    with plain_float32(backbone, device.type):
        for keys, lengths, spectrogram in _spectrograms(backbone, batches, frames):
            own = torch.full_like(lengths, spectrogram.shape[2] // backbone.patch)
            if frames is None:
                own = torch.minimum(own, backbone.time_patches(lengths))
            with sinks.heard("gate on"):
                features = backbone.features_alone(spectrogram, own)
            if sinks.gated:
                with sinks.heard("gate off"), opened(sinks.gated):
                    backbone.features_alone(spectrogram, own)
            _check(features.patches, keys)
            _, B, T, F, _ = features.patches.shape
            first = backbone.patch * torch.arange(T, device=device)  # frame of each time patch
            inside = first < backbone.frontend.valid_frames(lengths)[:, None]  # type: ignore[operator]
            shown = inside.repeat_interleave(backbone.patch, dim=1)  # (B, frames)
            sound.add(spectrogram[:, 0], shown, shown.float())
            draw = torch.rand(B, T * F, generator=draws).to(device)
            for statistics, block in zip(patches, features.patches, strict=True):
                statistics.add(block.flatten(1, 2), inside.repeat_interleave(F, dim=1), draw)
            if classes and features.cls is not None:
                for statistics, block in zip(classes, features.cls, strict=True):
                    statistics.add(block[:, None], inside[:, :1], draw[:, :1])
    if not sound.clips:
        raise UserError("none of the clips for insight.encoder can be read")
    same = (sound.spread() or 0.0) < SAME

    def by_kind(what: str, *, known: bool = True) -> dict[str, Any]:
        return {
            kind: [getattr(block, what)() if known else None for block in blocks] or None
            for kind, blocks in (("patches", patches), ("cls", classes))
        }

    return {
        "clips": sound.clips,
        "sinks": sinks.shares(sound.clips),
        "norms": by_kind("norms"),
        "rank": by_kind("rank", known=not same),
        "spread": by_kind("spread", known=not same),
    }


def choose_clips(logits: Tensor, targets: Tensor, *, count: int) -> list[tuple[int, int]]:
    """Pairs (class, row): for each of ``count`` classes the clip of that class that scores highest.

    ``logits`` and ``targets`` (n, C), or (n, T, C) at frame level. The classes are those with most
    clips, in order of the labels among equals; fewer where fewer have any.
    """
    logits = to_clip(logits).float()  # (n, C)
    has = targets > 0  # where targets are NaN: False
    has = has.any(1) if has.ndim == 3 else has  # (n, C)
    clips = has.sum(0)
    order = clips.argsort(descending=True, stable=True)[:count]
    classes = sorted(int(c) for c in order if clips[c])
    best = logits.masked_fill(~has, -math.inf).argmax(0)  # (C,)
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
    """What the prototypes of a class select in a clip, for ``report.insight_plots``.

    ``batches`` of ``eval_loader(index, ids)``; ``classes[i]`` is the class to explain in the
    i-th of these; ``labels`` names all classes. A dictionary a readable clip: ``label``, ``key``,
    ``logit``, ``spectrogram`` (frames, mels), ``evidence`` (T, F) (``probes/maps.py``), ``hop_ms``
    between frames and ``seconds``, how much of the picture the clip fills. Raises ``UserError`` for
    a probe without prototypes.
    """
    found = []
    hop = backbone.patch_hop_ms / backbone.patch
    with evaluating(backbone), evaluating(probe):
        for batch in batches:
            if not batch.keys:
                continue
            spectrogram = backbone.spectrogram(
                batch.waves.to(device_of(backbone)), batch.lengths.to(device_of(backbone)),
                frames=frames,
            )  # fmt: skip
            features = encode(backbone, batch, frames=frames, autocast=autocast)
            features = to_device(features, device_of(probe))
            with torch.autocast(device_of(probe).type, autocast, enabled=autocast is not None):
                logits = to_clip(probe(features), features.inside()).float().cpu()  # (B, C)
            for row, key in enumerate(batch.keys):
                wanted = classes[int(batch.positions[row])]
                one = features.clip(row)
                picture = spectrogram[row, 0, : one.patches.shape[2] * backbone.patch]
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


def _spectrograms(
    backbone: Encoder, batches: Iterable[WaveBatch], frames: int | None
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Keys, lengths and the first chunk's spectrogram, a few clips at a time."""
    device, chunk = device_of(backbone), backbone.grid.time * backbone.patch
    for batch in batches:
        for start in range(0, len(batch.keys), CLIPS_AT_A_TIME):
            rows = slice(start, start + CLIPS_AT_A_TIME)
            lengths = batch.lengths[rows].to(device)
            x = backbone.spectrogram(batch.waves[rows].to(device), lengths, frames=frames)
            yield batch.keys[rows], lengths, x[:, :, :chunk]


def _check(patches: Tensor, keys: Sequence[str]) -> None:
    for number, block in enumerate(patches, start=1):
        finite = block.isfinite().flatten(1).all(1)
        if not finite.all():
            key = keys[int((~finite).nonzero()[0])]
            raise UserError(
                f"the encoder's features are not finite (clip {key}, block {number}): its weights "
                "are damaged; insight.encoder=false leaves its statistics out"
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
    def heard(self, name: str) -> Iterator[None]:
        """Count what passes through the encoder as ``name``."""
        total = self.total.setdefault(name, torch.zeros(len(self.attentions), dtype=torch.float64))

        def hear(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]  # (B, n, D)
            if name == "gate on" and attention is self.attentions[0]:
                self.uniform += x.shape[0] / x.shape[1]
            total[self.attentions.index(attention)] += float(sink_share(attention, x).mean(1).sum())

        hooks = [part.register_forward_pre_hook(hear) for part in self.attentions]
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
    """Without gates, which is a factor of 1; no weight is touched."""
    gates = [part.gate for part in attentions]
    try:
        for part in attentions:
            part.gate = None
        yield
    finally:
        for part, gate in zip(attentions, gates, strict=True):
            part.gate = gate
