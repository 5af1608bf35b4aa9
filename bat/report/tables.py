"""Builds the tables of probe runs and formats them for the terminal and in Markdown.

Probes are rows and encoders columns; for a single encoder, metrics are columns, and for a single
probe, folds are rows. Fractions are shown in percent. Notes below every table state what deviations
and intervals are taken over, which classes are omitted and what replaces a class token. ``page.py``
shows the same tables in HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bat.metrics.base import describe
from bat.redact import printable
from bat.report.sections import TITLES, Row, Section, sections

NOTHING = "–"  # noqa: RUF001 (a dash where there is no number)
NARROW = ("accuracy", "map", "f1", "auroc", "segment_f1", "wer", "cer")
"""Columns for one encoder in the terminal, besides the main metric."""


@dataclass
class Table:
    """Header and cells of text."""

    header: list[str]
    cells: list[list[str]]
    words: int = 1
    """Leading columns that are text; the others are numbers."""
    best: set[tuple[int, int]] = field(default_factory=set)
    """Marked cells (row, column)."""
    tints: dict[tuple[int, int], float] = field(default_factory=dict)
    """Shades of cells in [0, 1]."""
    long: tuple[int, ...] = ()
    """Columns of long text, which may wrap."""
    caption: str = ""


def number(value: float | None, metric: str = "map", sign: str = "") -> str:
    """Formats a metric: in percent, d-prime unchanged, a dash for None. ``sign``: ``+`` or none."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{100 * value if describe(metric).percent else value:{sign}z.2f}"  # z: no -0.00


def mean(row: Row, metric: str) -> float:
    """Returns a probe's mean of a metric, NaN if it has none."""
    value = row.entry["mean"].get(metric)
    return math.nan if value is None else float(value)


def spread(row: Row | None, metric: str) -> str:
    """Formats mean and deviation as ``87.25 ± 1.20``; the deviation is omitted if missing."""
    middle = NOTHING if row is None else number(mean(row, metric), metric)
    if row is None or middle == NOTHING or row.entry["std_over"] == "none":
        return middle
    return f"{middle} ± {number(row.entry['std'].get(metric), metric)}"


def bounds(interval: Sequence[float] | None, metric: str = "map") -> str:
    """Formats an interval as ``[85.10, 89.31]``, or a dash."""
    if interval is None:
        return NOTHING
    return f"[{number(interval[0], metric)}, {number(interval[1], metric)}]"


def paired(found: Mapping[str, Any], metric: str) -> str:
    """Formats a paired difference as ``+4.00 [-0.10, 8.20]``."""
    return f"{number(found['difference'], metric, '+')} {bounds(found['interval'], metric)}"


def shown(value: Any) -> str:
    """Formats a value of a summary that is no metric; a dash for None."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return NOTHING if value is None else str(value)


def few(names: Sequence[str], most: int = 8) -> str:
    """Returns the first names and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def confidence(section: Section) -> str:
    """Formats the confidence of the intervals as ``95%``."""
    return f"{100 * section.summaries[0]['confidence']:g}%"


