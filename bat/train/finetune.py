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

from bat import __version__
from bat.config import schema
from bat.errors import UserError
from bat.eval.hardware import with_precision
from bat.eval.next_steps import after_finetuning
from bat.eval.prepare import Prepared, prepare
from bat.eval.results import HOW, Outcome, summary, table
from bat.eval.run_folder import default_out, run_folder
from bat.io import write_json
from bat.logs import is_main, start_logging
from bat.nn.losses import against
from bat.probes.base import check_level, find_probe, takes_encoder
from bat.report.plots import chance_of, plot_folds
from bat.report.sections import TITLES
from bat.train.fitting import dry_step
from bat.train.folds import Folds
from bat.train.processes import with_batch

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
    ready = prepare(with_batch(with_precision(config, out)))
    config = ready.config
    _check(ready)
    run = Folds(ready, out, force=force)
    if dry_run:
        _dry_run(run)
        return out
    settled = replace(  # the batch that was asked for: the devices may differ when it resumes
        config,
        data=replace(config.data, batch=asked.data.batch),
        train=replace(config.train, accumulate=asked.train.accumulate),
    )
    with run_folder(settled, out, force=force) as begin:
        _run(run, out, asked, begin)
    return out


def _check(ready: Prepared[schema.Finetune]) -> None:
    """Raises ``UserError`` for settings that do not fit the task or the data."""
    config = ready.config
    check_level(find_probe(config.method), config.level)
    if ready.targets_of is not None and config.augment.time_roll:
        raise UserError("augment.time_roll=true moves clips, not their events or texts: say false")
    if ready.task.target == "tokens" and config.augment.mixup_p:
        raise UserError(
            f"augment.mixup_p={config.augment.mixup_p}: texts cannot be mixed; say "
            "augment.mixup_p=0"
        )
    if ready.frames is None and config.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy=fsdp needs the same shapes on all devices, and clips of their own "
            "length have others: say frames=NUMBER, or hardware.strategy=ddp"
        )


def _run(run: Folds, out: Path, asked: schema.Finetune, begin: Callable[[], None]) -> None:
    config, ready = run.config, run.ready
    if all(run.read(held) is not None for held in ready.rounds):
        log.info("nothing to do: %s is finished", out)
        begin()
    start = f"bat {__version__}: fine-tuning {config.checkpoint} ({config.weights}) in {run.out}"
    steps = f"{config.train.steps} steps of {config.data.batch} x {config.train.accumulate} clips"
    head = f"head {config.method}: {len(ready.rounds)} round(s), {steps} a device"
    log.info("%s", ready.headline(start, head))
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
    """Builds everything and computes the loss of one batch without training."""
    rounds = run.ready.rounds
    module, data = run.module(rounds[0]), run.data(rounds[0])
    with dry_step(run.config, module, data) as batch:
        spectrogram, targets, features = module.encoded(batch, seed=0)
        logits = module.head(features)
        loss = against(module.loss, logits, targets, inside=features.inside())
    if loss.is_cuda:
        loss.backward()
    size = sum(p.numel() for p in module.parameters())
    if run.ready.note:
        print(run.ready.note)
    print(f"data      {len(run.index)} clips, {run.index.classes} labels, {len(rounds)} round(s)")
    print(f"input     {tuple(spectrogram.shape)} -> logits {tuple(logits.shape)}")
    groups = len(module.configure_optimizers().param_groups)
    print(f"model     {size / 1e6:.1f} M parameters in {groups} groups")
    print(f"loss      {loss.item():.4f} on {len(batch.waves)} clip(s), {loss.device}")
    print("dry run: nothing was trained, nothing was written but shards and their index")


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
