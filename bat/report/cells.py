"""Builds the tables of probe runs as header and cells of text, and the notes below them.

Probes are rows and encoders columns; for a single encoder, metrics are columns. Fractions are shown
in percent. ``tables.py`` renders them for the terminal and in Markdown, ``page.py`` in HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bat.metrics.base import describe
from bat.report.sections import TITLES, Row, Section

LEADS = "better than every other probe of its encoder by the paired interval"
"""Legend of the marked cells in the main table."""
NOTHING = "–"  # noqa: RUF001 (a dash where there is no number)


def number(value: float | None, metric: str = "map") -> str:
    """Formats a metric: in percent, d-prime unchanged, a dash for None."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{100 * value if describe(metric).percent else value:.2f}"


def mean(row: Row, metric: str) -> float:
    """Returns a probe's mean of a metric, NaN if it has none."""
    value = row.entry["mean"].get(metric)
    return math.nan if value is None else float(value)


def spread(row: Row, metric: str) -> str:
    """Formats mean and deviation as ``87.25 ± 1.20``; the deviation is omitted if missing."""
    middle = number(mean(row, metric), metric)
    if middle == NOTHING or row.entry["std_over"] == "none":
        return middle
    return f"{middle} ± {number(row.entry['std'].get(metric), metric)}"


def bounds_of(bounds: Sequence[float] | None, metric: str = "map") -> str:
    """Formats an interval as ``[85.10, 89.31]``, or a dash."""
    if bounds is None:
        return NOTHING
    return f"[{number(bounds[0], metric)}, {number(bounds[1], metric)}]"


