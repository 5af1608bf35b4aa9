"""What probes reached: outcomes, their summary, and the tables it makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bat.train.metrics import summarise

HOW = "weights after the last step, judged on the held-out clips; nothing was selected on them"
METRICS = ("accuracy", "map", "f1")
TITLES = {"accuracy": "accuracy", "map": "mAP", "f1": "F1"}


@dataclass(frozen=True)
class Outcome:
    """One method in one round."""

    method: str
    fold: str
    metrics: dict[str, Any]
    """As ``metrics.evaluate`` returns them, fractions."""
    gate: list[float] | None = None


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """``{method: {"folds": {fold: metrics}, "mean": {}, "std": {}, "gate": {fold: [L]}}}``."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        entry = found.setdefault(outcome.method, {"folds": {}, "gate": {}})
        entry["folds"][outcome.fold] = outcome.metrics
        if outcome.gate is not None:
            entry["gate"][outcome.fold] = outcome.gate
    for entry in found.values():
        rows = list(entry["folds"].values())
        pairs = {m: summarise([r[m] for r in rows]) for m in METRICS if m in rows[0]}
        entry["mean"] = {m: mean for m, (mean, _) in pairs.items()}
        entry["std"] = {m: std for m, (_, std) in pairs.items()}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Per-fold results and their mean and standard deviation, in percent, as text."""
    lines = []
    for method, entry in results.items():
        names = list(entry["mean"])
        lines.append("".join([f"{method:<12}", *(f"{TITLES[m]:>16}" for m in names)]))
        for fold, row in entry["folds"].items():
            label = f"fold {fold}" if fold.isdigit() else fold
            lines.append("".join([f"  {label:<10}", *(f"{100 * row[m]:>16.2f}" for m in names)]))
        if len(entry["folds"]) > 1:
            pairs = (f"{100 * entry['mean'][m]:.2f} ± {100 * entry['std'][m]:.2f}" for m in names)
            lines.append("".join([f"  {'mean ± std':<10}", *(f"{p:>16}" for p in pairs)]))
        absent = sorted({c for row in entry["folds"].values() for c in row["absent"]})
        if absent:
            lines.append(
                f"  {len(absent)} class(es) without a held-out clip are left out of the means"
            )
    return "\n".join(lines)


def gate_bars(gate: Sequence[float], *, width: int = 40) -> str:
    """A layer gate (L,) as text bars, one block a line."""
    longest = max(gate)
    return "\n".join(
        f"  block {i:>2}  {value:.3f}  {'█' * max(1, round(width * value / longest))}"
        for i, value in enumerate(gate, 1)
    )
