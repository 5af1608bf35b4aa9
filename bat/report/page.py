"""Writes probe runs as one self-contained HTML page: embedded plots, no scripts, no requests.

The page suits phones, print, and light and dark modes. It shows the results first, then details:
every fold and seed, classes, selected rates, diagnostics of the encoders, protocol,
unreadable clips, versions. Long parts are collapsed. ``page.html.jinja`` is its template, which
escapes all text, since names come from users' files and tables.
"""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from bat.report.sections import TITLES, Section, sections
from bat.report.tables import (
    NOTHING,
    Table,
    bounds,
    confidence,
    folds,
    gains,
    gaps,
    grid,
    mean,
    notes,
    number,
    paired,
    ranking,
    shown,
    spread,
)

SHOWN_KEYS = 200
"""Maximum number of unreadable clips listed."""
RUN = (
    "recipe", "steps", "epochs", "min_steps", "batch", "clip_seconds", "data", "bootstrap",
    "permute_labels", "precision", "device", "seconds",
)  # fmt: skip
"""Keys of a summary that are listed with the protocol, if present."""
CAPTIONS = {
    "attention-sinks": "Share of attention on the most attended token, block by block",
    "comparison": "Every probe of every encoder",
    "events": "Events of the best and the worst clips",
    "folds": "Results by held-out fold",
    "gates": "Weight that each layer gate gives to each block",
    "layer-curve": "A linear probe on each block alone",
    "layer-gates": "Layer gates",
    "norms-ranks": "Token norms and effective rank, block by block",
    "transcripts": "Worst transcripts",
}
COMPARISONS = ("attention-sinks", "comparison", "gates", "layer-curve", "norms-ranks")
"""Names of plots that show all encoders together, without ``.png``."""
ENCODER = (
    "checkpoint", "weights", "backbone", "features", "digest", "width", "depth", "heads", "has_cls",
    "patch_hop_ms", "frames", "seconds",
)  # fmt: skip
"""Keys of an encoder in a summary that are listed."""
BLOCKS = (
    "sinks: share of attention on the most attended token, mean over heads and clips. norms: mean, "
    "standard deviation and maximum over tokens. rank: effective rank of token vectors, near 1 in "
    "a collapse. spread: how far tokens differ between clips, 0 if all are equal. curve: a linear "
    "probe on this block alone, fractions."
)


WIDE_PIXELS = 1700
"""Pictures wider than this take the width of the page."""


class Picture(NamedTuple):
    """A PNG file of a run."""

    path: Path
    encoder: str = ""
    """Encoder that it shows; empty: all encoders together."""

    @property
    def caption(self) -> str:
        """Caption of the plot; unknown files are named: ``my-plot`` is *My plot*."""
        words = re.sub(r"[-_]+", " ", self.path.stem).strip()
        text = CAPTIONS.get(self.path.stem, words[:1].upper() + words[1:])
        return f"{text}: {self.encoder}" if self.encoder else text

    @property
    def wide(self) -> bool:
        """True if its text would be too small in half of the page."""
        return int.from_bytes(self.path.read_bytes()[16:20], "big") > WIDE_PIXELS  # a PNG's width

    @property
    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


class Details(NamedTuple):
    """A collapsed part of the page."""

    title: str
    table: Table
    text: str = ""


def write_page(
    path: Path,
    *,
    title: str,
    summaries: Sequence[dict[str, Any]],
    pictures: Mapping[str, Sequence[Picture]] | None = None,
) -> Path:
    """Writes the page of ``summaries`` (``sections.py``) and returns its path.

    ``pictures``: plots of each run, keyed by the ``run`` of its summary.
    Raises ``OSError`` if a plot cannot be read or the page cannot be written.
    """
    content = [_content(section, pictures or {}) for section in sections(summaries)]
    return render(path, title=title, sections=content)


def render(path: Path, *, title: str, sections: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page of ``sections``, each with the keys that ``_content`` returns and optionally
    ``commands``, and returns its path."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html.jinja").render(title=title, sections=sections)
    path.write_text(page, encoding="utf-8")
    return path


def _content(section: Section, pictures: Mapping[str, Sequence[Picture]]) -> dict[str, Any]:
    """Returns what the template shows of a section."""
    first = section.summaries[0]
    main = grid(section, section.metrics)
    main.tints = _tints(section)
    runs = {str(s.get("run", "")) for s in section.summaries}
    return {
        "title": section.title,
        "finding": _finding(section),
        "facts": f"{first['clips']} clips, {len(section.labels)} classes, {len(first['splits'])} "
        f"fold(s), {len(first['seeds'])} seed(s); {TITLES[section.metric]} in %",
        "permuted": section.permuted,
        "main": main,
        "notes": notes(section),
        "ranking": ranking(section) if len(section.rows) > 1 else None,
        "comparisons": {
            heading: table
            for heading, table in (
                ("Compared with fine-tuning", gaps(section)),
                ("Compared with random init", gains(section)),
            )
            if table
        },
        "plots": _plots({run: files for run, files in pictures.items() if run in runs}),
        "details": _details(section),
    }


def _finding(section: Section) -> str:
    """Returns the main result in a sentence."""
    if not section.rows:
        return "No probe was trained."
    row, metric = section.ranking[0], section.metric
    text = f"{row.method} on {row.encoder}: {spread(row, metric)}% {TITLES[metric]}"
    if row.entry["interval"]:
        text += f", {confidence(section)} interval {bounds(row.entry['interval'])}"
    if len(section.rows) > 1:
        text = f"Best of {len(section.rows)} probes, all evaluated on the same clips: {text}"
    for one, baseline in section.baselines():
        if one == row:
            theirs = number(mean(baseline, metric), metric)
            text += f"; the same probe on the untrained {baseline.encoder}: {theirs}%"
            if difference := section.difference(row, baseline):
                text += f", gain {paired(difference, metric)}"
    return f"{text}."


