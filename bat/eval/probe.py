"""Runs ``bat-probe`` from a resolved configuration to tables, pictures and heads on disk.

Encoders are evaluated one after the other (``evaluation.py``), each with all methods and seeds, and
then compared. Data and folds are the same for all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bat import __version__
from bat.config import schema
from bat.config.compose import to_dict
from bat.errors import Interrupted
from bat.eval.encoder_list import encoders_of, finetuned_of
from bat.eval.evaluation import CURVE, Evaluation
from bat.eval.feature_cache import measured
from bat.eval.fit import predict
from bat.eval.hardware import with_precision
from bat.eval.loading import device_for
from bat.eval.next_steps import after_probing
from bat.eval.pictures import draw_comparison, draw_encoder
from bat.eval.prepare import PreparedData, open_probing, permuted, with_encoder
from bat.eval.report import differences
from bat.eval.results import gate_bars, ranking, table
from bat.eval.run_folder import default_out, run_folder
from bat.io import write_json
from bat.logs import start_logging
from bat.metrics.base import describe
from bat.probes.base import check_level, expand, find_probe
from bat.report.tables import as_text

log = logging.getLogger("bat")

FEW = 3
"""Most methods of one encoder for which results are printed fold by fold."""


def probe(
    config: schema.Probe,
    *,
    dry_run: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Probes frozen encoders as ``config`` says; returns the run folder.

    ``force``: write to a folder of other settings, too. ``say``: gets the report at the end.
    """
    start_logging()
    asked = config
    methods = expand(config.methods, level=config.level)
    for method in methods:
        check_level(find_probe(method), config.level)
    methods += [CURVE] if config.diagnostics.curve else []
    encoders = encoders_of(config)
    out = default_out(config)
    config = with_precision(config, out)
    data = open_probing(config)
    if config.permute_labels:
        data = permuted(data, seed=config.seed)
    finetuned = finetuned_of(
        config,
        list(encoders),
        task=data.task.name,
        metric=data.task.metric,
        data=data.hash,
    )

    def evaluation_of(name: str) -> Evaluation:
        ready = with_encoder(data, config, encoders[name])
        return Evaluation(ready, out, name=name, methods=methods)

    if dry_run:
        for name in encoders:
            _dry_run(evaluation_of(name))
        print("dry run: nothing was trained, nothing was written but shards and their index")
        return out
    with run_folder(config, out, force=force) as begin:
        evaluations = {name: evaluation_of(name) for name in encoders}
        steps = {name: evaluation.steps_left() for name, evaluation in evaluations.items()}
        if not any(steps.values()):
            log.info("nothing to do: %s is finished", out)
        begin()
        began = time.perf_counter() - _seconds_before(out)
        summary = _summary(config, data, methods)
        lines = [line for e in evaluations.values() for line in e.ready.notices]
        summary["notices"] = list(dict.fromkeys(lines))
        try:
            for number, name in enumerate(encoders, start=1):
                evaluation = evaluations.pop(name)  # released once done
                of = f", encoder {number} of {len(encoders)}" if len(encoders) > 1 else ""
                log.info("%s", _headline(evaluation, methods, of))
                if evaluation.left_out:
                    log.warning(
                        "%s: not defined for this encoder, left out", ", ".join(evaluation.left_out)
                    )
                before = sum(steps[other] for other in summary["encoders"])
                entry = evaluation.run(before=before, total=sum(steps.values()))
                summary["encoders"][name] = {**entry, "finetuned": finetuned.get(name)}
                draw_encoder(out / "plots" / name, evaluation, entry)
                _update(summary, out, unfinished=list(evaluations))
                summary["seconds"] = round(time.perf_counter() - began, 1)
                write_json(out / "summary.json", summary)
        except (KeyboardInterrupt, Interrupted):
            log.warning(
                "interrupted: %s/results.jsonl holds what is done, and the same command continues",
                out,
            )
            raise
        draw_comparison(out / "plots", summary)
        say(_report(after_probing(asked, out, data), summary, out))
    return out


