"""Stores the results of probes, summarises them, and formats them as tables.

A result is one evaluated training: an encoder's probe with a seed in a fold. Deviations are
population standard deviations (divided by n, as the reference's over folds): over seeds (of the
mean over folds) if there are several, else over folds; each summary says which. Confidence
intervals come from resamples of the held-out clips: the same resamples for every method and seed of
a fold, averaged as the results are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bat.errors import UserError
from bat.io import filter_jsonl, read_jsonl, write_json
from bat.metrics.base import describe, rank_key
from bat.metrics.bootstrap import interval
from bat.metrics.ranking import summarise
from bat.report.sections import TITLES

HOW = "weights after the last step, evaluated on the held-out clips; nothing was selected on them"
SHOWN = ("accuracy", "map", "f1", "event_f1", "segment_f1", "token_error_rate", "wer")
"""Columns of the table of one encoder."""


@dataclass(frozen=True)
class FoldResult:
    """Result of one method in one fold."""

    method: str
    fold: str
    metrics: dict[str, Any]
    """Metrics as ``metrics.evaluate`` returns them, fractions."""
    gate: list[float] | None = None
    seed: int = 0
    probe: str = ""
    """Method that was trained, if it has several readers (``curve`` of ``curve@3``)."""
    selected: dict[str, Any] = field(default_factory=dict)
    """Selected values: ``lr``, ``weight_decay``, ``step``, ``validation`` (its score or None),
    ``candidates``."""
    parameters: int = 0
    replicates: list[float] | None = None
    """Main metric on resamples of the held-out clips."""


class ResultsFile:
    """The file ``results.jsonl``: one result per line, written as soon as it is available.

    A resumed run reads it, so that nothing is trained twice. ``made_from``: what an encoder's
    results depend on besides the settings.
    """

    def __init__(self, path: Path, *, encoder: str, made_from: dict[str, str]) -> None:
        """Raises ``UserError`` if the file holds this encoder's results of something else."""
        self.path, self.encoder, self.made_from = path, encoder, made_from
        self.fold_results: list[FoldResult] = []
        self.written: set[tuple[str, str, int]] = set()
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            filter_jsonl(path, lambda row: True)  # drops the last line, cut off by a kill
        for row in read_jsonl(path):
            if row["encoder"] != encoder:
                continue
            other = [k for k, v in made_from.items() if row["made_from"].get(k) != v]
            if other:
                raise UserError(
                    f"{path} holds results of '{encoder}' with other {' and '.join(other)} than "
                    "now: give another out=, or remove that folder"
                )
            kept = {k: v for k, v in row.items() if k not in ("encoder", "made_from")}
            self.fold_results.append(FoldResult(**kept))
            self.written.add((row["probe"], row["fold"], row["seed"]))

    def done(self, probe: str, fold: str, seed: int) -> bool:
        """Return True if this training was done and evaluated before."""
        return (probe, fold, seed) in self.written

    def add(self, fold_results: Sequence[FoldResult]) -> None:
        """Appends the results of one training, all of them or none."""
        head = {"encoder": self.encoder, "made_from": self.made_from}
        lines = [json.dumps({**head, **asdict(fold_result)}) + "\n" for fold_result in fold_results]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self.fold_results += fold_results
        self.written |= {(o.probe, o.fold, o.seed) for o in fold_results}


def recorded(file: Path, made_from: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Writes ``content`` with what it depends on, for a resumed run; returns ``content``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"made_from": made_from, "content": content})
    return content


