"""One fine-tuning from a resolved configuration: fold after fold, each resumable, then the table.

A killed run, started again, reads the finished folds from their results and continues the one it
was in (``folds.py``).
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bat import __version__
from bat.config import schema
from bat.probes.base import find_probe, takes_encoder
from bat.report.plots import chance_of, plot_folds
from bat.report.sections import TITLES
from bat.shapes import UserError
from bat.train.batching import with_batch
from bat.train.encoders import autocast_for, checkpoint_name
from bat.train.folds import Folds
from bat.train.prepare import prepare
from bat.train.results import HOW, Outcome, summary, table
from bat.train.run_folder import run_folder
from bat.train.signals import minding_signals
from bat.train.trainer import is_main, start_logging, write_json

log = logging.getLogger("bat")


def finetune(config: schema.Finetune, *, dry_run: bool = False, force: bool = False) -> Path:
    """Fine-tune as ``config`` says; returns the run folder. Continues what is already there.

    Raises ``Interrupted`` where the run was asked to end: it is saved, and can go on.
    ``force``: continue with other settings all the same.
    """
    if takes_encoder(find_probe(config.method)):
        raise UserError(
            f"method={config.method} is made of a frozen encoder, and fine-tuning trains it: use "
            "it with bat-probe, or another head here"
        )
    batch = config.data.batch, config.train.accumulate
    config = with_batch(config)
    ready = prepare(config)
    config = ready.config
    out = Path(config.out or f"runs/finetune-{config.recipe}-{checkpoint_name(config)}")
    run = Folds(ready, out, force=force)
    if dry_run:
        _dry_run(run)
        return out

    asked = replace(
        config,
        data=replace(config.data, batch=batch[0]),
        train=replace(config.train, accumulate=batch[1]),
    )
    with minding_signals(), run_folder(asked, out, force=force):
        start_logging(out)
        _run(run, out)
    return out


def _run(run: Folds, out: Path) -> None:
    config, ready = run.config, run.ready
    log.info("%s", _headline(run))
    began = time.perf_counter()
    results = [run.fold(held) for held in ready.rounds]
    if not is_main():  # the others only trained along
        return
    outcomes = [Outcome(config.method, r["held_out"], r["metrics"]) for r in results]
    found = summary(outcomes)
    metric = ready.task.metric
    plot_folds(
        {config.method: {o.fold: o.metrics[metric] for o in outcomes}},
        out / "plots" / "folds.png",
        metric=TITLES[metric],
        chance=chance_of(metric, ready.index.classes),
        title=f"Fine-tuned {TITLES[metric]} by held-out fold",
    )
    write_json(
        out / "summary.json",
        {
            "checkpoint": config.checkpoint,
            "weights": config.weights,
            "task": ready.task.name,
            "data": ready.index.hash,
            "how": HOW,
            "clips": len(ready.index),
            "labels": ready.index.vocabulary,
            "bad_clips": {r["held_out"]: r["bad_clips"] for r in results},
            "held_out_bad": {r["held_out"]: r["held_out_bad"] for r in results},
            "results": found,
            "seconds": round(time.perf_counter() - began, 1),
            "version": __version__,
        },
    )
    for result in results:
        log.info("held out %s: %s", result["held_out"], result["bad"])
    print(_report(config, found, out))


def _dry_run(run: Folds) -> None:
    """Build everything, loss and gradient of one batch (one clip, forward only, on the CPU)."""
    rounds = run.ready.rounds
    module, data = run.module(rounds[0]), run.data(rounds[0])
    on_gpu = run.config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    module = module.to(device).train()
    autocast = autocast_for(run.config.hardware)
    batch = data.first_batch()
    if not on_gpu:
        batch = replace(
            batch, waves=batch.waves[:1], lengths=batch.lengths[:1], targets=batch.targets[:1]
        )
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(0)
    with (
        torch.autocast(device.type, autocast, enabled=autocast is not None),
        torch.set_grad_enabled(on_gpu),
    ):
        spectrogram, targets = module.augmented(batch, generator)
        logits = module.head(module.backbone.features(spectrogram))
        loss = module.loss(logits, targets)
    if on_gpu:
        loss.backward()
    size = sum(p.numel() for p in module.parameters())
    if run.ready.note:
        print(run.ready.note)
    print(f"data      {len(run.index)} clips, {run.index.classes} labels, {len(rounds)} round(s)")
    print(f"input     {tuple(spectrogram.shape)} -> logits {tuple(logits.shape)}")
    groups = len(module.configure_optimizers().param_groups)
    print(f"model     {size / 1e6:.1f} M parameters in {groups} groups")
    print(f"loss      {loss.item():.4f} on {len(batch.waves)} clip(s), {device}")
    print("dry run: nothing was trained, nothing was written but shards and their index")


def _headline(run: Folds) -> str:
    config = run.config
    return run.ready.headline(
        f"bat {__version__}: fine-tuning {config.checkpoint} ({config.weights}) in {run.out}",
        f"head {config.method}: {len(run.ready.rounds)} round(s), {config.train.steps} steps of "
        f"{config.data.batch} x {config.train.accumulate} clips a device",
    )


def _report(config: schema.Finetune, results: dict[str, dict[str, Any]], out: Path) -> str:
    data = f"data.csv={config.data.csv}" if config.data.csv else f"recipe={config.recipe}"
    return "\n\n".join(
        [
            table(results),
            f"({HOW})",
            "Where everything is:\n"
            f"  results   {out}/summary.json, {out}/fold-K/metrics.jsonl\n"
            f"  encoders  {out}/fold-K/export (bat.load_encoder reads one), heads fold-K/head\n"
            f"  pictures  {out}/plots/, {out}/fold-K/plots/",
            "Next:\n"
            f"  bat-probe {data} checkpoint={config.checkpoint} --method cgp,linear "
            f"finetuned={out}   (the same encoder frozen, and the gap)",
        ]
    )