def _tints(section: Section) -> dict[tuple[int, int], float]:
    """Returns the shades of the main table's cells, from the worst mean to the best."""
    if len(section.encoders) < 2 or len(section.rows) < 2:
        return {}
    encoders, methods = list(section.encoders), section.methods
    values = {
        (methods.index(row.method), encoders.index(row.encoder) + 1): mean(row, section.metric)
        for row in section.rows
    }
    values = {cell: value for cell, value in values.items() if not math.isnan(value)}
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    span = (high - low) or 1.0
    tints = {cell: (value - low) / span for cell, value in values.items()}
    return {cell: 1 - tint for cell, tint in tints.items()} if section.lower else tints


def _plots(pictures: Mapping[str, Sequence[Picture]]) -> dict[str, list[Picture]]:
    found: dict[str, list[Picture]] = {}
    for run, files in pictures.items():
        for picture in files:
            heading = f"Plots of {run}" if len(pictures) > 1 else "Plots"
            heading += f": {picture.encoder}" if picture.encoder else ""
            found.setdefault(heading, []).append(picture)
    return found


def _details(section: Section) -> list[Details]:
    found = []
    if section.rows:
        found.append(Details("Every fold and seed", folds(section, section.metrics)))
    found += _classes(section)
    for name, encoder in section.encoders.items():
        if blocks := _blocks(encoder.get("diagnostics") or {}):
            found.append(Details(f"Blocks of {name}", blocks, BLOCKS))
    cells = [[n, *(shown(e.get(key)) for key in ENCODER)] for n, e in section.encoders.items()]
    found.append(Details("Encoders", Table(["encoder", *ENCODER], cells, words=6, long=(1, 4, 5))))
    for summary in section.summaries:
        run = f" of {summary['run']}" if len(section.summaries) > 1 else ""
        found.append(Details(f"Protocol{run}", _protocol(summary), str(summary["how"])))
        header = ["fold", "to train", "to select on", "held out"]
        sizes = [[str(f[k]) for k in ("name", "train", "valid", "test")] for f in summary["splits"]]
        found.append(Details(f"Clips by fold{run}", Table(header, sizes)))
    return [*found, *_unreadable(section)]


def _classes(section: Section) -> list[Details]:
    """Tabulates each class's average precision under each encoder's best probe, hardest first."""
    rows = [row for name in section.encoders if (row := section.best(name)) is not None]
    columns = [(row, values) for row in rows if (values := section.class_precision(row))]
    if not columns:
        return []
    leading = next((v for row, v in columns if row == section.ranking[0]), columns[0][1])
    order = sorted(
        range(len(section.labels)), key=lambda c: (leading[c] is None, leading[c] or 0.0)
    )
    first_seeds = [next(iter(s.values())) for s in section.ranking[0].entry["folds"].values()]
    positives = [sum(m["per_class"]["positives"][c] for m in first_seeds) for c in order]
    cells = [
        [section.labels[c], str(n), *(number(values[c]) for _, values in columns)]
        for c, n in zip(order, positives, strict=True)
    ]
    tints = {
        (i, j): value
        for i, c in enumerate(order)
        for j, (_, values) in enumerate(columns, 2)
        if (value := values[c]) is not None
    }
    header = ["class", "clips held out", *(f"{row.encoder}: {row.method}" for row, _ in columns)]
    text = "Average precision in %, mean over folds and seeds that hold such a clip; hardest first."
    title = f"Average precision of {len(section.labels)} classes"
    return [Details(title, Table(header, cells, tints=tints), text)]


def _blocks(diagnostics: Mapping[str, Any]) -> Table | None:
    """Returns one line per block with all measurements; None if there are none."""
    columns: dict[str, list[str]] = {}
    for what, measured in diagnostics.items():
        for kind, values in measured.items() if isinstance(measured, dict) else ():
            if isinstance(values, list) and any(v is not None for v in values):
                columns[f"{what}, {kind}"] = [shown(v) for v in values]
    if not columns:
        return None
    cells = [
        [str(block), *(NOTHING if v is None else v for v in line)]
        for block, line in enumerate(itertools.zip_longest(*columns.values()), 1)
    ]
    caption = f"Over {diagnostics['clips']} clips." if "clips" in diagnostics else ""
    if uniform := (diagnostics.get("sinks") or {}).get("uniform"):
        caption += f" Attention spread evenly has a sink of {uniform:.4f}."
    return Table(["block", *columns], cells, caption=caption.strip())


def _protocol(summary: Mapping[str, Any]) -> Table:
    settings = {**summary["protocol"], "seeds": summary["seeds"]}
    settings |= {key: summary[key] for key in RUN if summary.get(key) is not None}
    for part in ("head", "optim"):
        settings |= {f"{part}.{key}": value for key, value in (summary.get(part) or {}).items()}
    settings["bat"] = summary["version"]
    cells = [[str(key), shown(value)] for key, value in settings.items()]
    return Table(["setting", "value"], cells, words=2, long=(1,))


def _unreadable(section: Section) -> list[Details]:
    keys: dict[str, str] = {}
    for encoder in section.encoders.values():
        keys |= encoder["bad_clips"].get("keys") or {}
    if not keys:
        return []
    cells = [[str(key), str(why)] for key, why in list(keys.items())[:SHOWN_KEYS]]
    more = len(keys) - len(cells)
    caption = f"{more} more are in summary.json." if more > 0 else ""
    clips = Table(["clip", "why"], cells, words=2, long=(0, 1), caption=caption)
    return [Details(f"Clips that could not be read: {len(keys)}", clips)]
