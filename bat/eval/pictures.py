"""Draws the plots of a probe run: those of each encoder, and comparisons of all.

A run may be started again with other methods or encoders: plots that are not drawn this time are
removed, so that none are mistaken for results of this run. Files of other names are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bat.eval.encoder_list import RANDOM
from bat.eval.evaluation import Evaluation
from bat.metrics.base import describe
from bat.report import insight_plots, probe_plots
from bat.report.page import COMPARISONS
from bat.report.plots import COLOURS, chance_of, plot_folds, plot_layer_gates
from bat.report.sections import TITLES

MAPS = "prototype-maps-"
OF_ENCODER = ("layer-gates", "folds", f"{MAPS}*")


def draw_encoder(folder: Path, evaluation: Evaluation, entry: dict[str, Any]) -> None:
    """Draws gates, folds and prototype maps of one encoder; ``entry``: its part of the summary.

    Results by fold are drawn for as many methods as there are colours; the comparison has the rest.
    """
    results, metric = entry["results"], evaluation.ready.task.metric
    gates = {m: list(e["gate"].values()) for m, e in results.items() if e["gate"]}
    drawn = []
    if gates:
        over = "trainings" if evaluation.config.seeds > 1 else "folds"
        drawn.append(plot_layer_gates(gates, folder / "layer-gates.png", over=over))
    if len(evaluation.ready.rounds) > 1 and len(results) <= len(COLOURS):
        folds = {
            method: {
                fold: float(np.mean([row[metric] for row in rows.values()]))
                for fold, rows in e["folds"].items()
            }
            for method, e in results.items()
        }
        chance = chance_of(metric, len(evaluation.ready.labels))
        path = folder / "folds.png"
        drawn.append(plot_folds(folds, path, metric=TITLES[metric], chance=chance))
    name, maps = evaluation.maps()
    if maps:
        path = folder / f"{MAPS}{name}.png"
        drawn.append(insight_plots.plot_prototype_maps(maps, path))
    elif (
        evaluation.config.insight.maps
    ):  # its head was not kept, but the existing plot is still valid
        drawn += [folder / f"{MAPS}{method}.png" for method in results]
    _remove_others(folder, OF_ENCODER, drawn)


def draw_comparison(folder: Path, summary: dict[str, Any]) -> None:
    """Draws comparisons of all encoders: results, gates, curves, sinks, norms and ranks.

    Plots of encoders that are not in ``summary`` are removed.
    """
    encoders, metric = summary["encoders"], summary["metric"]
    controls = [n for n, e in encoders.items() if str(e["checkpoint"]).startswith(RANDOM)]
    chance = chance_of(metric, len(summary["labels"]))
    lower = describe(metric).better == "lower"
    shown = {
        name: {
            method: {"mean": e["mean"][metric], "std": e["std"][metric], "interval": e["interval"]}
            for method, e in entry["results"].items()
        }
        for name, entry in encoders.items()
    }
    first = next(iter(next(iter(encoders.values()))["results"].values()))
    drawn = [folder / "comparison.png"]
    probe_plots.plot_comparison(
        shown,
        drawn[0],
        metric=TITLES[metric],
        std_over=first["std_over"],
        confidence=summary["confidence"],
        chance=chance,
        controls=controls,
        lower=lower,
        finetuned={n: e["finetuned"] for n, e in encoders.items() if e["finetuned"] is not None},
    )
    gates = {
        (method if len(encoders) == 1 else f"{name}, {method}"): list(e["gate"].values())
        for name, entry in encoders.items()
        for method, e in entry["results"].items()
        if e["gate"]
    }
    if gates:
        drawn.append(probe_plots.plot_gates_heat(gates, folder / "gates.png"))
    inside = {name: entry["insight"] for name, entry in encoders.items()}
    curves = {n: {"mean": i["curve"][metric], "std": i["curve"]["std"]}
              for n, i in inside.items() if "curve" in i}  # fmt: skip
    if curves:
        path = folder / "layer-curve.png"
        drawn.append(probe_plots.plot_layer_curve(
            curves, path, metric=TITLES[metric], chance=chance, controls=controls, lower=lower
        ))  # fmt: skip
    if sinks := {n: i["sinks"] for n, i in inside.items() if i.get("sinks")}:
        path = folder / "attention-sinks.png"
        drawn.append(insight_plots.plot_sinks(sinks, path, controls=controls))
    if norms := {n: i for n, i in inside.items() if i.get("norms")}:
        path = folder / "norms-ranks.png"
        drawn.append(insight_plots.plot_norms_ranks(norms, path, controls=controls))
    _remove_others(folder, COMPARISONS, drawn)
    for other in folder.iterdir():
        if other.is_dir() and not other.is_symlink() and other.name not in encoders:
            _remove_others(other, OF_ENCODER, [])
            if not any(other.iterdir()):
                other.rmdir()


def _remove_others(folder: Path, stems: Sequence[str], drawn: Sequence[Path]) -> None:
    """Removes plots of ours in ``folder`` that are not among ``drawn``."""
    for stem in stems:
        for path in folder.glob(f"{stem}.png"):
            if path not in drawn:
                path.unlink()