def notes(section: Section) -> list[str]:
    """Returns the notes needed to interpret the numbers, one sentence each."""
    summaries, rows, title = section.summaries, section.rows, TITLES[section.metric]
    over = {row.entry["std_over"] for row in rows}
    found = []
    if section.permuted:
        found.append("Permuted: every clip has another clip's labels, so chance is expected.")
    if left := [name for s in summaries for name in s.get("unfinished", [])]:
        found.append(f"Not finished: {few(left)} still to come; the same command continues.")
    if "seeds" in over:
        found.append(
            "± is the population standard deviation over seeds, each the mean of its folds."
        )
    if "folds" in over:
        where = " where a probe has a single seed." if "seeds" in over else "; there is one seed."
        found.append(f"± is the population standard deviation over folds{where}")
    if "none" in over:
        found.append("One seed and one fold: nothing tells how far training varies.")
    if any(row.entry["interval"] for row in rows):
        found.append(
            f"[ ] is the {confidence(section)} bootstrap interval of the mean {title}: other clips "
            "held out, the same trained probes."
        )
    if len(rows) > 1:
        clips = sum(fold["test"] for fold in summaries[0]["splits"])
        found.append(
            f"All probes are ranked on the same {clips} held-out clips: the best of {len(rows)} is "
            "flattered by this selection, and no interval accounts for that."
        )
    if section.baselines():
        found.append(
            "Gain over random init: each probe minus the same probe on the untrained encoder, on "
            "the same held-out clips; [ ] is the paired interval."
        )
    if any(row.entry["mean"].get("f1", 1.0) < 0.005 for row in rows):
        found.append(
            "F1 predicts a class if its score is above 0.5, which hardly any score is here; mAP "
            "and AUROC do not depend on a threshold."
        )
    if absent := section.absent():
        found.append(
            "Classes without a held-out clip in some fold, excluded from that fold's macro means: "
            f"{few(absent)}."
        )
    for name, encoder in section.encoders.items():
        if encoder.get("diverged"):
            found.append(f"{name}: left out, {encoder['diverged']}.")
        if encoder["cls_rule"]:
            found.append(f"{name}: {encoder['cls_rule'].rstrip('.')}.")
    if used := dict.fromkeys(str(s["precision"]) for s in summaries if "precision" in s):
        found.append(f"Computed in {' and '.join(used)}.")
    said = [str(s["how"]) for s in summaries] + [
        str(n) for s in summaries for n in s.get("notices", [])
    ]
    found += [f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in dict.fromkeys(said)]
    if section.differ:
        found.append(
            f"These {len(summaries)} runs are not of one protocol: they differ in "
            f"{', '.join(section.differ)}. Compare with care."
        )
    return found


def grid(section: Section, metrics: Sequence[str]) -> Table:
    """Returns the main table; ``metrics``: the columns if there is one encoder.

    A cell is marked if its probe's whole paired interval of the main metric is above each other
    probe of its encoder.
    """
    columns = [(name, name, section.metric) for name in section.encoders]  # title, encoder, metric
    if len(columns) == 1:
        [name] = section.encoders
        columns = [(TITLES[m], name, m) for m in metrics if m in section.metrics]
    rows = {row[:2]: row for row in section.rows}
    cells = [
        [method, *(spread(rows.get((name, method)), metric) for _, name, metric in columns)]
        for method in section.methods
    ]
    best = set()
    for j, (_, name, metric) in enumerate(columns, 1):
        own = [row for row in section.ranking if row.encoder == name]
        if metric == section.metric and own and section.leads(own[0], own[1:]):
            best.add((section.methods.index(own[0].method), j))
    header = ["probe", *(title for title, _, _ in columns)]
    legend = "Marked: better than every other probe of its encoder by the paired interval."
    return Table(header, cells, best=best, caption=legend if best else "")


def folds(section: Section, metrics: Sequence[str]) -> Table:
    """Returns ``metrics`` and selected settings of every fold and seed."""
    metrics = [m for m in metrics if m in section.metrics]
    selected = {"lr": "learning rate", "weight_decay": "weight decay", "step": "step"}
    cells = []
    for row in section.rows:
        for fold, seeds in row.entry["folds"].items():
            for seed, found in seeds.items():
                chosen = (row.entry.get("selected") or {}).get(f"{fold}-{seed}", {})
                numbers = [number(found.get(m), m) for m in metrics]
                numbers += [shown(chosen.get(key)) for key in selected]
                cells.append([row.encoder, row.method, fold, seed, *numbers])
    header = ["encoder", "probe", "held out", "seed", *(TITLES[m] for m in metrics)]
    return Table([*header, *selected.values()], cells, words=4)


def ranking(section: Section) -> Table:
    """Returns all probes, the best first."""
    metric, ranked = section.metric, section.ranking
    behind = [section.difference(ranked[0], row) for row in ranked]
    header = ["", "probe", "encoder", TITLES[metric], "interval", "parameters"]
    cells = []
    for place, row in enumerate(ranked, 1):
        n = row.entry["parameters"]
        size = f"{n / 1e6:.2f} M" if n >= 100_000 else f"{n / 1e3:.1f} k"
        interval = bounds(row.entry["interval"], metric)
        cells.append([str(place), row.method, row.encoder, spread(row, metric), interval, size])
    if any(behind):
        header.append("best minus this")
        for line, difference in zip(cells, behind, strict=True):
            line.append(paired(difference, metric) if difference else "")
    return Table(header, cells, words=3)


