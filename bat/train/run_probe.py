"""One probing from a resolved configuration to its table, pictures and heads on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bat import __version__
from bat.config import schema
from bat.data.bad_clips import BadClips
from bat.data.module import eval_loader
from bat.probes.base import Probe, build_probe, find_probe
from bat.report.plots import plot_folds, plot_layer_gates
from bat.tasks.base import Task
from bat.train.encoders import (
    autocast_for,
    checkpoint_name,
    device_for,
)
from bat.train.features import FeatureBank, FeatureStream, Source, bank_bytes
from bat.train.heads import save_head
from bat.train.prepare import Prepared, prepare
from bat.train.probing import cross_validate, predict
from bat.train.results import HOW, TITLES, Outcome, gate_bars, summary, table
from bat.train.run_folder import run_folder
from bat.train.speed import speed_up
from bat.train.trainer import start_logging, write_json

log = logging.getLogger("bat")


def probe(config: schema.Probe, *, dry_run: bool = False, force: bool = False) -> Path:
    """Probe a frozen encoder as ``config`` says; returns the run folder.

    ``force``: in a folder of other settings all the same.
    """
    for method in config.methods:
        find_probe(method)
    ready = prepare(config)
    config, index, backbone = ready.config, ready.index, ready.backbone
    out = Path(
        config.out
        or f"runs/probe-{config.recipe}-{checkpoint_name(config)}-{'+'.join(config.methods)}"
    )
    device = device_for(config.hardware)
    backbone.to(device)
    speed_up(backbone, config.hardware)

    def build(method: str) -> Probe:
        return build_probe(
            method,
            classes=index.classes,
            width=backbone.width,
            depth=backbone.depth,
            has_cls=backbone.has_cls,
            level=config.level,
            **asdict(config.head),
        )

    if dry_run:
        _dry_run(ready, build)
        return out

    with run_folder(config, out, force=force):
        start_logging(out)
        _run(ready, build, out, device)
    return out


def _run(
    ready: Prepared[schema.Probe], build: Callable[[str], Probe], out: Path, device: torch.device
) -> None:
    config, task, index = ready.config, ready.task, ready.index
    log.info("%s", _headline(ready, out))
    metrics = out / "metrics.jsonl"
    metrics.write_text("", encoding="utf-8")

    def on_log(row: dict[str, Any]) -> None:
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_probe(trained: Probe, outcome: Outcome) -> None:
        on_log({"fold": outcome.fold, "method": outcome.method, **outcome.metrics})
        save_head(
            out / "heads" / f"{outcome.method}-{outcome.fold}",
            trained,
            name=outcome.method,
            head=asdict(config.head),
            meta={
                "bat_version": __version__,
                "task": task.name,
                "labels": index.vocabulary,
                "held_out": outcome.fold,
                "metrics": outcome.metrics,
                "encoder": {"checkpoint": config.checkpoint, "weights": config.weights},
            },
        )

    began = time.perf_counter()
    bad = BadClips(max_bad=config.data.max_bad)
    source = _source(ready, bad)
    outcomes = cross_validate(
        source,
        ready.rounds,
        methods=config.methods,
        build=build,
        loss=ready.loss,
        optim=config.optim,
        steps=config.train.steps,
        batch=config.data.batch,
        multi_label=task.multi_label,
        seed=config.seed,
        autocast=autocast_for(config.hardware),
        device=device,
        progress=config.log.progress,
        log_every=config.train.log_every,
        on_log=on_log,
        on_probe=on_probe,
    )
    bad.check(final=True)
    results = summary(outcomes)
    _draw(out, results, task)
    write_json(
        out / "summary.json",
        {
            "checkpoint": config.checkpoint,
            "weights": config.weights,
            "task": task.name,
            "level": config.level,
            "how": HOW,
            "clips": len(index),
            "features": "in memory" if isinstance(source, FeatureBank) else "streamed",
            "bad_clips": bad.state_dict(),
            "results": results,
            "seconds": round(time.perf_counter() - began, 1),
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(),
            "version": __version__,
        },
    )
    log.info("%s", bad.summary())
    print(_report(config, results, out))


def _source(ready: Prepared[schema.Probe], bad: BadClips) -> Source:
    """Features in memory where they fit into ``feature_gb``, else made for each batch."""
    config, index, backbone = ready.config, ready.index, ready.backbone
    frames, rounds = ready.frames, ready.rounds
    autocast = autocast_for(config.hardware)
    ids = np.unique(np.concatenate([np.concatenate([r.train, r.test]) for r in rounds]))
    need = bank_bytes(backbone, len(ids), frames=frames, dtype=autocast or torch.float32)
    cache = int(config.data.cache_waves_gb * 1e9)
    random_offset = config.pad_offset == "random"
    if config.data.roll or random_offset or need > config.feature_gb * 1e9:
        why = f"feature_gb={config.feature_gb:g}"
        if config.data.roll or random_offset:
            why = "data.roll" if config.data.roll else "pad_offset=random"
        log.info("features made anew for each batch (%.2f GB for all; %s)", need / 1e9, why)
        return FeatureStream(
            backbone,
            index,
            frames=frames,
            clip_seconds=config.data.clip_seconds,
            roll=config.data.roll,
            random_offset=random_offset,
            min_seconds=config.data.min_seconds,
            max_seconds=config.data.max_seconds,
            workers=config.data.workers,
            cache_bytes=cache,
            autocast=autocast,
            bad_clips=bad,
        )
    device = next(backbone.parameters()).device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2 * need:
        device = torch.device("cpu")
    log.info("features of %d clips in memory: %.2f GB on %s", len(ids), need / 1e9, device)
    batches = eval_loader(
        index,
        ids,
        batch=config.data.batch,
        sample_rate=backbone.sample_rate,
        clip_seconds=config.data.clip_seconds,
        workers=config.data.workers,
        cache_bytes=cache,
        min_seconds=config.data.min_seconds,
        max_seconds=config.data.max_seconds,
    )
    return FeatureBank.extract(
        backbone,
        batches,
        ids=ids,
        frames=frames,
        autocast=autocast,
        device=device,
        bad_clips=bad,
        progress=config.log.progress,
    )


def _dry_run(ready: Prepared[schema.Probe], build: Callable[[str], Probe]) -> None:
    """Build everything, one batch through encoder and probes (one clip on the CPU)."""
    config, index, backbone, frames = ready.config, ready.index, ready.backbone, ready.frames
    autocast = autocast_for(config.hardware)
    stream = FeatureStream(
        backbone,
        index,
        frames=frames,
        clip_seconds=config.data.clip_seconds,
        min_seconds=config.data.min_seconds,
        max_seconds=config.data.max_seconds,
        autocast=autocast,
    )
    device = next(backbone.parameters()).device
    clips = config.data.batch if device.type == "cuda" else 1
    features, _ = next(iter(stream.once(ready.rounds[0].train[:clips], batch=clips)))
    dtype = autocast or torch.float32
    need = bank_bytes(backbone, len(index), frames=frames, dtype=dtype)
    if ready.note:
        print(ready.note)
    print(f"data      {len(index)} clips, {index.classes} labels, {len(ready.rounds)} round(s)")
    print(f"encoder   width {backbone.width}, {backbone.depth} blocks, {frames} frames a clip")
    print(f"features  {tuple(features.patches.shape)} a batch, {need / 1e9:.2f} GB for all clips")
    for method in config.methods:
        probe = build(method).to(device)
        size = sum(p.numel() for p in probe.parameters())
        logits, _ = predict(
            {method: probe},
            iter([(features, torch.zeros(features.patches.shape[1], 1))]),
            autocast=autocast,
        )
        print(f"{method:<9} {size / 1e6:.3f} M parameters, logits {tuple(logits[method].shape)}")
    print("dry run: nothing was trained, nothing was written but shards and their index")


def _headline(ready: Prepared[schema.Probe], out: Path) -> str:
    config = ready.config
    level = " at frame level, averaged over time for clip labels" if config.level == "frame" else ""
    more = [
        f"{', '.join(config.methods)}{level}: {len(ready.rounds)} round(s), "
        f"{config.train.steps} steps; the encoder is frozen"
    ]
    if "linear" in config.methods and not ready.backbone.has_cls:
        more.append("no class token in this encoder: the mean patch stands in for it")
    first = f"bat {__version__}: probing {config.checkpoint} ({config.weights}) in {out}"
    return ready.headline(first, *more)


def _draw(out: Path, results: dict[str, dict[str, Any]], task: Task) -> None:
    gates = {m: list(e["gate"].values()) for m, e in results.items() if e["gate"]}
    if gates:
        plot_layer_gates(gates, out / "plots" / "layer-gates.png")
    metric = task.metric
    folds = {m: {fold: row[metric] for fold, row in e["folds"].items()} for m, e in results.items()}
    plot_folds(folds, out / "plots" / "folds.png", metric=TITLES[metric])


def _report(config: schema.Probe, results: dict[str, dict[str, Any]], out: Path) -> str:
    parts = [table(results)]
    for method, entry in results.items():
        if entry["gate"]:
            mean = np.mean(list(entry["gate"].values()), axis=0)
            parts.append(
                f"{method}: layer gate, mean over {len(entry['gate'])} round(s)\n"
                + gate_bars(mean.tolist())
            )
    checkpoint = str(config.checkpoint)
    methods = ",".join(config.methods)
    control = "" if checkpoint.startswith("random") else f"random:{checkpoint}"
    parts.append(
        f"({HOW})\n\n"
        "Where everything is:\n"
        f"  results   {out}/summary.json, {out}/metrics.jsonl\n"
        f"  pictures  {out}/plots/\n"
        f"  heads     {out}/heads/METHOD-FOLD/ (bat.train.heads.load_head reads one)\n\n"
        "Next:"
        + (
            f"\n  bat-probe    recipe={config.recipe} checkpoint={control} --method {methods}"
            "   (the same encoder untrained: the control)"
            if control
            else ""
        )
        + f"\n  bat-finetune recipe={config.recipe} checkpoint={checkpoint}"
    )
    return "\n\n".join(parts)
