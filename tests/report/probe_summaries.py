"""Builds summaries of probe runs as ``bat-probe`` writes them, with random numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

METHODS = ("linear", "lcgp", "cgp")
SCALARS = ("accuracy", "map", "f1", "f1_micro", "auroc", "dprime")


def metrics(rng: np.random.Generator, accuracy: float, *, classes: int) -> dict[str, Any]:
    """Returns metrics as ``ranking.evaluate`` does; class 2 has no held-out clip."""
    ap: list[float | None] = [float(v) for v in rng.uniform(accuracy / 2, 1, classes)]
    ap[2] = None
    known = statistics.mean(v for v in ap if v is not None)
    values = (accuracy, known, accuracy - 0.01, accuracy, 0.9, 1.8123875)
    return dict(zip(SCALARS, values, strict=True)) | {
        "absent": [2],
        "per_class": {"ap": ap, "auroc": ap, "positives": [0 if v is None else 8 for v in ap]},
    }


def summary(
    *,
    encoders: Sequence[str] = ("A", "B", "random"),
    methods: Sequence[str] = METHODS,
    folds: Sequence[str] = ("1", "2", "3", "4", "5"),
    seeds: Sequence[int] = (0, 1, 2),
    labels: Sequence[str] = ("dog", "rain", "sea", "baby", "clock"),
    task: str = "esc10",
    depth: int = 12,
    draw: int = 0,
) -> dict[str, Any]:
    """Returns a whole ``summary.json``; the encoder ``random`` is the random-init baseline."""
    rng = np.random.default_rng(draw)
    places = [f"{fold}-{seed}" for fold in folds for seed in seeds]
    over = "seeds" if len(seeds) > 1 else "folds" if len(folds) > 1 else "none"

    def result(level: float, *, gated: bool) -> dict[str, Any]:
        """One probe of one encoder, accurate to about ``level``."""
        found = {
            fold: {
                str(seed): metrics(
                    rng, level + float(rng.uniform(-0.02, 0.02)), classes=len(labels)
                )
                for seed in seeds
            }
            for fold in folds
        }
        values = {}
        for name in SCALARS:
            table = np.array([[m[name] for m in row.values()] for row in found.values()])
            values[name] = table[:, 0] if over == "folds" else table.mean(0)
        mean = {name: float(v.mean()) for name, v in values.items()}
        selected = {"lr": 0.001, "weight_decay": 0.05, "step": 400}
        return {
            "parameters": 23_525_900,
            "mean": mean,
            "std": {name: float(v.std()) for name, v in values.items()},
            "std_over": over,
            "interval": [mean["accuracy"] - 0.03, mean["accuracy"] + 0.03],
            "folds": found,
            "gate": {p: rng.dirichlet(np.ones(depth)).tolist() for p in places} if gated else {},
            "selected": dict.fromkeys(places, selected | {"validation": 0.8, "candidates": 3}),
        }

    def encoder(place: int, name: str) -> dict[str, Any]:
        level = 0.4 if name == "random" else 0.7 - 0.1 * place
        blocks = np.linspace(0.1, 0.5, depth).tolist()
        return {
            "checkpoint": "random:runs/a" if name == "random" else f"runs/{name}",
            "weights": "random" if name == "random" else "teacher",
            "digest": f"0123abcd{place}",
            "backbone": "bat",
            "width": 192,
            "depth": depth,
            "heads": 3,
            "has_cls": True,
            "patch_hop_ms": 160,
            "frames": 512,
            "cls_rule": "",
            "features": {"cache": "memory", "why": "0.42 of 4 GB", "gb": 0.42},
            "bad_clips": {
                "seen": 400,
                "kinds": {"corrupt": 1},
                "shards": {"shard-0.tar": 1},
                "keys": {"1-17367-A-10": "the flac stream is cut off"},
            },
            "seconds": {"features": 41.5, "probes": 600.0},
            "finetuned": 0.952 if name == "A" else None,
            "results": {
                method: result(level + 0.02 * i, gated=method in ("cgp", "lcgp"))
                for i, method in enumerate(methods)
            },
            "diagnostics": {
                "clips": 64,
                "sinks": {"gate on": blocks, "gate off": None, "uniform": 0.002},
                "norms": {"patches": [[v, 0.1, 9.0] for v in blocks], "cls": None},
                "rank": {"patches": blocks, "cls": [None] * depth},
                "curve": {"accuracy": blocks, "std": blocks},
            },
        }

    return {
        "task": task,
        "metric": "accuracy",
        "level": "clip",
        "protocol": {"name": "validated", "selection": "validation", "lrs": [0.001, 0.003]},
        "how": "the rate is chosen on validation clips; nothing was selected on held-out clips",
        "clips": 400,
        "labels": list(labels),
        "splits": [{"name": f, "train": 240, "valid": 80, "test": 80} for f in folds],
        "seeds": list(seeds),
        "permute_labels": False,
        "confidence": 0.95,
        "encoders": {name: encoder(i, name) for i, name in enumerate(encoders)},
        "ranking": [],
        "seconds": 641.5,
        "steps": 400,
        "epochs": None,
        "min_steps": None,
        "head": {"prototypes": 10_000, "per_class": None, "dropout": 0.2},
        "optim": {"lr": 0.001, "betas": [0.9, 0.95], "weight_decay": 0.05},
        "data": "89abcdef",
        "clip_seconds": 5.0,
        "batch": 48,
        "precision": "float32",
        "device": "cpu",
        "version": "0.6.0",
    }
