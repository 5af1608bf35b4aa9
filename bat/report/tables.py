"""Formats probe results as tables for the terminal and in Markdown for papers.

Probes are rows and encoders columns; for a single encoder, metrics are columns, and for a single
probe, folds are rows. Notes below every table state what deviations and intervals are taken over,
which classes are omitted and what replaces a class token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bat.redact import printable
from bat.report.cells import (
    LEADS,
    bounds_of,
    gains,
    gaps,
    grid,
    intervals,
    notes,
    protocols,
    ranking,
    rounds,
    spread,
)
from bat.report.sections import TITLES, Section, sections

RANKS = 10
"""Lines of the ranking shown in the terminal; files have all of it."""
NARROW = ("accuracy", "map", "f1", "auroc", "segment_f1", "wer", "cer")
"""Columns for one encoder in the terminal, besides the main metric."""


def comparison(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns every probe of every encoder as flat rows (fractions), the best of each task first.

    ``task``, ``level``, ``metric``, ``encoder``, ``method``, ``mean``, ``std``, ``std_over``,
    ``low``, ``high`` (None without an interval), ``parameters``.
    """
    found = []
    for section in sections(summaries):
        for row in section.ranking:
            low, high = row.entry["interval"] or (None, None)
            found.append(
                {
                    "task": section.task,
                    "level": section.level,
                    "metric": section.metric,
                    "encoder": row.encoder,
                    "method": row.method,
                    "mean": row.entry["mean"][section.metric],
                    "std": row.entry["std"][section.metric],
                    "std_over": row.entry["std_over"],
                    "low": low,
                    "high": high,
                    "parameters": row.entry["parameters"],
                }
            )
    return found


def aligned(header: Sequence[str], cells: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Formats text columns: the first ``words`` aligned left, numbers aligned right."""
    lines = [list(header), *map(list, cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_text(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns all tables for the terminal."""
    return "\n\n".join(_text(section) for section in sections(summaries))


def _text(section: Section) -> str:
    summary = section.summaries[0]
    narrow = [section.metric, *(name for name in NARROW if name != section.metric)]
    title, share = TITLES[section.metric], f"{100 * summary['confidence']:g}%"
    parts = [
        f"{section.title}: {title} in %, {summary['clips']} clips, {len(section.labels)} classes"
    ]
    if len(section.rows) == 1:
        [row] = section.rows
        parts.append(aligned(*rounds(section, narrow), words=3))
        line = f"mean {title} {spread(row, section.metric)}"
        if row.entry["interval"]:
            line += f", {share} interval {bounds_of(row.entry['interval'])}"
        parts.append(line)
    else:
        header, cells, best = grid(section, narrow)
        marked = [
            [c + (" *" if (i, j) in best else "  " if j else "") for j, c in enumerate(line)]
            for i, line in enumerate(cells)
        ]
        header = [header[0], *(f"{name}  " for name in header[1:])]
        parts.append(aligned(header, marked) + (f"\n* {LEADS}" if best else ""))
        header, cells = ranking(section)
        more = len(cells) - RANKS
        text = aligned(header, cells[:RANKS], words=3)
        parts.append(text + (f"\n... and {more} more" if more > 0 else ""))
    for found in (gaps(section), gains(section)):
        if found:
            parts.append(aligned(*found, words=2))
    parts.append("\n".join(notes(section)))
    return "\n\n".join(parts)


def as_markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown tables: means, intervals, fine-tuning, and a footnote with the protocol."""
    return "\n".join(_markdown(section) for section in sections(summaries))


def _markdown(section: Section) -> str:
    what = f"{TITLES[section.metric]} in %"
    if len(section.encoders) == 1:
        what = f"{next(iter(section.encoders))}, in %, d-prime as it is"
    header, found, best = grid(section, section.metrics)
    cells = [[plain(c) for c in line] for line in found]
    for i, j in best:
        cells[i][j] = f"**{cells[i][j]}**"
    parts = [f"## {plain(section.title)} ({plain(what)})", pipes(header, cells)]
    if bounds := intervals(section):
        share = f"{100 * section.summaries[0]['confidence']:g}%"
        parts += [f"{share} intervals of {TITLES[section.metric]}, in %:", _escaped(*bounds)]
    if given := gaps(section):
        parts += ["Best probe beside fine-tuning, in %:", _escaped(*given)]
    if given := gains(section):
        parts += ["Every probe beside itself on the untrained encoder, in %:", _escaped(*given)]
    if len(section.rows) == 1:
        parts.append(_escaped(*rounds(section, section.metrics)))
    foot = [f"Bold: {LEADS}."] if best else []
    foot += [*notes(section), *protocols(section)]
    parts.append(plain(" ".join(foot)))
    return "\n\n".join(parts) + "\n"


def pipes(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the cells must be Markdown already."""
    lines = [[plain(name) for name in header], ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return pipes(header, [[plain(cell) for cell in line] for line in cells])


def plain(text: str) -> str:
    """Escapes text for Markdown, since names come from users' files and tables."""
    kept = "".join(f"\\{c}" if c in "\\`*_<>|#~&" else c for c in " ".join(printable(text).split()))
    return kept.replace("](", "]\\(").replace("][", "]\\[")