def millions(parameters: int) -> str:
    """Formats a number of parameters: ``23.52 M``, ``0.4 k``."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters / 1e3:.1f} k"


def notes(section: Section) -> list[str]:
    """Returns the notes needed to interpret the numbers, one sentence each."""
    found = []
    if left := [name for s in section.summaries for name in s.get("unfinished", [])]:
        found.append(f"Not finished: {few(left)} still to come; the same command continues.")
    if section.permuted:
        found.append("Control: every clip has another clip's labels, so chance is expected.")
    over = section.deviation()
    if "seeds" in over:
        found.append(
            "± is the population standard deviation over seeds, each the mean of its rounds."
        )
    if "folds" in over:
        where = " where a probe has a single seed." if "seeds" in over else "; there is one seed."
        found.append(f"± is the population standard deviation over rounds (folds){where}")
    if over == {"none"}:
        found.append("One seed and one round: nothing tells how far training varies.")
    if any(row.entry["interval"] for row in section.rows):
        share = f"{100 * section.summaries[0]['confidence']:g}%"
        found.append(
            f"[ ] is the {share} bootstrap interval of the mean {TITLES[section.metric]}: other "
            "clips held out, the same trained probes."
        )
    if len(section.rows) > 1:
        judged = sum(r["test"] for r in section.summaries[0]["rounds"])
        found.append(
            f"Order and best are told on the {judged} held-out clips that every probe is judged "
            f"on: the best of {len(section.rows)} is flattered by the choice, and no interval "
            "counts that."
        )
    if section.gains():
        found.append(
            "Gain over untrained: each probe minus the same probe on the untrained encoder, on the "
            "same held-out clips; [ ] is the paired interval."
        )
    if any(row.entry["mean"].get("f1", 1.0) < 0.005 for row in section.rows):
        found.append(
            "F1 counts a class as heard where its score is above 0.5, which hardly any score is "
            "here; mAP and AUROC do not depend on a threshold."
        )
    if absent := section.absent():
        found.append(
            "Classes without a held-out clip in some round, left out of that round's macro means: "
            f"{few(absent)}."
        )
    for name, encoder in section.encoders.items():
        if encoder.get("diverged"):
            found.append(f"{name}: left out, {encoder['diverged']}.")
        if encoder["cls_rule"]:
            found.append(f"{name}: {encoder['cls_rule'].rstrip('.')}.")
    if used := list(
        dict.fromkeys(str(s["precision"]) for s in section.summaries if "precision" in s)
    ):
        found.append(f"Computed in {' and '.join(used)}.")
    for how in dict.fromkeys(str(s["how"]) for s in section.summaries):
        found.append(f"{how[:1].upper()}{how[1:].rstrip('.')}.")
    for notice in dict.fromkeys(str(n) for s in section.summaries for n in s.get("notices", [])):
        found.append(f"{notice[:1].upper()}{notice[1:].rstrip('.')}.")
    if section.differ:
        found.append(
            f"These {len(section.summaries)} runs are not of one protocol: they differ in "
            f"{', '.join(section.differ)}. Compare with care."
        )
    return found


def few(names: Sequence[str], most: int = 8) -> str:
    """Returns the first names and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def grid(
    section: Section, metrics: Sequence[str]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Returns the main table: header, cells, and the (row, column) cells that lead their column.

    A probe leads if its whole paired interval of the main metric is above each other probe of its
    encoder; nothing else is marked. ``metrics``: the columns if there is one encoder.
    """
    rows = {(row.encoder, row.method): row for row in section.rows}
    if len(section.encoders) == 1:
        [name] = section.encoders
        metrics = [m for m in metrics if m in section.metrics]
        keys = [[((name, method), metric) for metric in metrics] for method in section.methods]
        header = ["probe", *(TITLES[metric] for metric in metrics)]
    else:
        keys = [
            [((name, method), section.metric) for name in section.encoders]
            for method in section.methods
        ]
        header = ["probe", *section.encoders]
    cells = []
    for method, line in zip(section.methods, keys, strict=True):
        found = [(rows.get(key), metric) for key, metric in line]
        cells.append([method, *(NOTHING if r is None else spread(r, m) for r, m in found)])
    leading = set()
    for column, key in enumerate(keys[0] if keys else [], 1):
        (name, _), metric = key
        own = [row for row in section.ranking if row.encoder == name]
        if metric == section.metric and own and section.leads(own[0], own[1:]):
            leading.add((section.methods.index(own[0].method), column))
    return header, cells, leading


def intervals(section: Section) -> tuple[list[str], list[list[str]]] | None:
    """Returns header and cells of the main metric's intervals; None if there are none."""
    rows = {(row.encoder, row.method): row.entry["interval"] for row in section.rows}
    if not any(rows.values()):
        return None
    cells = [
        [m, *(bounds_of(rows.get((e, m)), section.metric) for e in section.encoders)]
        for m in section.methods
    ]
    return ["probe", *section.encoders], cells


def rounds(section: Section, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells of every single result: encoder, probe, fold, seed, ``metrics``."""
    metrics = [m for m in metrics if m in section.metrics]
    cells = [
        [row.encoder, row.method, fold, seed, *(number(found.get(m), m) for m in metrics)]
        for row in section.rows
        for fold, seeds in row.entry["folds"].items()
        for seed, found in seeds.items()
    ]
    return ["encoder", "probe", "held out", "seed", *(TITLES[m] for m in metrics)], cells


def ranking(section: Section) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells of all probes, the best first."""
    metric = section.metric
    behind = [section.difference(section.ranking[0], row) for row in section.ranking]
    header = ["", "probe", "encoder", TITLES[metric], "interval", "parameters"]
    header += ["best minus this"] if any(behind) else []
    cells = []
    for place, (row, d) in enumerate(zip(section.ranking, behind, strict=True), 1):
        cell = [str(place), row.method, row.encoder, spread(row, metric)]
        cell += [bounds_of(row.entry["interval"], metric), millions(row.entry["parameters"])]
        if any(behind):
            cell.append(paired(d, metric) if d else "")
        cells.append(cell)
    return header, cells


def paired(found: Mapping[str, Any], metric: str) -> str:
    """Formats a difference as ``+4.00 [-0.10, 8.20]``."""
    sign = "+" if found["difference"] >= 0 else ""
    difference = number(found["difference"], metric)
    return f"{sign}{difference} {bounds_of(found['interval'], metric)}"


def gaps(section: Section) -> tuple[list[str], list[list[str]]] | None:
    """Returns header and cells of best probe and fine-tuning; None without fine-tuning."""
    found = section.gaps()
    if not found:
        return None
    title = TITLES[section.metric]
    header = ["encoder", "best probe", title, "fine-tuned", "probe minus fine-tuned"]
    cells = [
        [g.encoder, g.method, number(g.mean), number(g.finetuned), _minus(g.mean, g.finetuned)]
        for g in found
    ]
    return header, cells


def gains(section: Section) -> tuple[list[str], list[list[str]]] | None:
    """Returns header and cells of every probe and its random-init baseline; None without one."""
    metric, found = section.metric, section.gains()
    if not found:
        return None
    header = ["encoder", "probe", TITLES[metric], "untrained", "gain over untrained"]
    cells = []
    for row, control, own in found:
        one, two = mean(row, metric), mean(control, metric)
        gain = paired(own, metric) if own else _minus(one, two)
        cells.append([row.encoder, row.method, number(one, metric), number(two, metric), gain])
    return header, cells


def _minus(a: float, b: float) -> str:
    return NOTHING if math.isnan(a) or math.isnan(b) else f"{100 * (a - b):+.2f}"


def protocols(section: Section) -> list[str]:
    """Returns the protocol of each run in a sentence."""
    found = []
    for summary in section.summaries:
        length = {k: summary[k] for k in ("steps", "epochs", "batch") if summary.get(k) is not None}
        given = ", ".join(f"{k}={v}" for k, v in {**summary["protocol"], **length}.items())
        counts = [f"{r['train']}/{r['valid']}/{r['test']}" for r in summary["rounds"]]
        sizes = ", ".join(dict.fromkeys(counts))
        found.append(
            f"Protocol: {given}. {len(counts)} round(s) of {sizes} clips to train, to choose and "
            f"held out; seeds {', '.join(map(str, summary['seeds']))}; bat {summary['version']}."
        )
    return list(dict.fromkeys(found))
