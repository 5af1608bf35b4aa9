"""The pictures of a probing: of each encoder, and of all side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bat.report import insight_plots, probe_plots
from bat.report.plots import plot_folds, plot_layer_gates
from bat.report.sections import TITLES
from bat.train.encoders import RANDOM
from bat.train.inside import maps_of
from bat.train.laboratory import Laboratory


def draw_encoder(folder: Path, lab: Laboratory, entry: dict[str, Any]) -> None:
    """Gates, folds and prototype maps of one encoder; ``entry``: its part of the summary."""
    results, metric = entry["results"], lab.ready.task.metric
    gates = {m: list(e["gate"].values()) for m, e in results.items() if e["gate"]}
    if gates:
        plot_layer_gates(gates, folder / "layer-gates.png")
    if len(lab.ready.rounds) > 1:
        folds = {
            method: {
                fold: float(np.mean([row[metric] for row in rows.values()]))
                for fold, rows in e["folds"].items()
            }
            for method, e in results.items()
        }
        plot_folds(folds, folder / "folds.png", metric=TITLES[metric])
    name, maps = maps_of(lab)
    if maps:
        insight_plots.plot_prototype_maps(maps, folder / f"prototype-maps-{name}.png")


def draw_comparison(folder: Path, summary: dict[str, Any]) -> None:
    """All encoders in one picture each: results, gates, curves, sinks, norms and ranks."""
    encoders, metric = summary["encoders"], summary["metric"]
    controls = [n for n, e in encoders.items() if str(e["checkpoint"]).startswith(RANDOM)]
    chance = None if summary["multi_label"] else 1 / len(summary["labels"])
    shown = {
        name: {
            method: {"mean": e["mean"][metric], "std": e["std"][metric], "interval": e["interval"]}
            for method, e in entry["results"].items()
        }
        for name, entry in encoders.items()
    }
    first = next(iter(next(iter(encoders.values()))["results"].values()))
    probe_plots.plot_comparison(
        shown,
        folder / "comparison.png",
        metric=TITLES[metric],
        std_over=first["std_over"],
        confidence=summary["confidence"],
        chance=chance,
        controls=controls,
        finetuned={n: e["finetuned"] for n, e in encoders.items() if e["finetuned"] is not None},
    )
    gates = {
        (method if len(encoders) == 1 else f"{name}, {method}"): list(e["gate"].values())
        for name, entry in encoders.items()
        for method, e in entry["results"].items()
        if e["gate"]
    }
    if gates:
        probe_plots.plot_gates_heat(gates, folder / "gates.png")
    inside = {name: entry["insight"] for name, entry in encoders.items()}
    curves = {n: {"mean": i["curve"][metric], "std": i["curve"]["std"]}
              for n, i in inside.items() if "curve" in i}  # fmt: skip
    if curves:
        probe_plots.plot_layer_curve(
            curves,
            folder / "layer-curve.png",
            metric=TITLES[metric],
            chance=chance,
            controls=controls,
        )
    if sinks := {n: i["sinks"] for n, i in inside.items() if i.get("sinks")}:
        insight_plots.plot_sinks(sinks, folder / "attention-sinks.png", controls=controls)
    if norms := {n: i for n, i in inside.items() if i.get("norms")}:
        insight_plots.plot_norms_ranks(norms, folder / "norms-ranks.png", controls=controls)
