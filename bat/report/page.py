"""Writes probe runs as one self-contained HTML page: embedded plots, no scripts, no requests.

The page suits phones, print, and light and dark modes. It shows the results first, then details:
every fold and seed, classes, gates, selected rates, diagnostics of the encoders, protocol,
unreadable clips, versions. Long parts are collapsed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bat.report.cells import (
    LEADS,
    NOTHING,
    bounds_of,
    few,
    gains,
    gaps,
    grid,
    intervals,
    mean,
    notes,
    number,
    paired,
    ranking,
    rounds,
    spread,
)
from bat.report.html import Html, details, page, picture, table, tag
from bat.report.inside import insides
from bat.report.sections import TITLES, Section, is_control, sections

LEADING = 10
"""Lines of the ranking shown without unfolding."""
SAID = (
    "recipe", "steps", "epochs", "min_steps", "batch", "clip_seconds", "data", "bootstrap",
    "control", "precision", "device", "seconds",
)  # fmt: skip
"""Keys of a summary that are listed with the protocol, if present."""
SHOWN_KEYS = 200
"""Maximum number of unreadable clips listed."""


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


CAPTIONS = {
    "attention-sinks": "Share of attention on the most attended token, block by block",
    "comparison": "Every probe of every encoder",
    "folds": "Results by held-out round",
    "gates": "Weight that each layer gate gives to each block",
    "layer-curve": "A linear probe on each block alone",
    "layer-gates": "Layer gates",
    "norms-ranks": "Token norms and effective rank, block by block",
}
COMPARISONS = ("attention-sinks", "comparison", "gates", "layer-curve", "norms-ranks")
"""Names of plots that show all encoders together, without ``.png``."""


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
    found = sections(summaries)
    body = [tag("h1", title), _overview(found)]
    for i, section in enumerate(found, 1):
        body.append(tag("section", *_section(section, pictures or {}), id=f"s{i}"))
    path.write_text(page(title, *body), encoding="utf-8")
    return path


def _overview(found: Sequence[Section]) -> Html:
    if len(found) == 1:
        return tag("p", _finding(found[0]), class_="lead")
    lines = [
        tag("li", tag("a", section.title, href=f"#s{i}"), ": ", _finding(section))
        for i, section in enumerate(found, 1)
    ]
    return tag("ul", *lines)


def _finding(section: Section) -> str:
    """Returns the main result in a sentence."""
    if not section.rows:
        return "No probe was trained."
    row = section.ranking[0]
    text = f"{row.method} on {row.encoder}: {spread(row, section.metric)}% "
    text += TITLES[section.metric]
    if row.entry["interval"]:
        share = f"{100 * section.summaries[0]['confidence']:g}%"
        text += f", {share} interval {bounds_of(row.entry['interval'])}"
    if len(section.rows) > 1:
        text = f"Best of {len(section.rows)} results on the clips they are judged on: {text}"
    for gain in section.gains():
        if gain.row == row:
            theirs = number(mean(gain.control, section.metric), section.metric)
            text += f"; the same probe on the untrained {gain.control.encoder}: {theirs}%"
            if gain.paired:
                text += f", gain {paired(gain.paired, section.metric)}"
    return text + "."


def _section(section: Section, pictures: Mapping[str, Sequence[Picture]]) -> list[Html]:
    first = section.summaries[0]
    title = TITLES[section.metric]
    facts = f"{first['clips']} clips, {len(section.labels)} classes, {len(first['rounds'])} "
    facts += f"round(s), {len(first['seeds'])} seed(s); {title} in %"
    body = [tag("h2", section.title), tag("p", facts, class_="soft")]
    if section.permuted:
        body.append(tag("p", notes(section)[0], class_="warn"))
    header, cells, best = grid(section, section.metrics)
    below = f"Bold: {LEADS}." if best else ""
    body.append(table(header, cells, best=best, tints=_tints(section), caption=below))
    body.append(tag("ul", *(tag("li", note) for note in notes(section))))
    if len(section.rows) > 1:
        header, cells = ranking(section)
        body += [tag("h3", "Ranking"), table(header, cells[:LEADING], words=3)]
        if len(cells) > LEADING:
            rest = table(header, cells[LEADING:], words=3)
            body.append(details(f"The other {len(cells) - LEADING}", rest))
    if found := gaps(section):
        body += [tag("h3", "Against fine-tuning"), table(*found, words=2)]
    if found := gains(section):
        body += [tag("h3", "Against the untrained encoder"), table(*found, words=2)]
    names = {str(s.get("run", "")) for s in section.summaries}
    body += _pictures({run: shown for run, shown in pictures.items() if run in names})
    body += [tag("h3", "What it rests on"), *_foundations(section)]
    return body


def _tints(section: Section) -> dict[tuple[int, int], float]:
    """Returns the tints of the main table's cells, from the worst mean to the best."""
    if len(section.encoders) < 2 or len(section.rows) < 2:
        return {}
    values = {
        (section.methods.index(row.method), list(section.encoders).index(row.encoder) + 1): mean(
            row, section.metric
        )
        for row in section.rows
    }
    tints = _scaled(values)
    return {key: 1 - tint for key, tint in tints.items()} if section.lower else tints


