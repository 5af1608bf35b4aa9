"""The one loop for frozen probes: ``bat-probe`` and the online callback of pre-training use it.

All candidates (``candidates.py``) share each batch of features (``features.py``). A plain loop, so
that it runs inside Lightning too. Every random number hangs on a seed, the fold, the method and the
step: a probe's result does not depend on its companions, and the global generators end as they
began.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bat.config.sections import Optim
from bat.errors import UserError
from bat.eval.features import Batches, device_of, evaluating, to_device
from bat.nn.losses import Loss, against, to_clip
from bat.nn.optim import adamw, param_groups, warmup_cosine
from bat.probes.base import Probe
from bat.seeding import derive_seed, seed_generators

K = TypeVar("K", bound=Hashable)


class Training(NamedTuple):
    """A probe in training. ``name`` and ``seed`` are what its dropout hangs on."""

    probe: Probe
    optim: Optim
    name: str
    seed: int


def fit(
    trainings: Mapping[K, Training],
    batches: Batches,
    *,
    loss: Loss,
    steps: int,
    autocast: torch.dtype | None = None,
    after_step: Callable[[int, dict[K, Tensor]], set[K]] | None = None,
) -> None:
    """Train every probe on the same ``batches``, ``steps`` of them, each by AdamW as it says.

    ``after_step(steps done, {key: loss})`` gets the losses on their device and returns the keys of
    those that are trained no further; with none left the batches end.
    """
    device = device_of(next(iter(trainings.values())).probe)
    active = dict(trainings)
    groups = [g for key, training in trainings.items() for g in _groups(training, key)]
    optimizer = adamw(groups, lr=0.0)  # one for all: a call costs more than a small probe's update

    with own_randomness(device):
        for step, (features, targets) in zip(range(steps), batches, strict=False):
            features, targets = to_device(features, device), targets.to(device)
            inside = features.inside() if targets.ndim < 3 else None
            of_batch = partial(against, loss, inside=inside)
            losses = {}
            optimizer.zero_grad()  # without a gradient, what is trained no further stays as it is
            for key, (probe, optim, name, seed) in active.items():
                seed_generators(derive_seed(seed, name, step), device)
                if not probe.training:
                    probe.train()
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    logits = probe(features)
                value = probe.training_loss(of_batch, logits, targets)
                value.backward()
                if optim.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(probe.parameters(), optim.clip_norm)
                losses[key] = value.detach()
            for group in optimizer.param_groups:
                optim = trainings[group["training"]].optim
                group["lr"] = warmup_cosine(
                    step,
                    lr=optim.lr,
                    warmup_steps=optim.warmup_steps,
                    total_steps=steps,
                    min_lr=optim.min_lr,
                )
            optimizer.step()
            if after_step is not None:
                for key in after_step(step + 1, losses):
                    active.pop(key, None)
                if not active:
                    return


def _groups(training: Training, key: Hashable) -> list[dict[str, Any]]:
    """AdamW's parameter groups of one probe, with what its settings say of them."""
    probe, optim = training.probe, training.optim
    assert optim.layer_decay == 1, "a probe has no layers to decay over"
    groups = param_groups(
        probe,
        weight_decay=optim.weight_decay,
        decay=optim.decay,
        no_decay=probe.no_weight_decay(),
    )
    own = {"training": key, "betas": tuple(optim.betas), "eps": optim.eps}
    return [group | own for group in groups]


class Predictions(NamedTuple):
    """Of n rows: clips, or with labels or tokens in time the patches of all clips."""

    logits: dict[tuple[Hashable, str], Tensor]
    """By probe and answer (``Probe.answers``): (n, C) float32, on the CPU."""
    targets: Tensor
    """(n, C); of tokens (clips, U)"""
    clips: Tensor | None
    """(n,) clip of each row, where a clip has several."""
    total: int = 0
    """Clips."""


@torch.no_grad()
def predictions(
    probes: Mapping[K, Probe],
    batches: Batches,
    *,
    autocast: torch.dtype | None = None,
    wanted: Callable[[K, str], bool] = lambda key, answer: True,
) -> Predictions:
    """What ``probes`` say of ``batches``, in eval mode; afterwards each is in its own mode again.

    Clip labels are met by the mean over time of frame-level logits; of frame labels the patches
    beyond a clip's end (NaN) are left out. ``wanted``: which answers of which probe are kept.
    """
    device = device_of(next(iter(probes.values())))
    logits: dict[tuple[Hashable, str], list[Tensor]] = {}
    targets, clips, seen = [], [], 0
    for features, labels in batches:
        features = to_device(features, device)
        inside = features.inside()
        kept = None  # (B, T), the patches that are rows of their own
        if labels.ndim == 3:
            kept = ~labels.isnan().any(-1)
        elif not labels.is_floating_point():
            T = features.patches.shape[2]
            kept = torch.ones(len(labels), T, dtype=torch.bool) if inside is None else inside
        for key, probe in probes.items():
            auto = torch.autocast(device.type, autocast, enabled=autocast is not None)
            with evaluating(probe), auto:
                out = probe(features)
            for answer, own in probe.answers(out).items():
                if not wanted(key, answer):
                    continue
                rows = own[kept.to(device)] if kept is not None else to_clip(own, inside)
                logits.setdefault((key, answer), []).append(rows.float().cpu())
        if kept is not None:
            number = torch.arange(seen, seen + len(labels))[:, None].expand_as(kept)
            clips.append(number[kept.cpu()])
            labels = labels[kept] if labels.ndim == 3 else labels
        seen += features.patches.shape[1]
        targets.append(labels.cpu())
    if not targets:
        raise UserError("none of the held-out clips can be read")
    joined = {key: torch.cat(parts) for key, parts in logits.items()}
    return Predictions(joined, torch.cat(targets), torch.cat(clips) if clips else None, seen)


def predict(
    probes: Mapping[str, Probe], batches: Batches, *, autocast: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of each probe by its name (and answer), (n, C) float32, and the targets (n, C)."""
    found = predictions(probes, batches, autocast=autocast)
    return {f"{key}{answer}": rows for (key, answer), rows in found.logits.items()}, found.targets


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