def gaps(section: Section) -> Table | None:
    """Returns each encoder's best probe and its fine-tuning; None without fine-tuning."""
    cells = []
    for name, encoder in section.encoders.items():
        row, tuned = section.best(name), encoder.get("finetuned")
        if row is not None and tuned is not None:
            probed = mean(row, section.metric)
            numbers = [number(probed), number(tuned), number(probed - tuned, sign="+")]
            cells.append([name, row.method, *numbers])
    title = TITLES[section.metric]
    header = ["encoder", "best probe", title, "fine-tuned", "probe minus fine-tuned"]
    return Table(header, cells, words=2) if cells else None


def gains(section: Section) -> Table | None:
    """Returns every probe and its random-init baseline; None without one."""
    metric, cells = section.metric, []
    for row, baseline in section.baselines():
        one, other = mean(row, metric), mean(baseline, metric)
        difference = section.difference(row, baseline)
        gain = paired(difference, metric) if difference else number(one - other, metric, "+")
        cells.append([row.encoder, row.method, number(one, metric), number(other, metric), gain])
    header = ["encoder", "probe", TITLES[metric], "random init", "gain over random init"]
    return Table(header, cells, words=2) if cells else None


def as_text(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns all tables for the terminal."""
    found = []
    for section in sections(summaries):
        usual = dict.fromkeys([section.metric, *NARROW])
        narrow = [*usual, *(m for m in section.metrics if m not in TITLES)]  # from outside bat too
        parts = [aligned(table) for table in _main_tables(section, narrow)]
        found += [_headline(section), *parts, "\n".join(notes(section))]
    return "\n\n".join(found)


def as_markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown tables, and footnotes with the protocol."""
    found = []
    for section in sections(summaries):
        parts = [_pipes(table) for table in _main_tables(section, section.metrics)]
        foot = plain(" ".join([*notes(section), *_protocols(section)]))
        found += [f"## {plain(_headline(section))}", *parts, foot]
    return "\n\n".join(found) + "\n"


def _headline(section: Section) -> str:
    clips, title = section.summaries[0]["clips"], TITLES[section.metric]
    return f"{section.title}: {title} in %, {clips} clips, {len(section.labels)} classes"


def _main_tables(section: Section, metrics: Sequence[str]) -> list[Table]:
    found = [grid(section, metrics), ranking(section)]
    if len(section.rows) == 1:
        found.append(folds(section, metrics))
    return [table for table in (*found, gaps(section), gains(section)) if table]


def aligned(table: Table) -> str:
    """Formats columns of equal width: text aligned left, numbers aligned right."""
    lines = [list(table.header), *map(list, table.cells)]
    if table.best:
        for i, line in enumerate(lines):
            for j in range(table.words, len(line)):
                line[j] += " *" if (i - 1, j) in table.best else "  "
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line: list[str]) -> Iterable[str]:
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            yield cell.ljust(width) if i < table.words else cell.rjust(width)

    found = ["  ".join(padded(line)).rstrip() for line in lines]
    return "\n".join([*found, *([f"* {table.caption}"] if table.caption else [])])


def _pipes(table: Table) -> str:
    lines = [[plain(cell) for cell in line] for line in (table.header, *table.cells)]
    for i, j in table.best:
        lines[i + 1][j] = f"**{lines[i + 1][j]}**"
    lines.insert(1, ["---"] * table.words + ["---:"] * (len(table.header) - table.words))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{plain(table.caption)}" if table.caption else text


def _protocols(section: Section) -> list[str]:
    """Returns the protocol of each run in a sentence."""
    found = []
    for summary in section.summaries:
        settings = dict(summary["protocol"])
        settings |= {k: summary[k] for k in ("steps", "epochs", "batch") if summary.get(k)}
        sizes = [f"{fold['train']}/{fold['valid']}/{fold['test']}" for fold in summary["splits"]]
        found.append(
            f"Protocol: {', '.join(f'{k}={v}' for k, v in settings.items())}. {len(sizes)} fold(s) "
            f"of {', '.join(dict.fromkeys(sizes))} clips to train, to select on and held out; "
            f"seeds {shown(summary['seeds'])}; bat {summary['version']}."
        )
    return list(dict.fromkeys(found))


def plain(text: str) -> str:
    """Escapes text for Markdown, since names come from users' files and tables."""
    kept = "".join(f"\\{c}" if c in "\\`*_<>|#~&" else c for c in " ".join(printable(text).split()))
    return kept.replace("](", "]\\(").replace("][", "]\\[")
