"""One fine-tuning from a resolved configuration: fold after fold, each resumable, then the table.

``out/fold-K/`` holds a fold's checkpoints, metrics and curves, and when it is done its encoder
(``export/``), its head (``head/``) and ``result.json``. A killed run, started again, reads the
finished folds from their results and continues the one it was in.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bat import __version__, checkpoint
from bat.backbones.base import Backbone
from bat.config import schema
from bat.config.compose import to_dict
from bat.data.module import AudioData
from bat.probes.base import build_probe, find_probe
from bat.report.plots import plot_curves, plot_folds
from bat.train.callbacks import Checkpoints, Metrics
from bat.train.encoders import autocast_for, checkpoint_name, compile_blocks
from bat.train.features import FeatureStream
from bat.train.heads import save_head
from bat.train.held_out import (
    HOW,
    TITLES,
    Outcome,
    Round,
    summary,
    table,
)
from bat.train.metrics import evaluate
from bat.train.prepare import Prepared, prepare
from bat.train.probing import own_randomness, predict
from bat.train.run_folder import open_run
from bat.train.run_pretrain import first_batch
from bat.train.supervised import Supervised
from bat.train.trainer import (
    build_trainer,
    derive_seed,
    last_checkpoint,
    read_jsonl,
    start_logging,
    write_json,
)

log = logging.getLogger("bat")


def finetune(config: schema.Finetune, *, dry_run: bool = False) -> Path:
    """Fine-tune as ``config`` says; returns the run folder. Continues what is already there."""
    find_probe(config.method)
    ready = prepare(config)
    config = ready.config
    out = Path(config.out or f"runs/finetune-{config.recipe}-{checkpoint_name(config)}")
    run = _Run(ready, out)
    if dry_run:
        _dry_run(run)
        return out

    open_run(config, out)
    start_logging(out)
    log.info("%s", _headline(run))
    began = time.perf_counter()
    results = [run.fold(held) for held in ready.rounds]
    outcomes = [Outcome(config.method, r["held_out"], r["metrics"]) for r in results]
    found = summary(outcomes)
    metric = ready.task.metric
    plot_folds(
        {config.method: {o.fold: o.metrics[metric] for o in outcomes}},
        out / "plots" / "folds.png",
        metric=TITLES[metric],
        title=f"Fine-tuned {TITLES[metric]} by held-out fold",
    )
    write_json(
        out / "summary.json",
        {
            "checkpoint": config.checkpoint,
            "weights": config.weights,
            "task": ready.task.name,
            "how": HOW,
            "clips": len(ready.index),
            "bad_clips": {r["held_out"]: r["bad_clips"] for r in results},
            "results": found,
            "seconds": round(time.perf_counter() - began, 1),
            "version": __version__,
        },
    )
    for result in results:
        log.info("held out %s: %s", result["held_out"], result["bad"])
    print(_report(config, found, out))
    return out


class _Run:
    """What the folds of a fine-tuning share."""

    def __init__(self, ready: Prepared[schema.Finetune], out: Path) -> None:
        self.ready, self.out = ready, out
        self.config, self.task, self.index = ready.config, ready.task, ready.index
        self.backbone, self.frames = ready.backbone, ready.frames

    def module(self, held: Round) -> Supervised:
        """A fresh copy of the encoder with a fresh head."""
        backbone = copy.deepcopy(self.backbone)
        with own_randomness(torch.device("cpu")):
            torch.manual_seed(derive_seed(self.config.seed, held.name, "init"))
            head = build_probe(
                self.config.method,
                classes=self.index.classes,
                width=backbone.width,
                depth=backbone.depth,
                has_cls=backbone.has_cls,
                **asdict(self.config.head),
            )
        module = Supervised(
            self.config,
            backbone=backbone,
            head=head,
            loss=self.ready.loss,
            frames=self.frames,
            fold=held.name,
        )
        if self.config.hardware.compile:
            compile_blocks(backbone)
        return module

    def data(self, held: Round) -> AudioData:
        config, data = self.config, self.config.data
        return AudioData(
            index=self.index,
            batch=data.batch,
            batches=config.train.steps * config.train.accumulate,
            sample_rate=self.backbone.sample_rate,
            clip_seconds=data.clip_seconds,
            seed=derive_seed(config.seed, held.name, "order"),
            roll=data.roll,
            workers=data.workers,
            train_ids=held.train,
            cache_bytes=int(data.cache_waves_gb * 1e9),
            max_bad=data.max_bad,
        )

    def fold(self, held: Round) -> dict[str, Any]:
        """Train with ``held`` held out, judge, write its folder; read it where that is done."""
        folder = self.out / f"fold-{held.name}"
        done = folder / "result.json"
        if done.is_file():
            log.info("held out %s: done before, read from %s", held.name, done)
            result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return result
        config = self.config
        folder.mkdir(parents=True, exist_ok=True)
        newest = last_checkpoint(folder)
        start = f"continuing from {newest}" if newest else "starting"
        log.info("held out %s: %s, %d clips to train on", held.name, start, len(held.train))
        module, data = self.module(held), self.data(held)
        trainer = build_trainer(
            hardware=config.hardware,
            train=config.train,
            log=config.log,
            out=folder,
            clip_norm=config.optim.clip_norm,
            callbacks=[
                Metrics(every=config.train.log_every, progress=config.log.progress),
                Checkpoints(folder, every=config.train.save_every, keep=config.train.keep),
            ],
            name=f"finetune-{config.recipe}-{held.name}",
        )
        trainer.fit(module, datamodule=data, ckpt_path=str(newest) if newest else None)
        if trainer.interrupted:
            raise KeyboardInterrupt
        data.bad_clips.check(final=True)
        metrics = self.judge(module.to(trainer.strategy.root_device), held)
        result = {
            "held_out": held.name,
            "metrics": metrics,
            "how": HOW,
            "steps": trainer.global_step,
            "bad_clips": data.bad_clips.state_dict(),
            "bad": data.bad_clips.summary(),
        }
        if trainer.is_global_zero:
            self.write(module.cpu(), folder, result)
        return result

    def judge(self, module: Supervised, held: Round) -> dict[str, Any]:
        """Metrics on the held-out clips, each process on all of them."""
        config, autocast = self.config, autocast_for(self.config.hardware)
        stream = FeatureStream(
            module.backbone,
            self.index,
            frames=self.frames,
            clip_seconds=config.data.clip_seconds,
            workers=config.data.workers,
            autocast=autocast,
        )
        batches = stream.once(held.test, batch=config.data.batch)
        logits, targets = predict({"head": module.head}, batches, autocast=autocast)
        return evaluate(logits["head"], targets, multi_label=self.task.multi_label)

    def write(self, module: Supervised, folder: Path, result: dict[str, Any]) -> None:
        """Encoder, head and curves of a finished fold; ``result.json`` last."""
        config = self.config
        meta = {
            "bat_version": __version__,
            "task": self.task.name,
            "labels": self.index.vocabulary,
            "held_out": result["held_out"],
            "metrics": result["metrics"],
        }
        checkpoint.export(
            folder / "export",
            backbone=_registered_name(module.backbone),
            encoder=module.backbone.config(),
            student=module.backbone.state_dict(),
            teacher={},
            meta={**meta, "training": to_dict(config)},
        )
        save_head(
            folder / "head", module.head, name=config.method, head=asdict(config.head), meta=meta
        )
        plot_curves(read_jsonl(folder / "metrics.jsonl"), folder / "plots" / "curves.png")
        write_json(folder / "result.json", result)


def _registered_name(backbone: Backbone) -> str:
    """The name that ``load_backbone`` finds the class of ``backbone`` by."""
    cls = type(backbone)
    folder, _, name = cls.__module__.rpartition(".")
    return name if folder == "bat.backbones" else f"{cls.__module__}.{cls.__qualname__}"


def _dry_run(run: _Run) -> None:
    """Build everything, loss and gradient of one batch (one clip, forward only, on the CPU)."""
    rounds = run.ready.rounds
    module, data = run.module(rounds[0]), run.data(rounds[0])
    on_gpu = run.config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    module = module.to(device).train()
    autocast = autocast_for(run.config.hardware)
    batch = first_batch(data)
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


def _headline(run: _Run) -> str:
    config = run.config
    return run.ready.headline(
        f"bat {__version__}: fine-tuning {config.checkpoint} ({config.weights}) in {run.out}",
        f"head {config.method}: {len(run.ready.rounds)} round(s), {config.train.steps} steps of "
        f"{config.data.batch} x {config.train.accumulate} clips a device",
    )


def _report(config: schema.Finetune, results: dict[str, dict[str, Any]], out: Path) -> str:
    return "\n\n".join(
        [
            table(results),
            f"({HOW})",
            "Where everything is:\n"
            f"  results   {out}/summary.json, {out}/fold-K/metrics.jsonl\n"
            f"  encoders  {out}/fold-K/export (bat.load_encoder reads one), heads fold-K/head\n"
            f"  pictures  {out}/plots/, {out}/fold-K/plots/",
            "Next:\n"
            f"  bat-probe recipe={config.recipe} checkpoint={config.checkpoint} "
            "--method cgp,linear   (the same encoder frozen)",
        ]
    )
