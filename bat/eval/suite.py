"""Trains and evaluates all probes and seeds on one encoder, computing its features once.

A run's folder holds, besides what every run has:

    results.jsonl               a result per line, as soon as it is available (``results.py``)
    metrics.jsonl               training losses
    heads/ENCODER/METHOD-ROUND-SEED/    trained heads
    insight/ENCODER.json        sinks, norms and ranks of every block (``diagnostics.py``)
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bat import __version__
from bat.config import schema
from bat.data.bad_clips import BadClips
from bat.data.module import eval_loader
from bat.errors import UserError
from bat.eval.candidates import Plan
from bat.eval.feature_cache import Opened, open_features
from bat.eval.features import progress_bar
from bat.eval.hardware import speed_up
from bat.eval.heads import save_head
from bat.eval.loading import autocast_for, device_for, registered_name, weights_digest
from bat.eval.notes import read_note, write_note
from bat.eval.prepare import Prepared
from bat.eval.results import Outcome, ResultsFile, summary
from bat.eval.search import cross_validate
from bat.io import filter_jsonl
from bat.probes.base import Probe, build_probe, find_probe
from bat.probes.cgp import check_cls
from bat.probes.curve import LinearCurve
from bat.types import Needs

log = logging.getLogger("bat")

MAPPED = ("cgp", "protobin", "proto", "protofloat")
"""Probes whose prototypes are drawn, in order of preference."""
WHERE = {"memory": "in memory", "disk": "on disk", "off": "made for each batch"}
CURVE = "curve"
"""Method that trains a linear probe on every block."""


class Evaluation:
    """Evaluates one encoder. ``name``: its name in results; ``methods``: probes, ``CURVE``."""

    def __init__(
        self, ready: Prepared[schema.Probe], out: Path, *, name: str, methods: Sequence[str]
    ) -> None:
        self.ready, self.out, self.name, self.methods = ready, out, name, list(methods)
        self.config, self.index, self.backbone = ready.config, ready.index, ready.backbone
        if "cgp" in self.methods:
            check_cls(self.head["cls"], has_cls=self.backbone.has_cls, level=self.config.level)
        self.device = device_for(self.config.hardware)
        self.autocast = autocast_for(self.config.hardware)
        self.digest = weights_digest(self.backbone)
        self.backbone.requires_grad_(False)
        self.bad = BadClips(max_bad=self.config.data.max_bad)
        self.seconds: dict[str, float] = {}
        self.opened: Opened | None = None
        self.made_from = {"encoder": self.digest, "data": self.index.hash}
        """Inputs that results depend on besides the settings."""
        if ready.targets_of is not None:  # an edited onset changes no shard
            what = "events" if ready.task.target == "events" else "texts"
            self.made_from[what] = ready.targets_of.digest
        self.mapped: tuple[str, Probe] | None = None
        """Probe whose prototypes are drawn: of the first seed in the last fold so far."""

    @property
    def head(self) -> dict[str, Any]:
        """Settings of the probes; an unset ``cls`` is taken from the protocol."""
        head = asdict(self.config.head)
        if not self.backbone.has_cls and self.config.level == "clip" and head["cls"] is None:
            head["cls"] = "mean" if self.config.protocol.name == "bat" else "patches"
        return head

    def build(self, method: str) -> Probe:
        """Builds an untrained probe of this encoder's shape."""
        backbone, head = self.backbone, self.head
        shape: dict[str, Any] = {
            "classes": len(self.ready.labels),
            "width": backbone.width,
            "depth": backbone.depth,
            "has_cls": backbone.has_cls,
            "level": self.config.level,
        }
        if method == CURVE:
            return LinearCurve(**shape, norm=head["norm"], dropout=head["dropout"])
        return build_probe(method, **shape, encoder=backbone, **head)

    def needs(self) -> Needs:
        """Returns the features that the methods need together."""
        wanted = Needs("none")
        for method in self.methods:
            cls = LinearCurve if method == CURVE else find_probe(method)
            wanted |= cls.needs(has_cls=self.backbone.has_cls, level=self.config.level)
        return wanted

    def results(self) -> ResultsFile:
        """Opens the existing results; raises ``UserError`` if of another encoder or other data."""
        file = self.out / "results.jsonl"
        return ResultsFile(file, encoder=self.name, made_from=self.made_from)

    def wanted(self) -> set[tuple[str, str, int]]:
        """Returns method, fold and seed of every requested training."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        return {(m, r.name, s) for m in self.methods for r in self.ready.rounds for s in seeds}

    def steps_left(self) -> int:
        """Returns the optimiser steps of all candidates that are still to be trained."""
        return self._plan(self.results()).steps_left(self.ready.rounds, self.methods)

    def to_device(self) -> None:
        """Moves the encoder to its device, and compiles it if requested."""
        self.backbone.to(self.device)
        speed_up(self.backbone, self.config.hardware)

    def check(self) -> None:
        """Raise ``UserError`` if results are of something else or a probe cannot be built."""
        self.results()
        with torch.random.fork_rng(devices=[]):
            for method in self.methods:
                self.build(method)

    def run(self, *, before: int = 0, total: int | None = None) -> dict[str, Any]:
        """Trains and evaluates; returns this encoder's part of ``summary.json``.

        The progress bar counts ``total`` steps, of which ``before`` are done: those of all encoders
        of a command; if omitted, this one's.
        """
        self.to_device()
        file, wanted = self.results(), self.wanted()
        plan = self._plan(file)
        left = sum(not file.done(*job) for job in wanted)
        if left < len(wanted):
            log.info("%s: %d of %d results are there from before",
                     self.name, len(wanted) - left, len(wanted))  # fmt: skip
        self._forget_unfinished(file)
        if left:
            self._open()
            began = time.perf_counter()
            rounds = self.ready.rounds
            total = total or plan.steps_left(rounds, self.methods)
            show = self.config.log.progress
            with progress_bar(total, "probes", unit="step", show=show) as plan.bar:
                plan.bar.initial = plan.bar.n = before
                plan.bar.smoothing = 0  # time left by the mean speed: folds are alike
                found = cross_validate(self.source(), rounds, self.methods, plan)
            if plan.diverged and not found and not file.outcomes:
                raise UserError(f"{self.name}: {plan.diverged_line()}")
            self.seconds["probes"] = round(time.perf_counter() - began, 1)
        own = [o for o in file.outcomes if (o.probe, o.fold, o.seed) in wanted]
        broken = {method for method, _, _ in plan.diverged}
        if broken:
            log.warning("%s: %s", self.name, plan.diverged_line())
        own = [o for o in own if o.probe not in broken]
        results = summary(own, metric=self.ready.task.metric, confidence=self.config.confidence)
        entry = self._entry({m: e for m, e in results.items() if "@" not in m})
        entry["insight"] = {}
        entry["diverged"] = plan.diverged_line() if broken else ""
        if CURVE in self.methods and CURVE not in broken:
            entry["insight"]["curve"] = self._curve(results)
        entry["seconds"] = self.seconds
        self.bad.check(final=True)
        entry |= self._opened_with()
        if self.bad.keys:
            first = ": ".join(next(iter(self.bad.keys.items())))
            log.warning("%s: %d unreadable, the first %s", self.name, len(self.bad.keys), first)
        return entry

    def _open(self) -> None:
        began = time.perf_counter()
        ready, config = self.ready, self.config
        parts = [(r.train, r.test, r.test if r.valid is None else r.valid) for r in ready.rounds]
        ids = np.unique(np.concatenate([ids for part in parts for ids in part]))
        self.opened = open_features(
            self.backbone,
            self.index,
            ids=ids,
            frames=ready.frames,
            needs=self.needs(),
            batch=config.data.batch,
            store=config.features,
            data=config.data,
            random_offset=config.pad_offset == "random",
            autocast=self.autocast,
            device=self.device,
            bad_clips=self.bad,
            progress=config.log.progress,
            digest=self.digest,
            targets_of=ready.targets_of,
        )
        self.seconds["features"] = round(time.perf_counter() - began, 1)
        log.info(
            "%s: features %s (%.3f GB; %s)",
            self.name,
            {"memory": "in memory", "disk": "on disk"}.get(
                self.opened.cache, "made for each batch"
            ),
            self.opened.gb,
            self.opened.why,
        )

    def source(self) -> Any:
        if self.opened is None:
            self._open()
        assert self.opened is not None
        return self.opened.source

    def _plan(self, file: ResultsFile) -> Plan:
        config, task = self.config, self.ready.task
        metrics = self.out / "metrics.jsonl"

        def on_log(row: dict[str, Any]) -> None:
            row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None  # NaN is no JSON
            with metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"encoder": self.name, **row}) + "\n")

        def on_probe(probe: Probe, own: list[Outcome]) -> None:
            first = own[0]
            seldom = first.seed == plan.seed
            if config.heads_of == "all" or (config.heads_of == "first" and seldom):
                self._save(probe, first)
            if seldom and config.insight.maps and first.probe in MAPPED:
                self._keep(probe, first)
            file.add(own)

        plan = Plan(
            build=self.build,
            loss=self.ready.loss,
            optim=config.optim,
            steps=config.train.steps,
            epochs=config.train.epochs,
            min_steps=config.train.min_steps,
            batch=config.data.batch,
            multi_label=task.multi_label,
            metric=task.metric,
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
            before=file.outcomes,
            done=file.done,
        )
        return plan

    def _forget_unfinished(self, file: ResultsFile) -> None:
        """Removes this encoder's lines of unfinished trainings from ``metrics.jsonl``, since they
        are trained again."""
        path = self.out / "metrics.jsonl"
        if path.is_file():
            filter_jsonl(
                path,
                lambda row: (
                    row["encoder"] != self.name
                    or file.done(row["method"], row["fold"], row["seed"])
                ),
            )

    def _keep(self, probe: Probe, outcome: Outcome) -> None:
        """Keeps the last fold's preferred probe with prototypes, to be drawn."""
        held, rank = self.ready.rounds[-1].name, MAPPED.index
        if outcome.fold == held and (
            self.mapped is None or rank(outcome.probe) < rank(self.mapped[0])
        ):
            self.mapped = outcome.probe, probe

    def _save(self, probe: Probe, outcome: Outcome) -> None:
        if outcome.probe == CURVE:
            return  # one reader per block, each with its own values: the result is the curve
        config = self.config
        save_head(
            self.head_folder(outcome.probe, outcome.fold, outcome.seed),
            probe,
            name=outcome.probe,
            head=self.head,
            meta={
                "bat_version": __version__,
                "task": self.ready.task.name,
                "labels": list(self.ready.labels),
                "target": self.ready.task.target,
                "held_out": outcome.fold,
                "metrics": {k: v for k, v in outcome.metrics.items() if k != "per_class"},
                "chosen": outcome.chosen,
                "encoder": {
                    "checkpoint": config.checkpoint,
                    "weights": config.weights,
                    "digest": self.digest,
                },
            },
        )

    def head_folder(self, method: str, fold: str, seed: int) -> Path:
        return self.out / "heads" / self.name / f"{method}-{fold}-{seed}"

    def _entry(self, results: dict[str, Any]) -> dict[str, Any]:
        backbone = self.backbone
        rule = "" if backbone.has_cls else "no class token: the mean patch stands in for it"
        if rule and self.head["cls"] is not None and "cgp" in self.methods:
            rule += f" (cgp: head.cls={self.head['cls']})"
        return {
            "checkpoint": self.config.checkpoint,
            "weights": self.config.weights,
            "digest": self.digest,
            "backbone": registered_name(backbone),
            "width": backbone.width,
            "depth": backbone.depth,
            "heads": backbone.heads,
            "has_cls": backbone.has_cls,
            "patch_hop_ms": round(1000 * backbone.hop_seconds, 6),
            "frames": "own" if self.ready.frames is None else self.ready.frames,
            "cls_rule": rule,
            "results": results,
        }

    def _opened_with(self) -> dict[str, Any]:
        """Returns where the features were stored and which clips could not be read; for a resumed
        run with nothing left to do, as recorded before."""
        file = self.out / "insight" / f"{self.name}-features.json"
        found: dict[str, Any] = {"features": None, "bad_clips": self.bad.state_dict()}
        if self.opened is None:
            return read_note(file, self.made_from) or found
        found["features"] = {k: v for k, v in self.opened._asdict().items() if k != "source"}
        write_note(file, self.made_from, found)
        return found

    def _curve(self, results: dict[str, Any]) -> dict[str, list[float]]:
        """Returns the main metric of the linear probe on each block, and its deviation."""
        metric = self.ready.task.metric
        blocks = [results[f"{CURVE}@{b}"] for b in range(1, self.backbone.depth + 1)]
        return {
            metric: [entry["mean"][metric] for entry in blocks],
            "std": [entry["std"][metric] for entry in blocks],
        }

    def waves(self, ids: np.ndarray, *, batch: int = 8) -> Any:
        data = self.config.data
        return eval_loader(
            self.index,
            ids,
            batch=batch,
            sample_rate=self.backbone.sample_rate,
            clip_seconds=data.clip_seconds,
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
        )