def _scaled(values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    finite = [v for v in values.values() if not math.isnan(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return {key: (v - low) / span for key, v in values.items() if not math.isnan(v)}


def _pictures(pictures: Mapping[str, Sequence[Picture]]) -> list[Html]:
    found: list[Html] = []
    for run, shown in pictures.items():
        owner = f" of {run}" if len(pictures) > 1 else ""
        for encoder in dict.fromkeys(p.encoder for p in shown):
            heading = f"Pictures{owner}" + (f": {encoder}" if encoder else "")
            figures = [picture(p.path, p.caption) for p in shown if p.encoder == encoder]
            found += [tag("h3", heading), tag("div", *figures, class_="figures")]
    return found


def _foundations(section: Section) -> list[Html]:
    found = []
    if bounds := intervals(section):
        found.append(details(f"Intervals of {TITLES[section.metric]}", table(*bounds)))
    if section.rows:
        found.append(
            details("Every round and seed", table(*rounds(section, section.metrics), words=4))
        )
    found += _classes(section)
    found += insides(section)
    found.append(details("Encoders", _encoders(section)))
    for summary in section.summaries:
        name = f" of {summary['run']}" if len(section.summaries) > 1 else ""
        found.append(details(f"Protocol{name}", *_protocol(summary)))
    return [*found, *_unreadable(section)]


def _classes(section: Section) -> list[Html]:
    """Tabulates each class's average precision under each encoder's best probe, hardest first."""
    rows = [row for name in section.encoders if (row := section.best(name)) is not None]
    columns = [(row, section.class_precision(row)) for row in rows]
    columns = [(row, values) for row, values in columns if values]
    if not columns:
        return []
    positives = _positives(section)
    leading = next((v for row, v in columns if row == section.ranking[0]), columns[0][1])
    order = sorted(
        range(len(section.labels)), key=lambda c: (leading[c] is None, leading[c] or 0.0)
    )
    known = [section.labels[c] for c in order if leading[c] is not None]
    header = ["class", "clips held out", *(f"{r.encoder}: {r.method}" for r, _ in columns)]
    cells = [
        [section.labels[c], positives[c], *(number(values[c]) for _, values in columns)]
        for c in order
    ]
    tints = {
        (i, j): value
        for i, c in enumerate(order)
        for j, (_, values) in enumerate(columns, 2)
        if (value := values[c]) is not None
    }
    if len(known) > 6:
        said = f"Hardest: {few(known[:5])}. Easiest: {few(known[:-6:-1])}."
    else:
        said = f"From the hardest to the easiest: {few(known)}."
    text = "Average precision in %, mean over rounds and seeds that hold such a clip."
    return [
        details(
            f"Average precision of {len(section.labels)} classes",
            tag("p", said),
            table(header, cells, tints=tints, caption=text),
        )
    ]


def _positives(section: Section) -> list[str]:
    """Returns the number of held-out clips of each class over all folds."""
    row = section.ranking[0]
    counts = [next(iter(seeds.values()))["per_class"]["positives"] for seeds in
              row.entry["folds"].values()]  # fmt: skip
    return [str(sum(column)) for column in zip(*counts, strict=True)]


def _encoders(section: Section) -> Html:
    header = ["encoder", "checkpoint", "weights", "kind", "features", "digest"]
    header += ["width", "blocks", "heads", "class token", "patch, ms", "frames", "seconds"]
    cells = []
    for name, e in section.encoders.items():
        kept = NOTHING  # results of an earlier start need no features
        if e["features"] is not None:
            kept = "{cache}, {gb:.3f} GB ({why})".format(**e["features"])
        spent = ", ".join(f"{what} {seconds:g}" for what, seconds in e["seconds"].items())
        kind = str(e["backbone"]) + (" (untrained)" if is_control(e) else "")
        cells.append(
            [name, str(e["checkpoint"]), str(e["weights"]), kind, kept, str(e["digest"])[:16]]
            + [str(e[key]) for key in ("width", "depth", "heads")]
            + ["yes" if e["has_cls"] else "no", f"{e['patch_hop_ms']:g}"]
            + [str(e.get("frames", NOTHING)), spent]
        )
    return table(header, cells, words=6, long=(1, 4))


def _protocol(summary: Mapping[str, Any]) -> list[Html]:
    def listed(values: Mapping[str, Any]) -> Html:
        cells = [[str(k), NOTHING if v is None else str(v)] for k, v in values.items()]
        return table(["setting", "value"], cells, words=2, long=(1,))

    lines = [
        [r["name"], *(str(r[k]) for k in ("train", "valid", "test"))] for r in summary["rounds"]
    ]
    run = {"seeds": ", ".join(map(str, summary["seeds"]))}
    run |= {key: summary[key] for key in SAID if summary.get(key) is not None}
    parts = [(part, summary.get(part) or {}) for part in ("head", "optim")]
    settings = {f"{part}.{key}": value for part, own in parts for key, value in own.items()}
    return [
        tag("p", str(summary["how"])),
        listed({**summary["protocol"], **run, **settings, "bat": summary["version"]}),
        table(["round", "to train", "to choose", "held out"], lines, caption="Clips."),
    ]


def _unreadable(section: Section) -> list[Html]:
    keys: dict[str, str] = {}
    for encoder in section.encoders.values():
        keys |= encoder["bad_clips"].get("keys") or {}
    if not keys:
        return []
    lines = [[str(key), str(why)] for key, why in list(keys.items())[:SHOWN_KEYS]]
    more = len(keys) - len(lines)
    text = f"{more} more are in summary.json." if more > 0 else ""
    clips = table(["clip", "why"], lines, words=2, long=(0, 1), caption=text)
    return [details(f"Clips that could not be read: {len(keys)}", clips)]
