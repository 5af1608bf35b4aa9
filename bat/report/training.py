"""Writes a pre-training or fine-tuning as one HTML page: curves, masks, health, data, environment.

The page is that of probe runs (``page.py``, one template) with other sections. Curves are drawn as
the metrics are now, so that the page also shows a run that is not finished.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bat.report.page import Details, Picture, render
from bat.report.plots import plot_curves, plot_probe_curve, plot_series
from bat.report.runs import Run, curve, flat, in_words, metric_of, monitor_panels
from bat.report.tables import NOTHING, Table, shown

LINES = 12
"""Lines of metrics in the table."""


def write_training_page(run: Run, path: Path, commands: Sequence[str]) -> Path:
    """Writes the page of a pre-training or fine-tuning: curves, masks, health, data, environment.

    ``commands``: how to reproduce it, line by line.
    """
    fact, summary, best = run.facts(), run.summary, run.best()
    finding = f"{fact['state']}: step {fact['step']} of {fact['steps']}"
    if losses := run.series("loss"):
        finding += f", loss {losses[-1][1]:.3f} ({losses[0][1]:.3f} at step {losses[0][0]})"
    if best:
        finding += f"; best: {in_words(best)}" + (
            f" at step {best['step']}" if "step" in best else ""
        )
    events = Counter(row["event"] for row in run.rows if "event" in row)
    notes = [
        f"{kind}, {n} time(s); the last: {_last_message(run, kind)}" for kind, n in events.items()
    ]
    data = summary.get("data") or {}
    data = data if isinstance(data, dict) else {"hash": data}
    facts = {key: summary.get(key) for key in ("device", "precision", "seconds", "version")}
    facts |= {"clips per second": fact["clips_per_second"], "encoder": fact["encoder"]}
    facts |= {"curves of": fact["part"] or None}
    with tempfile.TemporaryDirectory() as scratch:
        section = {
            "title": f"{run.kind} {fact['recipe']}",
            "finding": f"{finding}.",
            "facts": ", ".join(f"{key} {shown(value)}" for key, value in facts.items() if value),
            "permuted": False,
            "main": _lines(run),
            "notes": notes or ["No stall, slowdown, skipped step or collapse was reported."],
            "ranking": None,
            "comparisons": {},
            "plots": {"Plots": _pictures(run, Path(scratch))},
            "commands": list(commands),
            "details": [
                Details(title, Table(["setting", "value"], cells, words=2, long=(1,)))
                for title, values in (
                    ("Data", {**data, "settings": run.config["data"],
                              "unreadable clips": summary.get("bad_clips")}),
                    ("Environment", {**facts, "settings": run.config["hardware"],
                                     "checkpoints": summary.get("checkpoints")}),
                    ("Settings", run.config),
                )
                if (cells := [[key, shown(value)] for key, value in flat(values)])
            ],
        }  # fmt: skip
        return render(path, title=f"{run.path.resolve().name}: {run.kind}", sections=[section])


def _pictures(run: Run, scratch: Path) -> list[Picture]:
    """Draws the curves as they are now; adds the run's own pictures of masks and gates."""
    made = [plot_curves(run.rows, scratch / "losses-and-learning-rate.png")]
    if probes := curve(run.rows):
        made.append(
            plot_probe_curve(probes, scratch / "online-probes.png", metric=metric_of(probes[0]))
        )
    if monitors := monitor_panels(run.rows):
        made.append(plot_series(monitors, scratch / "monitors.png", baseline=True))
    keys = sorted({key for row in run.rows for key in row if key.startswith("health/")})
    panels: dict[str, dict[str, Any]] = {}
    for key in keys:
        title = "effective rank" if key.endswith("_rank") else "deviation between clips"
        panels.setdefault(title, {})[key.split("/")[1].rpartition("_")[0]] = run.series(key)
    for title, key in (
        ("gradient norm", "grad_norm"),
        ("clips per second", "clips_per_second"),
        ("share of time waiting for batches", "loader_wait"),
        ("GPU memory (GiB)", "gpu_memory_gb"),
        ("model FLOPs utilisation", "mfu"),
    ):
        panels[title] = {key: run.series(key)}
    own = [run.path / "plots" / f"{name}.png" for name in ("masks", "layer_gate", "folds")]
    made += [path for path in own if path.is_file()]
    made.append(plot_series(panels, scratch / "health-and-speed.png"))  # tall, so last
    return [Picture(path) for path in made]


def _lines(run: Run) -> Table:
    """Returns some lines of metrics, evenly spaced, the first and the last among them."""
    rows = [row for row in run.rows if "loss" in row]
    picked = {round(i * (len(rows) - 1) / (LINES - 1)) for i in range(LINES)} if rows else set()
    keys = list(dict.fromkeys(key for row in rows for key in row if "/" not in key))
    lines = [[rows[i].get(key) for key in keys] for i in sorted(picked)]
    cells = [
        [f"{v:.4g}" if isinstance(v, int | float) else NOTHING for v in line] for line in lines
    ]
    return Table([key.replace("_", " ") for key in keys], cells)


def _last_message(run: Run, kind: str) -> str:
    return next(str(r.get("message")) for r in reversed(run.rows) if r.get("event") == kind)
