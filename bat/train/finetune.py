"""Fine-tunes an encoder from a resolved configuration: each fold in turn, then the result table.

Folds are resumable: a killed run, started again, reads the results of finished folds and resumes
the unfinished one (``folds.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bat import __version__
from bat.config import schema
from bat.errors import UserError
from bat.eval.hardware import with_precision
from bat.eval.loading import autocast_for
from bat.eval.next_steps import after_finetuning
from bat.eval.prepare import prepare
from bat.eval.results import HOW, Outcome, summary, table
from bat.eval.run_folder import default_out, run_folder
from bat.io import write_json
from bat.logs import is_main, start_logging
from bat.nn.losses import against
from bat.probes.base import check_level, find_probe, takes_encoder
from bat.report.plots import chance_of, plot_folds
from bat.report.sections import TITLES
from bat.train.batching import with_batch
from bat.train.folds import Folds

log = logging.getLogger("bat")


def finetune(config: schema.Finetune, *, dry_run: bool = False, force: bool = False) -> Path:
    """Fine-tunes as ``config`` says and returns the run folder. Resumes an existing run there.

    Raises ``Interrupted`` if the run was asked to end; it is saved and can be resumed.
    ``force``: resume although the settings differ.
    """
    if takes_encoder(find_probe(config.method)):
        raise UserError(
            f"method={config.method} is made of a frozen encoder, and fine-tuning trains it: use "
            "it with bat-probe, or another head here"
        )
    asked, out = config, default_out(config)
    start_logging()
    batch = config.data.batch, config.train.accumulate
    ready = prepare(with_batch(with_precision(config, out)))
    config = ready.config
    check_level(find_probe(config.method), config.level)
    own = config.augment
    if ready.targets_of is not None and own.time_roll:
        raise UserError("augment.time_roll=true moves clips, not their events or texts: say false")
    if ready.task.target == "tokens" and own.mixup_p:
        raise UserError(
            f"augment.mixup_p={own.mixup_p}: texts cannot be mixed; say augment.mixup_p=0"
        )
    if ready.frames is None and config.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy=fsdp wants the same shapes on all devices, and clips of their own "
            "length have others: say frames=NUMBER, or hardware.strategy=ddp"
        )
    run = Folds(ready, out, force=force)
    if dry_run:
        _dry_run(run)
        return out

    settled = replace(
        config,
        data=replace(config.data, batch=batch[0]),
        train=replace(config.train, accumulate=batch[1]),
    )
    with run_folder(settled, out, force=force) as begin:
        _run(run, out, asked, begin)
    return out


def _run(run: Folds, out: Path, asked: schema.Finetune, begin: Callable[[], None]) -> None:
    config, ready = run.config, run.ready
    done = [held.name for held in ready.rounds if run.read(held) is not None]
    if len(done) == len(ready.rounds):
        log.info("nothing to do: %s is finished", out)
        begin()
    log.info("%s", _headline(run))
    results = [run.fold(held, begin) for held in ready.rounds]
    if not is_main():  # other ranks only take part in training
        return
    outcomes = [Outcome(config.method, r["held_out"], r["metrics"]) for r in results]
    metric = ready.task.metric
    found = summary(outcomes, metric=metric)
    plot_folds(
        {config.method: {o.fold: o.metrics[metric] for o in outcomes}},
        out / "plots" / "folds.png",
        metric=TITLES[metric],
        chance=chance_of(metric, len(ready.labels)),
        title=f"Fine-tuned {TITLES[metric]} by held-out fold",
    )
    write_json(
        out / "summary.json",
        {
            "checkpoint": config.checkpoint,
            "weights": config.weights,
            "task": ready.task.name,
            "data": ready.hash,
            "how": HOW,
            "clips": len(ready.index),
            "labels": list(ready.labels),
            "bad_clips": {r["held_out"]: r["bad_clips"] for r in results},
            "held_out_bad": {r["held_out"]: r["held_out_bad"] for r in results},
            "results": found,
            "seconds": round(sum(r.get("seconds", 0.0) for r in results), 1),
            "precision": config.hardware.precision,
            "version": __version__,
        },
    )
    for result in results:
        log.info("held out %s: %s", result["held_out"], result["bad"])
    print(_report(asked, run, found))


def _dry_run(run: Folds) -> None:
    """Builds everything and runs one batch forward and backward (on the CPU one clip, forward)."""
    rounds = run.ready.rounds
    module, data = run.module(rounds[0]), run.data(rounds[0])
    on_gpu = run.config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    module = module.to(device)
    autocast = autocast_for(run.config.hardware)
    batch = data.first_batch()
    if not on_gpu:
        batch = batch.first(1)
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(0)
    with (
        torch.autocast(device.type, autocast, enabled=autocast is not None),
        torch.set_grad_enabled(on_gpu),
    ):
        spectrogram, targets, patches = module.augmented(batch, generator)
        total = module.backbone.time_patches(batch.waves.shape[1])
        features = module.encoded(spectrogram, patches, total=total)
        logits = module.head(features)
        loss = against(module.loss, logits, targets, inside=features.inside())
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


def _report(asked: schema.Finetune, run: Folds, results: dict[str, dict[str, Any]]) -> str:
    out, folds = run.out, [f"fold-{held.name}" for held in run.ready.rounds]
    others = f" (and of {', '.join(folds[1:])})" if folds[1:] else ""
    parts = [
        table(results),
        f"({HOW}; computed in {run.config.hardware.precision})",
        "Where everything is:\n"
        f"  results   {out}/summary.json, {out}/{folds[0]}/metrics.jsonl{others}\n"
        f"  encoders  {out}/{folds[0]}/export{others}; bat.load_encoder reads one\n"
        f"  heads     {out}/{folds[0]}/head{others}\n"
        f"  pictures  {out}/plots/, {out}/{folds[0]}/plots/{others}",
    ]
    if found := after_finetuning(asked, out):
        parts.append("\n  ".join(["Next:", *found]))
    return "\n\n".join(parts)
