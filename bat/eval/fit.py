"""Trains frozen probes: the loop that ``bat-probe`` and the online callback of pre-training share.

All candidates (``candidates.py``) share each batch of features (``features.py``). A plain loop, so
that it also runs inside Lightning. Every random number depends on a seed, the fold, the method and
the step only: the result of a probe does not depend on the others trained with it, and the state of
the global generators is restored at the end.

On a CPU the probes of a step are trained in threads: the operations of one probe are too short to
be shared among cores, and on a busy machine the cores would wait for each other in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from bat.probes.base import Dropout, Probe
from bat.seeding import derive_seed, seed_generators
from bat.types import Features

K = TypeVar("K", bound=Hashable)

MAX_THREADS = 4
"""Probes trained at a time on a CPU: of a method there are few candidates."""


class Training(NamedTuple):
    """A probe in training. ``name`` and ``seed`` determine its dropout."""

    probe: Probe
    optim: Optim
    name: str
    seed: int

    def seed_at(self, step: int) -> int:
        """Returns the seed of the random numbers of a step."""
        return derive_seed(self.seed, self.name, step)


def fit(
    trainings: Mapping[K, Training],
    batches: Batches,
    *,
    loss: Loss,
    steps: int,
    autocast: torch.dtype | None = None,
    after_step: Callable[[int, dict[K, Tensor]], set[K]] | None = None,
) -> None:
    """Trains every probe on the same ``batches``, ``steps`` of them, each by its AdamW settings.

    ``after_step(steps done, {key: loss})`` receives the losses on their device and returns the keys
    of those that stop training; when all have stopped no more batches are drawn.
    """
    device = device_of(next(iter(trainings.values())).probe)
    active = dict(trainings)
    groups = [g for key, training in trainings.items() for g in _groups(training, key)]
    optimizer = adamw(groups, lr=0.0)  # one for all: a call costs more than a small probe's update
    sizes = {k: sum(p.numel() for p in t.probe.parameters()) for k, t in trainings.items()}
    alone = set(trainings)  # trained one by one; from the second step on only where it must be so

    with preserve_rng_state(device), _threads(device) as pool:
        for step, (features, targets) in zip(range(steps), batches, strict=False):
            features, targets = to_device(features, device), targets.to(device)
            train = partial(
                _backward,
                step=step,
                features=features,
                targets=targets,
                loss=loss,
                autocast=autocast,
            )
            optimizer.zero_grad()  # without a gradient, stopped probes are not updated
            together = sorted(active.keys() - alone, key=lambda k: -sizes[k])  # longest first
            found = pool.map(train, [active[key] for key in together]) if pool else iter(())
            drew: set[K] = set()  # from the global generator, which threads cannot share
            losses: dict[K, Tensor] = {}
            for key in (key for key in active if key in alone):
                seed_generators(active[key].seed_at(step), device)
                before = torch.get_rng_state() if pool else None
                losses[key] = train(active[key])
                if before is not None and not torch.equal(before, torch.get_rng_state()):
                    drew.add(key)
            losses |= zip(together, found, strict=True)
            if pool:
                alone = drew
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
                for key in after_step(step + 1, {key: losses[key] for key in active}):
                    active.pop(key, None)
                if not active:
                    return


def _backward(
    training: Training,
    *,
    step: int,
    features: Features,
    targets: Tensor,
    loss: Loss,
    autocast: torch.dtype | None,
) -> Tensor:
    """Adds the gradients of a batch to a probe's parameters; returns the loss."""
    probe, optim = training.probe, training.optim
    device = features.patches.device.type
    dropouts = [module for module in probe.modules() if isinstance(module, Dropout)]
    for number, dropout in enumerate(dropouts):
        dropout.seed = training.seed_at(step) + number
    if not probe.training:
        probe.train()
    with torch.autocast(device, autocast, enabled=autocast is not None):
        logits = probe(features)
    for dropout in dropouts:
        dropout.seed = None
    against_inside = partial(against, loss, inside=probe.inside(features))
    value = probe.training_loss(against_inside, logits, targets)
    value.backward()
    if optim.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(probe.parameters(), optim.clip_norm)
    return value.detach()


@contextmanager
def _threads(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """Yields threads that share the cores evenly; None on a GPU or a single core.

    How many does not depend on the probes: the rounding of a probe's sums depends on the cores that
    it is given, and must not on the others trained with it.
    """
    cores = torch.get_num_threads()
    count = min(cores, MAX_THREADS)
    if device.type != "cpu" or count < 2:
        yield None
        return
    torch.set_num_threads(cores // count)
    try:
        with ThreadPoolExecutor(count, "probe") as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


def _groups(training: Training, key: Hashable) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups of one probe, with its settings."""
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
    """Predictions of n rows: clips, or with frame labels or tokens the patches of all clips."""

    logits: dict[tuple[Hashable, str], Tensor]
    """Logits (n, C) by probe and answer (``Probe.answers``), float32, on the CPU; (n steps, C) of
    a probe with several outputs per patch."""
    targets: Tensor
    """Targets (n, C); for tokens (clips, U)."""
    clips: Tensor | None
    """Clip of each row, (n,), if clips have several rows."""
    total: int = 0
    """Number of clips."""
    keys: Sequence[str] | None = None
    """Keys of the clips, where they are recordings joined from windows (``bat.eval.joining``)."""
    patches: Tensor | None = None
    """Time patch of each row in its recording, (n,), where clips are joined from windows."""


@torch.no_grad()
def predictions(
    probes: Mapping[K, Probe],
    batches: Batches,
    *,
    autocast: torch.dtype | None = None,
    wanted: Callable[[K, str], bool] = lambda key, answer: True,
) -> Predictions:
    """Returns the predictions of ``probes`` on ``batches``, in eval mode; restores their modes.

    For clip labels, frame-level logits are averaged over time. For frame labels, patches beyond a
    clip's end (NaN) are excluded. ``wanted``: predicate (key, answer) of the answers to keep.
    """
    device = device_of(next(iter(probes.values())))
    logits: dict[tuple[Hashable, str], list[Tensor]] = {}
    targets, clips, seen = [], [], 0
    for features, labels in batches:
        features = to_device(features, device)
        inside = features.inside()
        kept = None  # (B, T), mask of the patches that become rows
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
                if kept is None:
                    rows = to_clip(own, inside)
                else:  # several rows per patch where a probe has several outputs
                    steps = own.shape[1] // kept.shape[1]
                    rows = own[kept.to(device).repeat_interleave(steps, dim=1)]
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
    """Returns logits of each probe by name (and answer), (n, C) float32, and targets (n, C)."""
    found = predictions(probes, batches, autocast=autocast)
    return {f"{key}{answer}": rows for (key, answer), rows in found.logits.items()}, found.targets


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restores the state of the global generators on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
