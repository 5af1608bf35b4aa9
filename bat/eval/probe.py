"""Runs ``bat-probe`` from a resolved configuration to tables, pictures and heads on disk.

Encoders are evaluated one after the other (``suite.py``), each with all methods and seeds, and then
compared. Data and folds are the same for all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bat import __version__
from bat.config import schema
from bat.config.compose import to_dict
from bat.errors import Interrupted
from bat.eval.encoder_list import encoders_of, finetuned_of
from bat.eval.feature_cache import measured
from bat.eval.features import FeatureStream
from bat.eval.fit import predict
from bat.eval.hardware import with_precision
from bat.eval.loading import autocast_for, device_for
from bat.eval.next_steps import after_probing
from bat.eval.permuted import permuted
from bat.eval.pictures import draw_comparison, draw_encoder
from bat.eval.prepare import Prepared, PreparedData, open_probing, with_encoder
from bat.eval.report import differences
from bat.eval.results import gate_bars, ranking, table
from bat.eval.run_diagnostics import statistics_of
from bat.eval.run_folder import default_out, run_folder
from bat.eval.suite import CURVE, Evaluation
from bat.io import write_json
from bat.logs import start_logging
from bat.metrics.base import describe
from bat.probes.base import check_level, expand, find_probe, takes_encoder
from bat.report.tables import as_text

log = logging.getLogger("bat")

FEW = 3
"""Most methods per encoder for which results are printed fold by fold."""


def probe(config: schema.Probe, *, dry_run: bool = False, force: bool = False) -> Path:
    """Probes frozen encoders as ``config`` says; returns the run folder.

    ``force``: write to a folder of other settings, too.
    """
    start_logging()
    asked = config
    methods = expand(config.methods, level=config.level)
    for method in methods:
        check_level(find_probe(method), config.level)
    methods += [CURVE] if config.insight.curve else []
    encoders = encoders_of(config)
    out = default_out(config)
    config = with_precision(config, out)
    opened = open_probing(config)
    if config.control == "permuted":
        opened = permuted(opened, seed=config.seed)
    finetuned = finetuned_of(
        config,
        list(encoders),
        task=opened.task.name,
        metric=opened.task.metric,
        data=opened.hash,
    )
    if dry_run:
        for name, checkpoint in encoders.items():
            _dry_run(with_encoder(opened, config, checkpoint), out, name, methods)
        print("dry run: nothing was trained, nothing was written but shards and their index")
        return out
    with run_folder(config, out, force=force) as begin:
        evaluations = {}
        for name, checkpoint in encoders.items():  # all of them, before the first is evaluated
            evaluations[name] = _evaluation(config, opened, out, name, checkpoint, methods)
            evaluations[name].check()
        steps = {name: evaluation.steps_left() for name, evaluation in evaluations.items()}
        if not any(steps.values()):
            log.info("nothing to do: %s is finished", out)
        begin()
        try:
            summary = _run(config, opened, out, encoders, methods, finetuned, evaluations, steps)
        except (KeyboardInterrupt, Interrupted):
            log.warning(
                "interrupted: %s/results.jsonl holds what is done, and the same command continues",
                out,
            )
            raise
        print(_report(after_probing(asked, out, opened), summary, out))
    return out


def _evaluation(
    config: schema.Probe,
    opened: PreparedData[schema.Probe],
    out: Path,
    name: str,
    checkpoint: str,
    methods: Sequence[str],
) -> Evaluation:
    """Builds the evaluation of one encoder, without methods of ``all`` that do not suit it."""
    ready = with_encoder(opened, config, checkpoint)
    unfit = _unfit(methods, config, ready)
    return Evaluation(ready, out, name=name, methods=[m for m in methods if m not in unfit])


def _seconds_before(out: Path) -> float:
    """Returns the seconds of earlier starts, as recorded in their summary."""
    try:
        return float(json.loads((out / "summary.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _unfit(methods: Sequence[str], config: schema.Probe, ready: Prepared[schema.Probe]) -> set[str]:
    """Returns those of ``methods`` that ``all`` stands for and that do not suit the encoder."""
    if ready.backbone.has_queries:
        return set()
    unfit = {m for m in methods if m != CURVE and takes_encoder(find_probe(m))}
    return unfit - set(config.methods)  # methods named by the user raise an error that says why


def _run(
    config: schema.Probe,
    opened: PreparedData[schema.Probe],
    out: Path,
    encoders: dict[str, str],
    methods: Sequence[str],
    finetuned: dict[str, float],
    evaluations: dict[str, Evaluation],
    steps: dict[str, int],
) -> dict[str, Any]:
    """Probes all ``encoders`` and returns the summary, as written to ``summary.json``.

    ``steps`` of each encoder, for the progress bar. Each of ``evaluations`` is released once done.
    """
    began = time.perf_counter() - _seconds_before(out)
    found: dict[str, Any] = {}
    for number, name in enumerate(encoders, start=1):
        evaluation = evaluations.pop(name)
        of = f", encoder {number} of {len(encoders)}" if len(encoders) > 1 else ""
        log.info("%s", _headline(evaluation.ready, name, methods, out, of))
        if unfit := _unfit(methods, config, evaluation.ready):
            log.warning("%s: not defined for this encoder, left out", ", ".join(sorted(unfit)))
        before = sum(steps[other] for other in found)
        found[name] = {
            **evaluation.run(before=before, total=sum(steps.values())),
            "finetuned": finetuned.get(name),
        }
        then = time.perf_counter()
        found[name]["insight"] |= statistics_of(evaluation)
        evaluation.seconds["insight"] = round(time.perf_counter() - then, 1)
        draw_encoder(out / "plots" / name, evaluation, found[name])
        summary = _summary(config, opened, methods, found, time.perf_counter() - began)
        summary["unfinished"] = [other for other in encoders if other not in found]
        if not summary["unfinished"]:
            summary["differences"] = differences(out, summary)
        write_json(out / "summary.json", summary)
        del evaluation
    draw_comparison(out / "plots", summary)
    return summary


def _summary(
    config: schema.Probe,
    opened: PreparedData[schema.Probe],
    methods: Sequence[str],
    encoders: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of ``summary.json`` for the encoders that are done so far."""
    task, device = opened.task, device_for(config.hardware)
    return {
        "task": task.name,
        "recipe": config.recipe,
        "metric": task.metric,
        "better": describe(task.metric).better,
        "target": task.target,
        "multi_label": task.multi_label,
        "level": config.level,
        "protocol": to_dict(config.protocol),
        "control": config.control,
        "how": opened.how,
        "notices": list(opened.notices),
        "methods": list(methods),
        "clips": len(opened.index),
        "labels": list(opened.labels),
        "rounds": [
            {
                "name": r.name,
                "train": len(r.train),
                "valid": 0 if r.valid is None else len(r.valid),
                "test": len(r.test),
            }
            for r in opened.rounds
        ],
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "steps": config.train.steps if not config.train.epochs else None,
        "epochs": config.train.epochs or None,
        "min_steps": config.train.min_steps or None,
        "head": to_dict(opened.config.head),
        "optim": to_dict(config.optim),
        "data": opened.hash,
        "clip_seconds": opened.config.data.clip_seconds,
        "batch": config.data.batch,
        "confidence": config.confidence,
        "bootstrap": config.bootstrap,
        "encoders": encoders,
        "ranking": ranking({name: e["results"] for name, e in encoders.items()}, task.metric),
        "seconds": round(seconds, 1),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(),
        "precision": config.hardware.precision,
        "version": __version__,
    }


