"""Reads runs of all commands for a table and a comparison; nothing is written into a run.

Read are ``config.yaml``, ``metrics.jsonl`` (of a fine-tuning its latest fold's), ``summary.json``,
``train.log`` and the lock.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bat.errors import FAILED, UserError
from bat.io import read_jsonl
from bat.lock import is_held
from bat.metrics.base import describe, rank_key
from bat.redact import redact_tree
from bat.report.plots import plot_series
from bat.report.tables import NOTHING, Table, number, shown

KINDS = {"objective": "pretrain", "methods": "probe", "method": "finetune"}
"""Commands by a section that only their settings have."""


MONITORED = ("student", "teacher", "objective", "")
"""First parts of the keys ``online/...`` that are no method; the last: ``online/seconds``."""
RANKS = {"rankme": "RankMe", "lidar": "LiDAR"}
LOSSES = {
    "local_loss": ("local loss", "of the objective"),
    "position_only_loss": ("local loss", "from position alone"),
}
"""Panel and line of the monitors of an objective."""


class Run:
    """One run folder; everything is read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ``UserError`` if ``path`` holds no run."""
        self.path = path
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            self.config = yaml.load((path / "config.yaml").read_bytes(), loader)
            self.kind = next(kind for key, kind in KINDS.items() if key in self.config)
        except (OSError, TypeError, yaml.YAMLError, StopIteration):
            raise UserError(
                f"{path} holds no run of bat (no config.yaml of one): name the out= of a run"
            ) from None

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(redact_tree(json.loads((self.path / "summary.json").read_bytes())))
        return {}

    @functools.cached_property
    def part(self) -> Path:
        """The folder with the metrics: of a fine-tuning its latest fold, else the run's own."""
        folds = list(self.path.glob("fold-*/metrics.jsonl"))
        return max(folds, key=lambda f: f.stat().st_mtime).parent if folds else self.path

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.part / "metrics.jsonl") if isinstance(row, dict)]

    def series(self, key: str) -> list[tuple[float, float]]:
        """Returns (step, value) of a scalar."""
        return [(r["step"], r[key]) for r in self.rows if isinstance(r.get(key), int | float)]

    def last(self, key: str) -> Any:
        return next((value for _, value in reversed(self.series(key))), None)

    @property
    def steps(self) -> int | None:
        """Steps of the training; None for a probe run, which counts its results."""
        return None if self.kind == "probe" else int(self.config["train"]["steps"])

    @property
    def state(self) -> str:
        if is_held(self.path):
            return "running"
        complete = self.kind != "pretrain" or self.summary.get("steps", 0) >= (self.steps or 0)
        if self.summary and complete and not self.summary.get("unfinished"):
            return "done"
        with suppress(OSError):
            said = (self.path / "train.log").read_text("utf-8", "replace")
            if f" ERROR {FAILED}" in said.rstrip().rpartition("\n")[2]:
                return "failed"
        return "interrupted"

    def best(self) -> dict[str, Any] | None:
        """Returns the best result: ``{"metric", "value", "method"}``, and encoder or step."""
        found = []
        for row in curve(self.rows):
            of = {"method": row["method"], "step": row["step"]}
            found.append({"metric": metric_of(row), "value": row[metric_of(row)], **of})
        encoders = self.summary.get("encoders") or {"": self.summary}
        for encoder, entry in encoders.items():
            for method, result in (entry.get("results") or {}).items():
                metric = self.summary.get("metric") or next(iter(result["mean"]))
                of = {"method": method} | ({"encoder": encoder} if encoder else {})
                found.append({"metric": metric, "value": result["mean"].get(metric), **of})
        return max(found, key=lambda b: rank_key(b["metric"], b["value"]), default=None)

    def facts(self) -> dict[str, Any]:
        """Returns the run's line of the table."""
        files = [self.part / "metrics.jsonl", self.path / "train.log", self.path / "config.yaml"]
        newest = max(file.stat().st_mtime for file in files if file.is_file())
        is_probe = self.kind == "probe"
        results = len(read_jsonl(self.path / "results.jsonl")) if is_probe else 0
        model = self.config["model"] if self.kind == "pretrain" else None
        paths = map(Path, str(self.config.get("checkpoint")).split(","))
        return {
            "run": str(self.path),
            "kind": self.kind,
            "recipe": self.config.get("recipe"),
            "encoder": "{backbone} {width}x{depth}".format(**model)
            if model
            else ",".join(path.name for path in paths),
            "part": "" if self.part == self.path else self.part.name,
            "step": results or max((row.get("step") or 0 for row in self.rows), default=0),
            "steps": self.steps,
            "state": self.state,
            "clips_per_second": self.summary.get("clips_per_second")
            or self.last("clips_per_second"),
            "loss": None if is_probe else self.last("loss"),
            "best": self.best(),
            "age_seconds": round(time.time() - newest),
        }


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the results of online probes and kNN in rows of a ``metrics.jsonl``, one row per step
    and method: ``{"step", "method", METRIC: value, METRIC_std: value ...}``, the task's metric
    first.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        for key, value in row.items():
            method, _, name = key.removeprefix("online/").rpartition("/")
            if key.startswith("online/") and method not in MONITORED and name != "gate":
                first = {"step": row["step"], "method": method}
                found.setdefault((row["step"], method), first)[name] = value
    return list(found.values())