def _seconds_before(out: Path) -> float:
    """Returns the seconds of earlier starts, as recorded in their summary."""
    try:
        return float(json.loads((out / "summary.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _summary(
    config: schema.Probe, data: PreparedData[schema.Probe], methods: Sequence[str]
) -> dict[str, Any]:
    """Returns the content of ``summary.json`` before the first encoder is done."""
    task, device = data.task, device_for(config.hardware)
    return {
        "task": task.name,
        "recipe": config.recipe,
        "metric": task.metric,
        "better": describe(task.metric).better,
        "target": task.target,
        "multi_label": task.multi_label,
        "level": config.level,
        "protocol": to_dict(config.protocol),
        "permute_labels": config.permute_labels,
        "how": data.how,
        "methods": list(methods),
        "clips": len(data.index),
        "labels": list(data.labels),
        "splits": [
            {
                "name": held.name,
                "train": len(held.train),
                "valid": 0 if held.valid is None else len(held.valid),
                "test": len(held.test),
            }
            for held in data.splits
        ],
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "steps": config.train.steps if not config.train.epochs else None,
        "epochs": config.train.epochs or None,
        "min_steps": config.train.min_steps or None,
        "head": to_dict(data.config.head),
        "optim": to_dict(config.optim),
        "data": data.hash,
        "clip_seconds": data.config.data.clip_seconds,
        "batch": config.data.batch,
        "confidence": config.confidence,
        "bootstrap": config.bootstrap,
        "encoders": {},
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(),
        "precision": config.hardware.precision,
        "version": __version__,
    }


def _update(summary: dict[str, Any], out: Path, *, unfinished: list[str]) -> None:
    """Brings the comparisons in ``summary`` up to date with its encoders."""
    results = {name: entry["results"] for name, entry in summary["encoders"].items()}
    summary["ranking"] = ranking(results, summary["metric"])
    summary["unfinished"] = unfinished
    if not unfinished:
        summary["differences"] = differences(out, summary)


def _dry_run(evaluation: Evaluation) -> None:
    """Builds everything and runs one batch through encoder and probes (one clip on the CPU)."""
    evaluation.to_device()
    ready = evaluation.ready
    index, backbone, frames, splits = ready.index, ready.backbone, ready.frames, ready.splits
    stream = evaluation.stream()
    clips = ready.config.data.batch if evaluation.device.type == "cuda" else 1
    size = measured(stream, splits[0].train, batch=clips) * len(index)
    features, _ = next(iter(stream.once(splits[0].train, batch=clips)))
    if ready.note:
        print(ready.note)
    print(f"data      {len(index)} clips, {index.classes} labels, {len(splits)} fold(s)")
    print(
        f"encoder   {evaluation.name}: width {backbone.width}, {backbone.depth} blocks, "
        f"{'each clip its own' if frames is None else frames} frames"
    )
    print(f"features  {tuple(features.patches.shape)} a batch, {size / 1e9:.3f} GB for all clips")
    for method in evaluation.methods:
        built = evaluation.build(method).to(evaluation.device)
        size = sum(p.numel() for p in built.parameters())
        batch = (features, torch.zeros(features.patches.shape[1], 1))
        logits, _ = predict({method: built}, iter([batch]), autocast=evaluation.autocast)
        shape = tuple(next(iter(logits.values())).shape)
        print(f"{method:<10} {size / 1e6:.3f} M parameters, logits {shape}")


def _headline(evaluation: Evaluation, methods: Sequence[str], of: str) -> str:
    ready, config = evaluation.ready, evaluation.config
    level = " at frame level" if config.level == "frame" else ""
    if level and ready.targets_of is None:
        level += ", averaged over time for clip labels"
    seeds = f", {config.seeds} seeds" if config.seeds > 1 else ""
    length = f"{config.train.steps} steps"
    if config.train.epochs:
        clips = min(len(held.train) for held in ready.splits)
        steps = math.ceil(config.train.epochs * clips / config.data.batch)
        length = f"{config.train.epochs:g} epochs, {max(1, steps, config.train.min_steps)} steps"
    more = [
        f"{', '.join(methods)}{level}: {len(ready.splits)} fold(s){seeds}, {length}; the encoder "
        "is frozen"
    ]
    if not ready.backbone.has_cls:
        more.append("no class token in this encoder: the mean patch stands in for it")
    if config.permute_labels:
        more.append("permuted labels: every clip has another clip's labels")
    source = f"{config.checkpoint}, {config.weights}"
    first = f"bat {__version__}: probing {evaluation.name}{of} ({source}) in {evaluation.out}"
    return ready.headline(first, *more)


def _report(advice: list[str], summary: dict[str, Any], out: Path) -> str:
    parts = [as_text([summary])]
    if len(summary["encoders"]) == 1:
        (entry,) = summary["encoders"].values()
        if 1 < len(entry["results"]) <= FEW:
            parts.insert(0, table(entry["results"]))
        for method, result in entry["results"].items():
            if gates := list(result["gate"].values()):
                parts.append(
                    f"{method}: layer gate, mean over {len(gates)} training(s)\n"
                    + gate_bars(np.mean(gates, axis=0).tolist())
                )
    places = [f"results   {out}/summary.json, {out}/results.jsonl", f"pictures  {out}/plots/"]
    if heads := sorted(out.glob("heads/*/*")):
        more = f" and {len(heads) - 1} more" if heads[1:] else ""
        places.append(f"heads     {heads[0]}{more} (bat.eval.heads.load_head)")
    parts.append("\n  ".join(["Where everything is:", *places]))
    parts.append("\n  ".join(["Next:", *advice]))
    return "\n\n".join(parts)
