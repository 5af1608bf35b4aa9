"""One probing from a resolved configuration to its table, pictures and heads on disk."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bat import __version__
from bat.backbones.base import Backbone
from bat.config import schema
from bat.data.bad_clips import BadClips
from bat.data.index import Index
from bat.data.module import eval_loader
from bat.probes.base import Probe, build_probe, find_probe
from bat.report.plots import plot_folds, plot_layer_gates
from bat.tasks.base import Task, load_task
from bat.train.encoders import (
    autocast_for,
    checkpoint_name,
    compile_blocks,
    data_of_run,
    device_for,
    load_for,
)
from bat.train.features import FeatureBank, FeatureStream, Source, bank_bytes
from bat.train.heads import save_head
from bat.train.held_out import (
    HOW,
    TITLES,
    Outcome,
    Round,
    check_labels,
    gate_bars,
    make_rounds,
    summary,
    table,
)
from bat.train.losses import loss_for
from bat.train.probing import cross_validate, predict
from bat.train.run_folder import open_data, open_run
from bat.train.trainer import start_logging, write_json

log = logging.getLogger("bat")


def probe(config: schema.Probe, *, dry_run: bool = False) -> Path:
    """Probe a frozen encoder as ``config`` says; returns the run folder."""
    for method in config.methods:
        find_probe(method)
    task = load_task(config.task)
    backbone, frames = load_for(config, task)
    data, note = data_of_run(config)
    config = replace(config, data=data)
    task, index = open_data(config.task, config.data, progress=config.log.progress)
    check_labels(task, index)
    loss = loss_for(task, config.loss)
    rounds = make_rounds(index, config.folds)
    out = Path(
        config.out
        or f"runs/probe-{config.recipe}-{checkpoint_name(config)}-{'+'.join(config.methods)}"
    )
    device = device_for(config.hardware)
    backbone = backbone.to(device)
    if config.hardware.compile:
        compile_blocks(backbone)

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
        _dry_run(config, backbone, index, rounds, build, frames=frames, note=note)
        return out

    open_run(cast(Any, config), out)
    start_logging(out)
    log.info("%s", _headline(config, task, index, backbone, rounds, out, note))
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
    source = _source(config, backbone, index, rounds, frames=frames, bad=bad)
    outcomes = cross_validate(
        source,
        rounds,
        methods=config.methods,
        build=build,
        loss=loss,
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
    return out


def _source(
    config: schema.Probe,
    backbone: Backbone,
    index: Index,
    rounds: list[Round],
    *,
    frames: int,
    bad: BadClips,
) -> Source:
    """Features in memory where they fit into ``feature_gb``, else made for each batch."""
    autocast = autocast_for(config.hardware)
    ids = np.unique(np.concatenate([np.concatenate([r.train, r.test]) for r in rounds]))
    need = bank_bytes(backbone, len(ids), frames=frames, dtype=autocast or torch.float32)
    cache = int(config.data.cache_waves_gb * 1e9)
    if config.data.roll or need > config.feature_gb * 1e9:
        why = "data.roll" if config.data.roll else f"feature_gb={config.feature_gb:g}"
        log.info("features made anew for each batch (%.2f GB for all; %s)", need / 1e9, why)
        return FeatureStream(
            backbone,
            index,
            frames=frames,
            clip_seconds=config.data.clip_seconds,
            roll=config.data.roll,
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


def _dry_run(
    config: schema.Probe,
    backbone: Backbone,
    index: Index,
    rounds: list[Round],
    build: Any,
    *,
    frames: int,
    note: str,
) -> None:
    """Build everything, one batch through encoder and probes (one clip on the CPU)."""
    autocast = autocast_for(config.hardware)
    stream = FeatureStream(
        backbone, index, frames=frames, clip_seconds=config.data.clip_seconds, autocast=autocast
    )
    device = next(backbone.parameters()).device
    clips = config.data.batch if device.type == "cuda" else 1
    features, _ = next(iter(stream.once(rounds[0].train[:clips], batch=clips)))
    dtype = autocast or torch.float32
    need = bank_bytes(backbone, len(index), frames=frames, dtype=dtype)
    if note:
        print(note)
    print(f"data      {len(index)} clips, {index.classes} labels, {len(rounds)} round(s)")
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


def _headline(
    config: schema.Probe,
    task: Task,
    index: Index,
    backbone: Backbone,
    rounds: list[Round],
    out: Path,
    note: str,
) -> str:
    level = " at frame level, averaged over time for clip labels" if config.level == "frame" else ""
    lines = [
        f"bat {__version__}: probing {config.checkpoint} ({config.weights}) in {out}",
        f"  data {len(index)} clips (task {task.name}, {index.classes} classes), encoder "
        f"{backbone.width} wide, {backbone.depth} blocks, frozen",
        f"  {', '.join(config.methods)}{level}: {len(rounds)} round(s), {config.train.steps} steps",
    ]
    if "linear" in config.methods and not backbone.has_cls:
        lines.append("  no class token in this encoder: the mean patch stands in for it")
    return "\n".join([*lines, f"  {note}"] if note else lines)


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
