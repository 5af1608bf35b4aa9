"""Draws the plots of a probe run: those of each encoder, and comparisons of all.

A run may be started again with other methods or encoders: its plots are removed first, so that none
are mistaken for results of this run. Files of other names are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bat.eval.encoder_list import RANDOM
from bat.eval.evaluation import Evaluation
from bat.eval.event_pictures import EVENTS
from bat.eval.transcripts import TRANSCRIPTS
from bat.metrics.base import describe
from bat.report.page import COMPARISONS
from bat.report.plots import COLOURS, chance_of, plot_folds, plot_layer_gates
from bat.report.probe_plots import (
    plot_comparison,
    plot_layer_curve,
    plot_norms_ranks,
    plot_prototype_maps,
    plot_sinks,
)
from bat.report.sections import TITLES

MAPS = "prototype-maps-"
OF_ENCODER = ("layer-gates", "folds", f"{MAPS}*", f"{TRANSCRIPTS}*", f"{EVENTS}*")


def draw_encoder(folder: Path, evaluation: Evaluation, entry: dict[str, Any]) -> None:
    """Draws gates, folds and prototype maps of one encoder; ``entry``: its part of the summary.

    Results by fold are drawn for as many methods as there are colours; the comparison has the rest.
    """
    results, metric = entry["results"], evaluation.ready.task.metric
    name, maps = evaluation.maps()
    # drawn with the results
    valid = [f"{kind}{method}" for method in results for kind in (TRANSCRIPTS, EVENTS)]
    # of heads that were not kept
    if evaluation.config.diagnostics.maps and not maps:
        valid += [f"{MAPS}{method}" for method in results]
    _remove(folder, OF_ENCODER, but=valid)
    if maps:
        plot_prototype_maps(maps, folder / f"{MAPS}{name}.png")
    if gates := {m: list(e["gate"].values()) for m, e in results.items() if e["gate"]}:
        over = "trainings" if evaluation.config.seeds > 1 else "folds"
        plot_layer_gates(gates, folder / "layer-gates.png", over=over)
    if len(evaluation.ready.splits) > 1 and len(results) <= len(COLOURS):
        folds = {
            method: {
                fold: float(np.mean([row[metric] for row in rows.values()]))
                for fold, rows in e["folds"].items()
            }
            for method, e in results.items()
        }
        chance = chance_of(metric, len(evaluation.ready.labels))
        plot_folds(folds, folder / "folds.png", metric=TITLES[metric], chance=chance)


def draw_comparison(folder: Path, summary: dict[str, Any]) -> None:
    """Draws comparisons of all encoders: results, gates, curves, sinks, norms and ranks.

    Plots of encoders that are not in ``summary`` are removed.
    """
    encoders, metric = summary["encoders"], summary["metric"]
    _remove(folder, COMPARISONS)
    for other in folder.iterdir() if folder.is_dir() else ():
        if other.is_dir() and not other.is_symlink() and other.name not in encoders:
            _remove(other, OF_ENCODER)
            if not any(other.iterdir()):
                other.rmdir()
    baselines = [n for n, e in encoders.items() if str(e["checkpoint"]).startswith(RANDOM)]
    shown = {
        name: {
            method: {"mean": e["mean"][metric], "std": e["std"][metric], "interval": e["interval"]}
            for method, e in entry["results"].items()
        }
        for name, entry in encoders.items()
    }
    first = next(iter(next(iter(encoders.values()))["results"].values()))
    words: dict[str, Any] = {
        "metric": TITLES[metric],
        "chance": chance_of(metric, len(summary["labels"])),
        "baselines": baselines,
        "lower": describe(metric).better == "lower",
    }
    plot_comparison(
        shown,
        folder / "comparison.png",
        std_over=first["std_over"],
        confidence=summary["confidence"],
        finetuned={n: e["finetuned"] for n, e in encoders.items() if e["finetuned"] is not None},
        **words,
    )
    gates = {
        (method if len(encoders) == 1 else f"{name}, {method}"): list(e["gate"].values())
        for name, entry in encoders.items()
        for method, e in entry["results"].items()
        if e["gate"]
    }
    if gates:
        over = "trainings" if first["std_over"] == "seeds" else "folds"
        plot_layer_gates(gates, folder / "gates.png", over=over)
    found = {name: entry["diagnostics"] for name, entry in encoders.items()}
    curves = {
        name: {"mean": diagnostics["curve"][metric], "std": diagnostics["curve"]["std"]}
        for name, diagnostics in found.items()
        if "curve" in diagnostics
    }
    if curves:
        plot_layer_curve(curves, folder / "layer-curve.png", **words)
    if sinks := {
        n: diagnostics["sinks"] for n, diagnostics in found.items() if diagnostics.get("sinks")
    }:
        plot_sinks(sinks, folder / "attention-sinks.png", baselines=baselines)
    if norms := {n: diagnostics for n, diagnostics in found.items() if diagnostics.get("norms")}:
        plot_norms_ranks(norms, folder / "norms-ranks.png", baselines=baselines)


def _remove(folder: Path, stems: Sequence[str], *, but: Sequence[str] = ()) -> None:
    """Removes plots of these names from ``folder``."""
    for path in (path for stem in stems for path in folder.glob(f"{stem}.png")):
        if path.stem not in but:
            path.unlink()
