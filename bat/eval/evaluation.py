"""Trains and evaluates all probes and seeds on one encoder, computing its features once.

A run's folder holds, besides what every run has:

    results.jsonl               a result per line, as soon as it is available (``results.py``)
    metrics.jsonl               training losses
    heads/ENCODER/METHOD-FOLD-SEED/    trained heads
    utterances/ENCODER/METHOD-FOLD-SEED.csv  transcripts, of tasks of tokens
    diagnostics/ENCODER.json        sinks, norms and ranks of every block (``diagnostics.py``)
    plots/ENCODER/              its gates, folds and maps
    summary.json                all of it together; plots/: the comparison

Results in ``results.jsonl`` are not trained again: the same command resumes a killed run, and one
with more methods, seeds or encoders adds theirs.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bat import __version__
from bat.config import schema
from bat.data.bad_clips import BadClips
from bat.errors import UserError
from bat.eval.candidates import Plan
from bat.eval.diagnostics import best_clips, encoder_statistics, prototype_maps
from bat.eval.event_pictures import EVENTS, draw_events
from bat.eval.feature_cache import Opened, open_features
from bat.eval.features import FeatureStream, Source, progress_bar
from bat.eval.fit import Predictions, predictions
from bat.eval.hardware import speed_up
from bat.eval.heads import load_head, save_head
from bat.eval.loading import autocast_for, device_for, registered_name, weights_digest
from bat.eval.prepare import Prepared
from bat.eval.results import FoldResult, ResultsFile, read_recorded, recorded, summary
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.eval.targets import FrameTargets, TokenTargets
from bat.eval.transcripts import TRANSCRIPTS, record
from bat.io import filter_jsonl
from bat.probes.base import Probe, build_probe, find_probe, takes_encoder
from bat.probes.cgp import check_cls
from bat.probes.curve import LinearCurve
from bat.types import Needs

log = logging.getLogger("bat")

MAPPED = ("cgp", "protobin", "proto", "protofloat")
"""Probes whose prototypes are drawn, in order of preference."""
CURVE = "curve"
"""Method that trains a linear probe on every block."""


class Evaluation:
    """Evaluates one encoder. ``name``: its name in results; ``methods``: probes, ``CURVE``.

    ``left_out``: methods of ``all`` that are not defined for the encoder.
    """

    def __init__(
        self, ready: Prepared[schema.Probe], out: Path, *, name: str, methods: Sequence[str]
    ) -> None:
        self.ready, self.out, self.name, self.config = ready, out, name, ready.config
        self.left_out = []
        if not ready.backbone.has_queries:  # those that the user named raise an error that says why
            implied = [m for m in methods if m != CURVE and m not in self.config.methods]
            self.left_out = sorted(m for m in implied if takes_encoder(find_probe(m)))
        self.methods = [m for m in methods if m not in self.left_out]
        self.head = asdict(self.config.head)
        if not ready.backbone.has_cls and self.config.level == "clip" and self.head["cls"] is None:
            self.head["cls"] = "mean" if self.config.protocol.name == "bat" else "patches"
        if "cgp" in self.methods:
            check_cls(self.head["cls"], has_cls=ready.backbone.has_cls, level=self.config.level)
        self.device = device_for(self.config.hardware)
        self.autocast = autocast_for(self.config.hardware)
        ready.backbone.requires_grad_(False)
        self.made_from = {"encoder": weights_digest(ready.backbone), "data": ready.index.hash}
        """Inputs that results depend on besides the settings."""
        if ready.targets_of is not None:  # an edited onset changes no shard
            what = "events" if ready.task.target == "events" else "texts"
            self.made_from[what] = ready.targets_of.digest
        self.bad = BadClips(max_bad=self.config.data.max_bad)
        self.seconds: dict[str, float] = {}
        self.opened: Opened | None = None
        self.mapped: tuple[str, Probe] | None = None
        """Probe whose prototypes are drawn: of the first seed in the last fold so far."""

    def build(self, method: str) -> Probe:
        """Builds an untrained probe of this encoder's shape."""
        backbone = self.ready.backbone
        shape: dict[str, Any] = {
            "classes": len(self.ready.labels),
            "width": backbone.width,
            "depth": backbone.depth,
            "has_cls": backbone.has_cls,
            "level": self.config.level,
        }
        if method == CURVE:
            return LinearCurve(**shape, norm=self.head["norm"], dropout=self.head["dropout"])
        return build_probe(method, **shape, encoder=backbone, **self.head)

    def needs(self) -> Needs:
        """Returns the features that the methods need together."""
        wanted = Needs("none")
        for method in self.methods:
            cls = LinearCurve if method == CURVE else find_probe(method)
            wanted |= cls.needs(has_cls=self.ready.backbone.has_cls, level=self.config.level)
        return wanted

    def stream(self) -> FeatureStream:
        """Returns the features of clips, computed anew for each batch."""
        config, data = self.config, self.config.data
        return FeatureStream(
            self.ready.backbone,
            self.ready.index,
            frames=self.ready.frames,
            clip_seconds=data.clip_seconds,
            roll=bool(data.roll),
            random_offset=config.pad_offset == "random",
            noise=data.noise,
            order={"balance": data.balance, "epoch_clips": data.epoch_clips},
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
            workers=data.workers,
            cache_bytes=int(data.cache_waves_gb * 1e9),
            autocast=self.autocast,
            needs=self.needs(),
            targets_of=self.ready.targets_of,
            bad_clips=self.bad,
        )

    @cached_property
    def file(self) -> ResultsFile:
        """The existing results; raises ``UserError`` if of another encoder or other data."""
        path = self.out / "results.jsonl"
        return ResultsFile(path, encoder=self.name, made_from=self.made_from)

    def steps_left(self) -> int:
        """Returns the optimiser steps of all candidates that are still to be trained.

        Raises ``UserError`` if existing results are of something else or a probe cannot be built.
        """
        return self.plan.steps_left(self.ready.splits, self.methods)

    def to_device(self) -> None:
        """Moves the encoder to its device, and compiles it if requested."""
        self.ready.backbone.to(self.device)
        speed_up(self.ready.backbone, self.config.hardware)

    def run(self, *, before: int, total: int) -> dict[str, Any]:
        """Trains and evaluates; returns this encoder's part of ``summary.json``.

        The progress bar counts ``total`` steps, those of all encoders of a command, of which
        ``before`` are done.
        """
        self.to_device()
        plan, file, splits = self.plan, self.file, self.ready.splits
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        wanted = {(m, held.name, s) for m in self.methods for held in splits for s in seeds}
        left = sum(not file.done(*job) for job in wanted)
        if left < len(wanted):
            log.info("%s: %d of %d results are there from before",
                     self.name, len(wanted) - left, len(wanted))  # fmt: skip
        self._forget_unfinished()
        if left:
            source = self._open()
            began = time.perf_counter()
            show = self.config.log.progress
            with progress_bar(total, "probes", unit="step", show=show) as plan.bar:
                plan.bar.initial = plan.bar.n = before
                plan.bar.smoothing = 0  # time left by the mean speed: folds are alike
                found = cross_validate(source, splits, self.methods, plan)
            if plan.diverged and not found and not file.fold_results:
                raise UserError(f"{self.name}: {plan.diverged_line()}")
            self.seconds["probes"] = round(time.perf_counter() - began, 1)
        diverged = {method for method, _, _ in plan.diverged}
        if diverged:
            log.warning("%s: %s", self.name, plan.diverged_line())
        fold_results = [
            fold_result
            for fold_result in file.fold_results
            if (fold_result.probe, fold_result.fold, fold_result.seed) in wanted
            and fold_result.probe not in diverged
        ]
        metric, confidence = self.ready.task.metric, self.config.confidence
        results = summary(fold_results, metric=metric, confidence=confidence)
        self.bad.check(final=True)
        if self.bad.keys:
            first = ": ".join(next(iter(self.bad.keys.items())))
            log.warning("%s: %d unreadable, the first %s", self.name, len(self.bad.keys), first)
        diagnostics: dict[str, Any] = {}
        if CURVE in self.methods and CURVE not in diverged:
            diagnostics["curve"] = self._curve(results)
        began = time.perf_counter()
        diagnostics |= self._statistics()
        self.seconds["diagnostics"] = round(time.perf_counter() - began, 1)
        return {
            **self._description(),
            "results": {method: entry for method, entry in results.items() if "@" not in method},
            "diagnostics": diagnostics,
            "diverged": plan.diverged_line() if diverged else "",
            "seconds": self.seconds,
            **self._stored(),
        }

    def _open(self) -> Source:
        """Opens the features of all clips."""
        began = time.perf_counter()
        ready, config = self.ready, self.config
        parts = [ids for r in ready.splits for ids in (r.train, r.test, r.valid) if ids is not None]
        self.opened = open_features(
            self.stream(),
            np.unique(np.concatenate(parts)),
            batch=config.data.batch,
            store=config.features,
            digest=self.made_from["encoder"],
            progress=config.log.progress,
        )
        self.seconds["features"] = round(time.perf_counter() - began, 1)
        where = {"memory": "in memory", "disk": "on disk", "off": "made for each batch"}
        log.info(
            "%s: features %s (%.3f GB; %s)",
            self.name,
            where[self.opened.cache],
            self.opened.gb,
            self.opened.why,
        )
        return self.opened.source

    @cached_property
    def plan(self) -> Plan:
        """Settings and callbacks of the search."""
        config, task = self.config, self.ready.task
        metrics = self.out / "metrics.jsonl"

        def on_log(row: dict[str, Any]) -> None:
            row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None  # NaN is no JSON
            with metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"encoder": self.name, **row}) + "\n")

        def on_probe(probe: Probe, fold_results: list[FoldResult]) -> None:
            first = fold_results[0]
            first_seed = first.seed == config.seed
            if config.heads_of == "all" or (config.heads_of == "first" and first_seed):
                self._save(probe, first)
            if first_seed and config.diagnostics.maps and first.probe in MAPPED:
                self._keep(probe, first)
            self.file.add(fold_results)

        return Plan(
            build=self.build,
            loss=self.ready.loss,
            optim=config.optim,
            steps=config.train.steps,
            epochs=config.train.epochs,
            min_steps=config.train.min_steps,
            batch=config.data.batch,
            multi_label=task.multi_label,
            metric=task.metric,
            selects=task.selection_metric,
            scorer=self.ready.scorer,
            seed=config.seed,
            seeds=config.seeds,
            protocol=config.protocol,
            bootstrap=config.bootstrap,
            memory_bytes=config.train.memory_gb * 1e9,
            autocast=self.autocast,
            device=self.device,
            log_every=config.train.log_every,
            on_log=on_log,
            on_probe=on_probe,
            on_result=self._list,
            before=self.file.fold_results,
            done=self.file.done,
        )

    def _list(self, result: FoldResult, logits: Tensor, found: Predictions, held: Split) -> None:
        """Lists a result's scores, if ``window_scores`` asks for them, and its transcripts; draws
        the worst of these, or the best and worst events, of the first seed in the last fold."""
        targets_of, config = self.ready.targets_of, self.config
        assert self.opened is not None
        name = f"{result.method}-{held.name}-{result.seed}.csv"
        if config.window_scores:
            keys = self.opened.source.readable(held.test)
            self.ready.write_scores(self.out / "scores" / self.name / name, logits, keys)
        last = held is self.ready.splits[-1] and result.seed == config.seed
        drawn = last and "@" not in result.method  # not each block of a curve
        plots = self.out / "plots" / self.name
        if isinstance(targets_of, FrameTargets) and drawn and config.diagnostics.maps:
            draw_events(
                logits,
                found,
                self.ready.scorer,
                labels=self.ready.labels,
                stream=self.stream(),
                source=self.opened.source,
                ids=held.test,
                picture=plots / f"{EVENTS}{result.method}.png",
            )
        if not isinstance(targets_of, TokenTargets):
            return
        record(
            logits,
            found,
            targets_of,
            stream=self.stream(),
            source=self.opened.source,
            ids=held.test,
            listed=self.out / "utterances" / self.name / name,
            picture=plots / f"{TRANSCRIPTS}{result.method}.png" if drawn else None,
            count=config.diagnostics.maps,
        )

    def _forget_unfinished(self) -> None:
        """Removes this encoder's lines of unfinished trainings from ``metrics.jsonl``, since they
        are trained again."""
        path = self.out / "metrics.jsonl"
        if path.is_file():
            filter_jsonl(
                path,
                lambda row: (
                    row["encoder"] != self.name
                    or self.file.done(row["method"], row["fold"], row["seed"])
                ),
            )

    def _keep(self, probe: Probe, fold_result: FoldResult) -> None:
        """Keeps the last fold's preferred probe with prototypes, to be drawn."""
        rank = MAPPED.index
        if fold_result.fold == self.ready.splits[-1].name and (
            self.mapped is None or rank(fold_result.probe) < rank(self.mapped[0])
        ):
            self.mapped = fold_result.probe, probe

    def _head_folder(self, method: str, fold: str, seed: int) -> Path:
        return self.out / "heads" / self.name / f"{method}-{fold}-{seed}"

    def _save(self, probe: Probe, fold_result: FoldResult) -> None:
        if fold_result.probe == CURVE:
            return  # one reader per block, each with its own values: the result is the curve
        save_head(
            self._head_folder(fold_result.probe, fold_result.fold, fold_result.seed),
            probe,
            name=fold_result.probe,
            head=self.head,
            meta={
                "bat_version": __version__,
                "task": self.ready.task.name,
                "labels": list(self.ready.labels),
                "target": self.ready.task.target,
                "held_out": fold_result.fold,
                "metrics": {k: v for k, v in fold_result.metrics.items() if k != "per_class"},
                "selected": fold_result.selected,
                "frames": self.ready.frames,
                "clip_seconds": self.config.data.clip_seconds,
                "encoder": {
                    "checkpoint": self.config.checkpoint,
                    "weights": self.config.weights,
                    "digest": self.made_from["encoder"],
                },
            },
        )

    def _description(self) -> dict[str, Any]:
        backbone = self.ready.backbone
        rule = "" if backbone.has_cls else "no class token: the mean patch stands in for it"
        if rule and self.head["cls"] is not None and "cgp" in self.methods:
            rule += f" (cgp: head.cls={self.head['cls']})"
        return {
            "checkpoint": self.config.checkpoint,
            "weights": self.config.weights,
            "digest": self.made_from["encoder"],
            "backbone": registered_name(backbone),
            "width": backbone.width,
            "depth": backbone.depth,
            "heads": backbone.heads,
            "has_cls": backbone.has_cls,
            "patch_hop_ms": round(1000 * backbone.hop_seconds, 6),
            "frames": "own" if self.ready.frames is None else self.ready.frames,
            "cls_rule": rule,
        }

    def _stored(self) -> dict[str, Any]:
        """Returns where the features were stored and which clips could not be read; for a resumed
        run with nothing left to do, as recorded before."""
        file = self.out / "diagnostics" / f"{self.name}-features.json"
        if self.opened is None:
            found = read_recorded(file, self.made_from)
            return found or {"features": None, "bad_clips": self.bad.state_dict()}
        features = {k: v for k, v in self.opened._asdict().items() if k != "source"}
        content = {"features": features, "bad_clips": self.bad.state_dict()}
        return recorded(file, self.made_from, content)

    def _curve(self, results: dict[str, Any]) -> dict[str, list[float]]:
        """Returns the main metric of the linear probe on each block, and its deviation."""
        metric = self.ready.task.metric
        blocks = [results[f"{CURVE}@{b}"] for b in range(1, self.ready.backbone.depth + 1)]
        return {
            metric: [entry["mean"][metric] for entry in blocks],
            "std": [entry["std"][metric] for entry in blocks],
        }

    def _statistics(self) -> dict[str, Any]:
        """Returns ``diagnostics.encoder_statistics`` on held-out clips, kept in
        ``diagnostics/ENCODER.json``."""
        if not self.config.diagnostics.encoder:
            return {}
        clips = self.config.diagnostics.clips
        file = self.out / "diagnostics" / f"{self.name}.json"
        made_from = {**self.made_from, "clips": clips}
        if (kept := read_recorded(file, made_from)) is not None:
            return kept
        held = np.unique(np.concatenate([r.test for r in self.ready.splits]))
        drawn = np.random.default_rng(self.config.seed).permutation(held)[:clips]
        waves = self.stream().loader(np.sort(drawn), batch=8, workers=0)
        found = encoder_statistics(self.ready.backbone, waves, frames=self.ready.frames)
        return recorded(file, made_from, found)

    def maps(self) -> tuple[str, list[dict[str, Any]]]:
        """Returns a probe's name and what its prototypes select in held-out clips of the last fold.

        In the form of ``report.probe_plots.plot_prototype_maps``; ("", []) if nothing can be
        drawn: no trained probe with prototypes, frame labels, or too many unreadable clips.
        """
        ready, held, count = self.ready, self.ready.splits[-1], self.config.diagnostics.maps
        trained = self._mapped_probe() if count and ready.targets_of is None else None
        if trained is None:
            return "", []
        name, probe = trained
        source = self.stream() if self.opened is None else self.opened.source
        batches = source.once(held.test, batch=self.config.data.batch)
        predicted = predictions({name: probe}, batches, autocast=self.autocast)
        readable = [i for i in held.test.tolist() if ready.index.key(i) not in self.bad.keys]
        if len(readable) != len(predicted.targets):
            log.warning("no prototype maps: too many clips cannot be read")
            return "", []
        pairs = best_clips(predicted.logits[name, ""], predicted.targets, count=count)
        ids = np.array([readable[row] for _, row in pairs], np.int64)
        return name, prototype_maps(
            probe,
            ready.backbone,
            self.stream().loader(ids, batch=8, workers=0),
            classes=[c for c, _ in pairs],
            labels=ready.index.vocabulary,
            frames=ready.frames,
            autocast=self.autocast,
        )

    def _mapped_probe(self) -> tuple[str, Probe] | None:
        """Returns the preferred probe with prototypes, trained now or, in a resumed run, before."""
        for name in (m for m in MAPPED if m in self.methods):
            if self.mapped is not None and self.mapped[0] == name:
                return self.mapped
            folder = self._head_folder(name, self.ready.splits[-1].name, self.config.seed)
            if folder.is_dir():
                return name, load_head(folder)[0].to(self.device)
        return None