def _dry_run(ready: Prepared[schema.Probe], out: Path, name: str, methods: Sequence[str]) -> None:
    """Builds everything and runs one batch through encoder and probes (one clip on the CPU)."""
    evaluation = Evaluation(ready, out, name=name, methods=methods)
    evaluation.to_device()
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
        needs=evaluation.needs(),
    )
    clips = config.data.batch if evaluation.device.type == "cuda" else 1
    features, _ = next(iter(stream.once(ready.rounds[0].train[:clips], batch=clips)))
    size = measured(stream, ready.rounds[0].train, batch=clips) * len(index)
    if ready.note:
        print(ready.note)
    print(f"data      {len(index)} clips, {index.classes} labels, {len(ready.rounds)} round(s)")
    print(
        f"encoder   {name}: width {backbone.width}, {backbone.depth} blocks, "
        f"{'each clip its own' if frames is None else frames} frames"
    )
    print(f"features  {tuple(features.patches.shape)} a batch, {size / 1e9:.3f} GB for all clips")
    for method in methods:
        trained = evaluation.build(method).to(evaluation.device)
        size = sum(p.numel() for p in trained.parameters())
        targets = torch.zeros(features.patches.shape[1], 1)
        logits, _ = predict({method: trained}, iter([(features, targets)]), autocast=autocast)
        shape = tuple(next(iter(logits.values())).shape)
        print(f"{method:<10} {size / 1e6:.3f} M parameters, logits {shape}")


def _headline(
    ready: Prepared[schema.Probe], name: str, methods: Sequence[str], out: Path, of: str
) -> str:
    config = ready.config
    level = ""
    if config.level == "frame":
        level = " at frame level" + (
            "" if ready.targets_of is not None else ", averaged over time for clip labels"
        )
    seeds = f", {config.seeds} seeds" if config.seeds > 1 else ""
    length = f"{config.train.steps} steps"
    if config.train.epochs:
        clips = min(len(held.train) for held in ready.rounds)
        steps = math.ceil(config.train.epochs * clips / config.data.batch)
        length = f"{config.train.epochs:g} epochs, {max(1, steps, config.train.min_steps)} steps"
    more = [
        f"{', '.join(methods)}{level}: {len(ready.rounds)} round(s){seeds}, {length}; the encoder "
        "is frozen"
    ]
    if not ready.backbone.has_cls:
        more.append("no class token in this encoder: the mean patch stands in for it")
    if config.control == "permuted":
        more.append("control: every clip has another clip's labels")
    first = (
        f"bat {__version__}: probing {name}{of} ({config.checkpoint}, {config.weights}) in {out}"
    )
    return ready.headline(first, *more)


def _report(advice: list[str], summary: dict[str, Any], out: Path) -> str:
    encoders = summary["encoders"]
    parts = [as_text([summary])]
    if len(encoders) == 1:
        (entry,) = encoders.values()
        if 1 < len(entry["results"]) <= FEW:
            parts.insert(0, table(entry["results"]))
        for method, own in entry["results"].items():
            if own["gate"]:
                mean = np.mean(list(own["gate"].values()), axis=0)
                parts.append(
                    f"{method}: layer gate, mean over {len(own['gate'])} training(s)\n"
                    + gate_bars(mean.tolist())
                )
    places = [f"results   {out}/summary.json, {out}/results.jsonl", f"pictures  {out}/plots/"]
    if heads := sorted(out.glob("heads/*/*")):
        more = f" and {len(heads) - 1} more" if heads[1:] else ""
        places.append(f"heads     {heads[0]}{more} (bat.eval.heads.load_head)")
    parts.append("\n  ".join(["Where everything is:", *places]))
    parts.append("\n  ".join(["Next:", *advice]))
    return "\n\n".join(parts)