def monitor_panels(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Returns the monitors without labels in rows of a ``metrics.jsonl``: title of a panel -> name
    of a line -> (step, value)."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            method, _, name = key.removeprefix("online/").rpartition("/")
            if key.startswith("online/") and method in MONITORED and method and value is not None:
                title, line = LOSSES.get(name) or (RANKS.get(name, name), method)
                panels.setdefault(title, {}).setdefault(line, []).append((row["step"], value))
    return panels


def metric_of(row: Mapping[str, Any]) -> str:
    """Returns the first metric in a row of ``curve``."""
    return next(key for key in row if key not in ("step", "method"))


def in_words(best: Mapping[str, Any] | None) -> str:
    """Returns ``Run.best`` as text, ``cgp 61.25 accuracy``; a dash for None."""
    if best is None:
        return NOTHING
    return f"{best['method']} {number(best['value'], best['metric'])} {best['metric']}"


def find_runs(folder: Path) -> list[Run]:
    """Returns all runs below ``folder``, by name. Raises ``UserError`` if it is no folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that holds runs, bat runs FOLDER")
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.yaml" in files:
            with suppress(UserError):
                found.append(Run(Path(here)))
                folders.clear()
    return found


def table(facts: Sequence[Mapping[str, Any]], folder: Path) -> Table:
    """Returns the table of runs for the terminal."""
    header = ["run", "kind", "recipe", "encoder", "state", "step", "clips/s", "loss", "best", "age"]
    cells = []
    for fact in facts:
        step = f"{fact['step']}/{fact['steps']}" if fact["steps"] else f"{fact['step']} results"
        speed, loss = fact["clips_per_second"], fact["loss"]
        name = os.path.relpath(fact["run"], folder)
        words = [name, *(str(fact[key]) for key in ("kind", "recipe", "encoder", "state"))]
        numbers = [NOTHING if speed is None else f"{speed:.3g}"]
        numbers += [NOTHING if loss is None else f"{loss:.3f}", in_words(fact["best"])]
        cells.append([*words, f"{fact['part']} {step}".strip(), *numbers, age(fact["age_seconds"])])
    return Table(header, cells, words=5)


def age(seconds: float) -> str:
    """Formats a duration in its largest unit: ``3 h``."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def differences(runs: Sequence[Run]) -> Table:
    """Returns the settings that differ, and what the runs became, side by side."""
    settings = [dict(flat(run.config)) for run in runs]
    keys = sorted({key for one in settings for key in one} - {"out"})
    cells = []
    for key in keys:
        values = [shown(one[key]) if key in one else NOTHING for one in settings]
        if len(set(values)) > 1:
            cells.append([key, *values])
    facts = [fact | {"best": in_words(fact["best"])} for fact in (run.facts() for run in runs)]
    for key in ("state", "step", "clips_per_second", "loss", "best"):
        cells.append([f"({key})", *(shown(fact[key]) for fact in facts)])
    return Table(["setting", *(str(run.path) for run in runs)], cells, words=len(runs) + 1)


def compare(runs: Sequence[Run], path: Path) -> Path:
    """Draws the curves of runs over each other. Raises ``UserError`` if they have none."""
    probes: dict[str, Any] = {}
    for run in runs:
        for row in curve(run.rows):
            metric = metric_of(row)
            value = describe(metric)
            title = f"online probe: {value.title}{' (%)' * value.percent}"
            point = (row["step"], row[metric] * (100 if value.percent else 1))
            probes.setdefault(title, {}).setdefault(f"{run.path}: {row['method']}", []).append(
                point
            )
    keys = {"loss": "loss", "gradient norm": "grad_norm", "clips per second": "clips_per_second"}
    panels = {t: {str(run.path): run.series(key) for run in runs} for t, key in keys.items()}
    panels = {"loss": panels.pop("loss"), **probes, **panels}
    if not any(line for lines in panels.values() for line in lines.values()):
        raise UserError("the runs have no metrics yet, nothing can be drawn: name others")
    return plot_series(panels, path)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
