"""Builds the report's tables of layer gates, selected learning rates and block diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bat.report.cells import NOTHING, number
from bat.report.html import Html, details, table, tag
from bat.report.sections import TITLES, Section

BLOCKS = (
    "Sink: share of attention on the most attended token, mean over heads and clips. Norm: mean ± "
    "standard deviation (greatest) of tokens. Rank: effective rank of token vectors, near 1 in a "
    "collapse. Spread: how far tokens differ, 0 where all are alike. Linear probe: on this block "
    "alone."
)
TOKENS = {"patches": "patches", "cls": "class token"}


def insides(section: Section) -> list[Html]:
    """Returns collapsible tables of the diagnostics that the runs have."""
    found = [*_gates(section), *_chosen(section)]
    for name, encoder in section.encoders.items():
        insight = encoder.get("insight") or {}
        if shown := _blocks(insight):
            found.append(details(f"Blocks of {name}", tag("p", BLOCKS, class_="soft"), shown))
    return found


def _gates(section: Section) -> list[Html]:
    """Returns the layer gate of each encoder and probe, mean over folds and seeds."""
    lines = []
    for row in section.rows:
        gates = list((row.entry.get("gate") or {}).values())
        if gates:
            blocks = [sum(column) / len(column) for column in zip(*gates, strict=True)]
            lines.append(([row.encoder, row.method, str(len(gates))], blocks))
    if not lines:
        return []
    depth = max(len(blocks) for _, blocks in lines)
    header = ["encoder", "probe", "trainings", *(str(b) for b in range(1, depth + 1))]
    cells = [
        [*head, *(f"{v:.3f}" for v in blocks), *[NOTHING] * (depth - len(blocks))]
        for head, blocks in lines
    ]
    tints = {
        (i, j): value / max(blocks)
        for i, (_, blocks) in enumerate(lines)
        for j, value in enumerate(blocks, 3)
    }
    text = "Weight of each block, the first to the last; the weights of a gate sum to 1."
    return [details("Layer gates", table(header, cells, words=2, tints=tints, caption=text))]


def _chosen(section: Section) -> list[Html]:
    """Returns learning rate, weight decay and step of every training."""
    cells = []
    for row in section.rows:
        for key, chosen in (row.entry.get("chosen") or {}).items():
            fold, _, seed = key.rpartition("-")
            cells.append(
                [row.encoder, row.method, fold, seed]
                + [_plain(chosen.get(name)) for name in ("lr", "weight_decay", "step")]
                + [number(chosen.get("validation")), _plain(chosen.get("candidates"))]
            )
    if not cells:
        return []
    header = ["encoder", "probe", "held out", "seed", "learning rate", "weight decay", "step"]
    by = {str(s["protocol"].get("metric", "task")) for s in section.summaries}
    score = TITLES["map"] if by == {"map"} else TITLES[section.metric]
    header += [f"{score} on validation", "candidates"]
    return [details("Chosen rates and steps", table(header, cells, words=4))]


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:g}"


def _blocks(insight: Mapping[str, Any]) -> Html | None:
    """Returns one line per block with all measurements; None if there are none."""
    columns: dict[str, list[str]] = {}
    sinks = insight.get("sinks") or {}
    for name, values in sinks.items():
        if isinstance(values, list):
            columns[f"sink, {name}"] = [_form("{:.3f}", v) for v in values]
    forms = {"norms": "{:.1f} ± {:.1f} ({:.1f})", "rank": "{:.1f}", "spread": "{:.3f}"}
    for what, form in forms.items():
        for kind, values in (insight.get(what) or {}).items():
            name = f"{what.removesuffix('s')}, {TOKENS.get(kind, kind)}"
            if values and any(v is not None for v in values):
                columns[name] = [_form(form, v) for v in values]
    curve = insight.get("curve") or {}
    for metric in (m for m in TITLES if m in curve):
        columns[f"linear probe, {TITLES[metric]}"] = [number(v, metric) for v in curve[metric]]
    if curve.get("std"):
        columns["its deviation"] = [number(v) for v in curve["std"]]
    if not columns:
        return None
    cells = [
        [str(b + 1), *(values[b] if b < len(values) else NOTHING for values in columns.values())]
        for b in range(max(len(values) for values in columns.values()))
    ]
    caption = f"Over {insight['clips']} clips." if "clips" in insight else ""
    if "uniform" in sinks:
        caption += f" Attention spread evenly has a sink of {sinks['uniform']:.4f}."
    return table(["block", *columns], cells, caption=caption.strip())


def _form(form: str, value: Sequence[float] | float | None) -> str:
    if value is None:
        return NOTHING
    return form.format(*value) if isinstance(value, list) else form.format(value)
