"""The one loop for frozen probes: ``bat-probe`` and the online callback of pre-training use it.

All probes share each batch of features (``features.py``). A plain loop, so that it runs inside
Lightning too. Every random number hangs on a seed, the fold, the method and the step: a probe's
result does not depend on its companions, and the global generators end as they began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bat.config.sections import Optim
from bat.probes.base import Probe
from bat.shapes import UserError
from bat.train.features import Batches, Source, device_of, progress_bar, to_device
from bat.train.held_out import Round
from bat.train.losses import Loss, against, to_clip
from bat.train.metrics import evaluate
from bat.train.optim import adamw, param_groups, set_lr
from bat.train.results import Outcome
from bat.train.trainer import derive_seed


def fit_probes(
    probes: Mapping[str, Probe],
    batches: Batches,
    *,
    loss: Loss,
    optim: Optim,
    steps: int,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    after_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> None:
    """Train every probe on the same ``batches``, ``steps`` of them; each has its own AdamW.

    ``optim``: as in the configuration, without layer-wise decay. ``seed`` is that of dropout.
    ``after_step(steps done, {method: loss})`` gets the losses on their device.
    """
    assert optim.layer_decay == 1, "a probe has no layers to decay over"
    device = device_of(next(iter(probes.values())))
    optimizers = {
        name: adamw(
            param_groups(
                probe,
                weight_decay=optim.weight_decay,
                decay=optim.decay,
                no_decay=probe.no_weight_decay(),
            ),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
        )
        for name, probe in probes.items()
    }
    rate = {"lr": optim.lr, "warmup_steps": optim.warmup_steps, "min_lr": optim.min_lr}
    with own_randomness(device):
        for step, (features, targets) in zip(range(steps), batches, strict=False):
            features, targets = to_device(features, device), targets.to(device)
            losses = {}
            for name, probe in probes.items():
                optimizer = optimizers[name]
                set_lr(optimizer, step, total_steps=steps, **rate)  # type: ignore[arg-type]
                torch.manual_seed(derive_seed(seed, name, step))
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    logits = probe.train()(features)
                value = against(loss, logits, targets)
                optimizer.zero_grad()
                value.backward()
                if optim.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(probe.parameters(), optim.clip_norm)
                optimizer.step()
                losses[name] = value.detach()
            if after_step is not None:
                after_step(step + 1, losses)


@torch.no_grad()
def predict(
    probes: Mapping[str, Probe], batches: Batches, *, autocast: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip-level logits of each probe, (n, C) float32, and the targets (n, C), on the CPU."""
    device = device_of(next(iter(probes.values())))
    logits: dict[str, list[Tensor]] = {name: [] for name in probes}
    targets = []
    for features, wanted in batches:
        features = to_device(features, device)
        for name, probe in probes.items():
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                out = probe.eval()(features)
            logits[name].append(to_clip(out).float().cpu())
        targets.append(wanted.cpu())
    if not targets:
        raise UserError("none of the held-out clips can be read")
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(targets)


def cross_validate(
    source: Source,
    rounds: Sequence[Round],
    *,
    methods: Sequence[str],
    build: Callable[[str], Probe],
    loss: Loss,
    optim: Optim,
    steps: int,
    batch: int,
    multi_label: bool,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    log_every: int = 0,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_probe: Callable[[Probe, Outcome], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Train and judge each of ``methods`` in each of ``rounds``.

    ``build(method)`` makes a probe. ``on_log`` gets ``{"fold", "step", "method", "loss"}`` every
    ``log_every`` steps; ``on_probe`` each trained probe with its outcome; ``on_step`` is called
    after each step and may end it all by raising.
    """
    outcomes = []
    for held in rounds:
        probes = {}
        for method in methods:
            with own_randomness(torch.device(device)):
                torch.manual_seed(derive_seed(seed, held.name, method, "init"))
                probes[method] = build(method).to(device)
        with progress_bar(
            steps, f"probes, {held.name} held out", unit="step", show=progress
        ) as bar:

            def after_step(step: int, losses: dict[str, Tensor], held: Round = held) -> None:
                bar.update(1)
                on_step()
                if on_log and log_every and (step % log_every == 0 or step in (1, steps)):
                    for method, value in losses.items():
                        row = {"fold": held.name, "method": method, "loss": float(value)}
                        on_log({"step": step, **row})

            fit_probes(
                probes,
                source.training(
                    held.train, batch=batch, steps=steps, seed=derive_seed(seed, held.name, "order")
                ),
                loss=loss,
                optim=optim,
                steps=steps,
                seed=derive_seed(seed, held.name, "dropout"),
                autocast=autocast,
                after_step=after_step,
            )
        logits, targets = predict(probes, source.once(held.test, batch=batch), autocast=autocast)
        for method, probe in probes.items():
            gate = probe.layer_gate()
            outcome = Outcome(
                method,
                held.name,
                evaluate(logits[method], targets, multi_label=multi_label),
                None if gate is None else gate.cpu().tolist(),
            )
            outcomes.append(outcome)
            if on_probe is not None:
                on_probe(probe, outcome)
    return outcomes


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
