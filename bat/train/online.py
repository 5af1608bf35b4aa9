"""Trains and evaluates online probes during a pre-training run.

Every ``online.every`` steps, and at step 0 before any training, short probes are trained from
scratch on a labelled set's features from the frozen encoder (the last of the objective's encoders:
the EMA teacher, if there is one) and evaluated on held-out folds. Step 0 is the random-init
baseline. Probes are needed because a falling loss does not show that the encoder learns (the
position code is the easy part of the target). Uses the code of ``bat-probe`` with a small budget
and leaves the run's random state unchanged.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from bat.config.schema import Pretrain
from bat.config.sections import Optim
from bat.data.bad_clips import BadClips
from bat.data.index import Index
from bat.data.sources import TRAIN
from bat.data.windows import is_long
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank, FeatureStream
from bat.eval.loading import autocast_for
from bat.eval.results import SHOWN, FoldResult, summary
from bat.eval.run_folder import open_data
from bat.eval.search import cross_validate
from bat.eval.splits import Split, check_splits, make_splits
from bat.io import read_jsonl
from bat.nn.losses import loss_for
from bat.probes.base import Probe, build_probe, expand, find_probe
from bat.report.plots import chance_of, plot_layer_gates, plot_probe_curve, plot_series
from bat.report.runs import curve, monitor_panels
from bat.report.sections import TITLES
from bat.seeding import derive_seed
from bat.tasks.base import Task
from bat.tasks.folder import TASK as FOLDER
from bat.tasks.labels import classes_in_words, doubts
from bat.train.callbacks import Metrics, StepCallback
from bat.train.monitors import Monitors
from bat.train.processes import ranks_of
from bat.train.sharding import is_sharded, whole_encoder
from bat.train.stopping import Stopping
from bat.train.trainer import JsonLines
from bat.types import Needs

log = logging.getLogger("bat")

HELD_OUT = 0.2
"""Fraction held out from a set that has neither folds nor splits."""


class _CutOff(Exception):  # noqa: N818
    """Raised if the run was asked to end; the online probes are repeated after resuming."""


class OnlineProbe(StepCallback):
    """Trains and evaluates short probes on the encoder; ``rows`` is the curve so far."""

    start = "random init"
    """Name of step 0."""

    def __init__(
        self,
        config: Pretrain,
        *,
        task: Task,
        index: Index | None,
        out: Path,
        metrics: Metrics,
        stopping: Stopping | None = None,
    ) -> None:
        """``task`` and ``index``: of the training set, used if ``online`` names no other."""
        super().__init__()
        self.config, self.out, self.metrics = config, out, metrics
        self.stopping = stopping
        online = config.online
        split = config.data.split
        if online.root or online.shards or online.csv:
            split = "auto"
            source = replace(config.data, root=online.root, shards=online.shards, csv=online.csv)
            source = replace(source, mix=[], labels="same", windows=False)
            task, index = open_data(online.task or config.task, source)
        assert index is not None  # ``open_stream`` requires another set if there is no index
        self.task = task.asking("tags") if task.target == "events" else task
        self.index = index
        if config.init:
            self.start = "start"
        self.methods = list(online.methods)
        self.splits: list[Split] = []
        if index.classes < 2 or not (index.labels_per_clip > 0).any():
            self._without_labels()
            clips = np.random.default_rng(derive_seed(config.seed, "online clips"))
            self.ids = np.sort(clips.permutation(len(index))[: online.max_clips])
        else:
            self.splits = choose_splits(
                index,
                folds=online.folds,
                max_clips=online.max_clips,
                seed=config.seed,
                split=_training_split(index, split),
            )
            self.ids = np.unique(np.concatenate([[*r.train, *r.test] for r in self.splits]))
            classes = classes_in_words(index.vocabulary)
            log.info("online probe: %d clips, %s", len(self.ids), classes)
        self.monitors = Monitors(config, task=self.task, splits=self.splits, ids=self.ids)
        if index.starts is None and (long := int(is_long(index, config.data.clip_seconds).sum())):
            log.info(
                "online probe: %d clips are longer than %g s: their start is read",
                long,
                config.data.clip_seconds,
            )
        if self.splits:
            odd = check_splits(self.splits, index, multi_label=True) + doubts(index.vocabulary)
            for line in odd:
                log.warning("online probe: %s", line)
        logged = read_jsonl(out / "metrics.jsonl")  # of a resumed or finished run
        self.rows: list[dict[str, Any]] = [  # an undefined metric is null there
            {k: math.nan if v is None else v for k, v in row.items()} for row in curve(logged)
        ]
        self.evaluated = {r["step"] for r in logged if any(k.startswith("online/") for k in r)}
        self.gates: dict[str, np.ndarray] = {}

    def _without_labels(self) -> None:
        """Says that kNN is left out. Raises ``UserError`` if nothing is left, or probes are."""
        online = self.config.online
        remedy = (
            "give online.csv= (columns path, label), online.root= or online.shards=, or set "
            "online.every=0"
        )
        if self.methods or set(online.monitors) <= {"knn"}:
            raise UserError(
                f"online probes need labelled clips, this data has none: {remedy}, or "
                "online.methods=[] for the monitors that need none"
                + " (data.labels=folders takes the names of the folders for classes)"
                * (self.config.task == FOLDER.name)
            )
        if "knn" in online.monitors:
            log.info("online monitors: this data has no labels, knn is left out")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        done = trainer.global_step
        self.rows = [r for r in self.rows if done and r["step"] <= done]
        if not done or (self._due(trainer, done) and done not in self.evaluated):
            self._probe(trainer, pl_module, done)  # the baseline, or one interrupted before

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if self._due(trainer, step):
            self._probe(trainer, module, step)

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        return step % self.config.online.every == 0 or step == trainer.max_steps

    def _probe(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        last = step == trainer.max_steps

        def on_step() -> None:
            """Stops the probes if the run was asked to end, unless they could not be repeated."""
            if not last and self.stopping is not None and self.stopping.wanted:
                raise _CutOff

        began = time.perf_counter()
        objective = module.objective
        *_, last_name = encoders = objective.encoders()
        scalars: dict[str, float] = {}
        if "position" in self.monitors.asked and (trainer.is_global_zero or is_sharded(objective)):
            stream = self._stream(encoders[last_name], Needs("none"))
            gather = ranks_of(trainer).gather if is_sharded(objective) else None
            scalars = module.within(lambda: self.monitors.of_objective(objective, stream, gather))
        scalars["online/seconds"] = time.perf_counter() - began
        whole = {  # the same on all ranks
            name: whole_encoder(encoder)
            for name, encoder in encoders.items()
            if name in self.config.online.encoders or (self.methods and name == last_name)
        }
        if trainer.is_global_zero:
            try:
                results = self.evaluate(whole, last_name, module.device, scalars, on_step)
                self._record(trainer, results, scalars, step)
                self.monitors.tell_missing([*results, *scalars])
            except _CutOff:
                self.metrics.say(f"step {step}: the online probes are cut off, to be repeated")
        trainer.strategy.barrier("online probe")
        self.metrics.pause()

    def _record(
        self,
        trainer: pl.Trainer,
        results: dict[str, dict[str, Any]],
        scalars: dict[str, float],
        step: int,
    ) -> None:
        """Writes the results to the metrics, the plots and the log."""
        row: dict[str, Any] = dict(scalars)
        for method, entry in results.items():
            scores: dict[str, Any] = {}
            for name, mean in entry["mean"].items():
                scores[name] = mean
                if entry["std_over"] != "none":
                    scores[f"{name}_std"] = entry["std"][name]
            row |= {f"online/{method}/{key}": value for key, value in scores.items()}
            self.rows.append({"step": step, "method": method, **scores})
            if entry["gate"]:
                self.gates[method] = np.array(list(entry["gate"].values()))  # (folds, L)
        gates = {f"online/{m}/gate": g.mean(0).tolist() for m, g in self.gates.items()}
        for logger in trainer.loggers:  # lists are for our file alone
            logger.log_metrics(row | gates if isinstance(logger, JsonLines) else row, step=step)
        self.draw()
        said = []
        if results:
            name = self.task.metric
            shown = ", ".join(f"{m} {100 * e['mean'][name]:.1f} %" for m, e in results.items())
            said.append(f"held-out {TITLES[name]} {shown}")
        said += [
            f"{key.removeprefix('online/')} {value:.3g}"
            for key, value in scalars.items()
            if key != "online/seconds"
        ]
        self.metrics.say(f"step {step}: {', '.join(said)}")

    def evaluate(
        self,
        encoders: Mapping[str, Encoder | None],
        probed: str,
        device: torch.device,
        scalars: dict[str, float],
        on_step: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, Any]]:
        """Trains and evaluates once; returns ``{method: {"mean", "std", "folds", "gate"}}``.

        ``probed``: name of the encoder that the probes are trained on. The monitors' values and
        seconds are added to ``scalars``.
        """
        online = self.config.online
        results: list[FoldResult] = []
        probes: list[FoldResult] = []  # the last rows of the curve
        for name, encoder in encoders.items():
            assert encoder is not None
            methods = self.methods if name == probed else []
            methods = expand(methods, level="clip", encoder=encoder.has_queries)
            monitored = name in online.encoders
            needs = Needs("last" if monitored and self.monitors.reads_features else "none")
            for method in methods:
                needs |= find_probe(method).needs(has_cls=encoder.has_cls, level="clip")
            stream = self._stream(encoder, needs)
            source: FeatureStream | FeatureBank = stream
            if methods:
                source = FeatureBank.extract(stream, self.ids, batch=online.batch, device=device)
                if stream.bad_clips.bad:
                    log.warning("online probe: %s", stream.bad_clips.summary())
                probes += self._trained(source, encoder, methods, device, on_step)
            began = time.perf_counter()
            if monitored:
                found, values = self.monitors.of_encoder(name, encoder, source, stream, on_step)
                results += found
                scalars |= values
            scalars["online/seconds"] += time.perf_counter() - began
        return summary([*results, *probes])

    def _stream(self, encoder: Encoder, needs: Needs) -> FeatureStream:
        data = self.config.data
        return FeatureStream(
            encoder,
            self.index,
            frames=self.config.frontend.frames,
            clip_seconds=data.clip_seconds,
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
            autocast=autocast_for(self.config.hardware),
            needs=needs,
            bad_clips=BadClips(max_bad=data.max_bad),
        )

    def _trained(
        self,
        bank: FeatureBank,
        encoder: Encoder,
        methods: Sequence[str],
        device: torch.device,
        on_step: Callable[[], None],
    ) -> list[FoldResult]:
        """Trains the probes on the features of ``bank`` and returns their results."""
        online = self.config.online
        plan = Plan(
            build=partial(self.build, encoder=encoder),
            loss=loss_for(self.task),
            optim=Optim(
                lr=online.lr,
                betas=[0.9, 0.999],
                weight_decay=online.weight_decay,
                decay="matrices",
                warmup_steps=min(online.steps // 10, 50),
            ),
            steps=online.steps,
            batch=online.batch,
            multi_label=self.task.multi_label,
            metric=self.task.metric,
            seed=derive_seed(self.config.seed, "online"),
            autocast=autocast_for(self.config.hardware),
            device=device,
            on_step=on_step,
        )
        fold_results = cross_validate(bank, self.splits, methods, plan)
        if plan.diverged:
            log.warning("online probe: %s", plan.diverged_line().replace("optim.lr", "online.lr"))
        broken = {method for method, _, _ in plan.diverged}
        return [o for o in fold_results if o.method not in broken]

    def build(self, method: str, *, encoder: Encoder) -> Probe:
        """Returns a fresh probe for the encoder."""
        head = self.config.online.head.for_task(self.task.per_class)
        return build_probe(
            method,
            classes=self.index.classes,
            width=encoder.width,
            depth=encoder.depth,
            has_cls=encoder.has_cls,
            encoder=encoder,
            **asdict(head),
        )

    def draw(self) -> None:
        """Writes ``plots/``: ``probe_curve.png``, ``monitors.png`` and ``layer_gate.png``."""
        plots = self.out / "plots"
        if self.rows:
            chance = chance_of(self.task.metric, self.index.classes)
            file, metric = plots / "probe_curve.png", self.task.metric
            plot_probe_curve(self.rows, file, metric=metric, chance=chance)
        if panels := monitor_panels(read_jsonl(self.out / "metrics.jsonl")):
            plot_series(panels, plots / "monitors.png", baseline=True)
        if self.gates:
            plot_layer_gates(self.gates, plots / "layer_gate.png")

    @property
    def probe_rows(self) -> list[dict[str, Any]]:
        """The curve without kNN."""
        return [row for row in self.rows if "/" not in row["method"]]

    def cost(self, seconds: float) -> str:
        """Returns the monitors' time as text, and their share of the ``seconds`` of the run; empty
        if there were none."""
        spent = sum(r.get("online/seconds") or 0.0 for r in read_jsonl(self.out / "metrics.jsonl"))
        if not self.config.online.monitors or not spent:
            return ""
        return f"the monitors took {spent:.1f} s, {spent / seconds:.1%} of the run"

    def report(self) -> str:
        """Returns the curve and the monitors as text, their values beside those at step 0."""
        logged = read_jsonl(self.out / "metrics.jsonl")
        lines = [self.table()] if self.rows else []
        panels = monitor_panels(logged)
        metric = self.task.metric
        for row in self.rows:
            own = panels.setdefault(f"held-out {TITLES[metric]}, %", {})
            own.setdefault(row["method"], []).append((row["step"], 100 * row[metric]))
        for title, curves in panels.items():
            said = []
            for name, points in curves.items():
                (first, before), (_, now) = points[0], points[-1]
                told = f" ({self.start} {before:.3g})" if first == 0 else ""
                said.append(f"{name} {now:.3g}{told}")
            lines.append(f"{title}: {', '.join(said)}")
        return "\n".join(lines)

    def table(self) -> str:
        """Returns the curve as text: a line per evaluation, mean and deviation over folds."""
        methods = list(dict.fromkeys(r["method"] for r in self.rows))
        cells = {(r["step"], r["method"]): r for r in self.rows}
        names = [n for n in SHOWN if any(n in r for r in self.rows)]
        titles = " / ".join(TITLES[n] for n in names)
        lines = [f"held-out {titles}, % | " + " | ".join(methods)]
        for step in sorted({r["step"] for r in self.rows}):
            rows = [cells.get((step, method), {}) for method in methods]
            shown = [" / ".join(_percent(r, n) for n in names) if r else "-" for r in rows]
            name = f"{self.start} (step 0)" if step == 0 else f"step {step}"
            lines.append(f"  {name} | " + " | ".join(shown))
        return "\n".join(lines)


def _percent(row: dict[str, Any], name: str) -> str:
    std = row.get(f"{name}_std")
    return f"{100 * row[name]:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _training_split(index: Index, split: str) -> str:
    """Returns the split to train probes on if pre-training uses ``split`` of the same clips."""
    if "train" in index.splits or (split in ("auto", "all") and TRAIN[1] not in index.splits):
        return "auto"
    return TRAIN[1] if split in ("auto", "all") else split


def choose_splits(
    index: Index, *, folds: int, max_clips: int, seed: int, split: str = "auto"
) -> list[Split]:
    """Returns the first ``folds`` folds of ``index``, with at most ``max_clips`` clips in total.

    If a set has neither folds nor splits, a fifth of its labelled clips is held out (``hold_out``).
    """
    clips = np.random.default_rng(derive_seed(seed, "online clips")).permutation(len(index))
    clips = clips[index.labels_per_clip[clips] > 0][:max_clips]
    if index.folds or index.splits:
        splits = make_splits(index, split=split)[:folds]
    else:
        held = hold_out(index, clips)
        splits = [Split("test", clips[~held], clips[held])]
    chosen = [
        Split(r.name, np.intersect1d(r.train, clips), np.intersect1d(r.test, clips)) for r in splits
    ]
    empty = [r.name for r in chosen if not len(r.train) or not len(r.test)]
    if empty:
        raise UserError(
            f"online probes: nothing to train on or to hold out in fold {empty[0]}; raise "
            f"online.max_clips={max_clips} or give a larger labelled set"
        )
    return chosen


def hold_out(index: Index, clips: np.ndarray) -> np.ndarray:
    """Returns (n,) bool, True for the clips to hold out of ``clips`` (n,), given in random order.

    It is the first fifth of them, windows of one recording together; of a small set where that
    lacks a class on either side, the first fifth of each class (by a clip's first label).
    """
    unit = clips if index.starts is None else index.shard[clips]
    first_label = index.label_ids[index.label_ptr[clips]]

    def first_fifth(rows: np.ndarray) -> np.ndarray:
        names, first = np.unique(unit[rows], return_index=True)
        names = names[np.argsort(first)]
        return names[: max(1, round(HELD_OUT * len(names)))]

    held = np.isin(unit, first_fifth(np.arange(len(clips))))
    classes = np.unique(first_label)
    if all(len(np.unique(first_label[side])) == len(classes) for side in (held, ~held)):
        return held
    rows_of = [np.flatnonzero(first_label == c) for c in classes]
    several = [first_fifth(rows) for rows in rows_of if len(np.unique(unit[rows])) > 1]
    return np.isin(unit, np.concatenate(several)) if several else held