def read_recorded(file: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the content; None if the file is missing, damaged, or made from something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return dict(found["content"]) if found["made_from"] == made_from else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def summary(
    fold_results: Iterable[FoldResult], *, metric: str = "accuracy", confidence: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Returns ``{method: {"folds": {fold: {seed: metrics}}, "mean", "std", "std_over", "interval",
    "gate": {"fold-seed": [L]}, "selected": {"fold-seed": {}}, "parameters"}}``.

    ``interval``: of the mean of ``metric``, None if the results hold no resamples.
    """
    by_method: dict[str, list[FoldResult]] = {}
    for fold_result in fold_results:
        by_method.setdefault(fold_result.method, []).append(fold_result)
    return {method: _entry(found, metric, confidence) for method, found in by_method.items()}


def _entry(fold_results: list[FoldResult], metric: str, confidence: float) -> dict[str, Any]:
    """Returns the summary of one method."""
    folds: dict[str, dict[str, Any]] = {}
    for o in fold_results:
        folds.setdefault(o.fold, {})[str(o.seed)] = o.metrics
    seeds = list(dict.fromkeys(str(o.seed) for o in fold_results))
    over = "seeds" if len(seeds) > 1 else "folds" if len(folds) > 1 else "none"
    mean, std = {}, {}
    for name in (m for m, value in fold_results[0].metrics.items() if isinstance(value, float)):
        if over == "seeds":
            rows = [[f[s][name] for f in folds.values() if s in f] for s in seeds]
            values = [summarise(row)[0] for row in rows]
        else:
            values = [o.metrics[name] for o in fold_results]
        mean[name], std[name] = summarise(values)
    tables = [o.replicates for o in fold_results]
    middle = None
    if all(tables):
        draws = np.mean(np.array(tables), axis=0)
        most = describe(metric).most
        middle = list(interval(draws, confidence, at=mean[metric], most=most))
    return {
        "parameters": fold_results[0].parameters,
        "mean": mean,
        "std": std,
        "std_over": over,
        "interval": middle,
        "folds": folds,
        "gate": {f"{o.fold}-{o.seed}": o.gate for o in fold_results if o.gate is not None},
        "selected": {f"{o.fold}-{o.seed}": o.selected for o in fold_results if o.selected},
    }


def ranking(encoders: dict[str, dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Returns every encoder with every method, best first, of ``{encoder: results of summary}``."""
    rows = [
        {"encoder": name, "method": method, "mean": e["mean"][metric], "interval": e["interval"]}
        for name, results in encoders.items()
        for method, e in results.items()
        if "@" not in method
    ]
    return sorted(rows, key=lambda row: -rank_key(metric, row["mean"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats results per fold (mean over seeds), their mean and deviation, in percent, as text."""
    lines = []
    scale = {m: 100 if describe(m).percent else 1 for e in results.values() for m in e["mean"]}
    for method, entry in results.items():
        names = [m for i, m in enumerate(entry["mean"]) if not i or m in SHOWN]  # main metric
        lines.append("".join([f"{method:<12}", *(f"{TITLES[m]:>16}" for m in names)]))
        for fold, rows in entry["folds"].items():
            label = f"fold {fold}" if fold.isdigit() else fold
            means = (scale[m] * summarise([row[m] for row in rows.values()])[0] for m in names)
            lines.append("".join([f"  {label:<10}", *(f"{value:>16.2f}" for value in means)]))
        if entry["std_over"] != "none":
            pairs = (
                f"{scale[m] * entry['mean'][m]:.2f} ± {scale[m] * entry['std'][m]:.2f}"
                for m in names
            )
            lines.append("".join([f"  {'mean ± std':<10}", *(f"{p:>16}" for p in pairs)]))
            lines.append(f"  (± is the population standard deviation over {entry['std_over']})")
        rows = [row for fold in entry["folds"].values() for row in fold.values()]
        if absent := sorted({c for row in rows for c in row.get("absent", ())}):
            lines.append(
                f"  {len(absent)} class(es) without a held-out clip are left out of the means"
            )
    return "\n".join(lines)


def gate_bars(gate: Sequence[float], *, width: int = 40) -> str:
    """Formats a layer gate (L,) as text bars, one block per line."""
    longest = max(gate)
    return "\n".join(
        f"  block {i:>2}  {value:.3f}  {'█' * max(1, round(width * value / longest))}"
        for i, value in enumerate(gate, 1)
    )
