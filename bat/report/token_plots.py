"""Plots of transcripts: an alignment of reference and hypothesis over the spectrogram.

Style and conventions are those of ``plots.py``. A word is written where it was heard; a deleted one
between its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bat.report.plots import figure, short

RIGHT, SUBSTITUTED, INSERTED, DELETED = "#222222", "#D55E00", "#0072B2", "#B1127A"
PANEL_SECONDS = 8.0
"""Length of a panel; longer utterances take several."""
INCHES, FONT = 12.0, 8.5
GONE = "*"
"""Sign in place of a word that is missing."""


def plot_transcripts(items: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots utterances, reference above hypothesis, with their edits marked.

    Each of ``items`` has ``key``, ``unit`` (``word`` or ``token``), ``spectrogram`` (frames, mels),
    ``hop_ms`` between frames, ``seconds``, and ``columns``: ``{"reference", "hypothesis", "span"}``
    from left to right, None for one that is missing, ``span`` the seconds (start, end) of the
    hypothesis or None.
    """
    panels = [
        (item, k) for item in items for k in range(math.ceil(item["seconds"] / PANEL_SECONDS) or 1)
    ]
    n = max(1, len(panels))
    with figure(path, n, 1, figsize=(INCHES, 0.8 + 2.25 * n)) as (fig, axes):
        for axis, (item, k) in zip(np.atleast_1d(axes).flat, panels, strict=False):
            length = min(item["seconds"], PANEL_SECONDS)
            _panel(axis, item, k * length, length if k == 0 else PANEL_SECONDS)
            if k == 0:
                axis.set_title(_title(item), pad=34)
            else:
                axis.set_title(f"{short(item['key'], 40)}, continued", pad=34, fontweight="normal")
        fig.supxlabel(
            f"above: reference, below: hypothesis; framed: substituted (orange), inserted (blue, "
            f"{GONE} above), deleted (purple, {GONE} below); bars: when it was heard",
            fontsize=FONT + 0.5,
        )
    return Path(path)


def kind_of(column: Mapping[str, Any]) -> str:
    """Returns the colour of a column, which says what kind of edit it is."""
    true, predicted = column["reference"], column["hypothesis"]
    if true is None:
        return INSERTED
    if predicted is None:
        return DELETED
    return RIGHT if true == predicted else SUBSTITUTED


def _title(item: Mapping[str, Any]) -> str:
    kinds = [kind_of(column) for column in item["columns"]]
    said = [c for c in item["columns"] if c["reference"] is not None]
    wrong = sum(kind != RIGHT for kind in kinds)
    rate = f"{100 * wrong / len(said):.0f} %" if said else "no reference"
    counts = {"substituted": SUBSTITUTED, "inserted": INSERTED, "deleted": DELETED}
    what = ", ".join(f"{kinds.count(colour)} {name}" for name, colour in counts.items())
    return (
        f"{short(item['key'], 40)}: {item['unit']} error rate {rate} of {len(said)} "
        f"{item['unit']}s ({what})"
    )


def _panel(axis: Any, item: Mapping[str, Any], begin: float, length: float) -> None:
    """Draws ``length`` seconds from ``begin`` on."""
    image = np.asarray(item["spectrogram"], dtype=float)  # (frames, mels)
    hop, end = item["hop_ms"] / 1000, begin + length
    axis.grid(False)
    extent = (0.0, len(image) * hop, 0.0, float(image.shape[1]))
    axis.imshow(image.T, cmap="Greys", aspect="auto", origin="lower", extent=extent)
    axis.set_xlim(begin, end)
    axis.set_ylim(0, image.shape[1])
    axis.set_ylabel("mel bin")
    axis.set_xlabel("time (s)")
    places = middles(item["columns"], item["seconds"])
    last = end >= item["seconds"] - 1e-9
    shown = [i for i, x in enumerate(places) if begin <= x < end or (last and x >= end)]
    texts = [item["columns"][i] for i in shown]
    letter = 0.62 * FONT / 72 / (0.9 * INCHES) * length  # seconds that a letter takes
    widths = [
        letter * (1.5 + max(len(str(c["reference"] or GONE)), len(str(c["hypothesis"] or GONE))))
        for c in texts
    ]
    centres = apart([places[i] for i in shown], widths, begin, end)
    for column, x in zip(texts, centres, strict=True):
        colour = kind_of(column)
        frame = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": colour, "lw": 1.0}
        wrong = colour != RIGHT
        for name, y in (("reference", 1.2), ("hypothesis", 1.08)):
            axis.text(
                x,
                y,
                GONE if column[name] is None else str(column[name]).replace(" ", "␣"),
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="center",
                fontsize=FONT,
                color=colour,
                fontweight="bold" if wrong else "normal",
                bbox=frame if wrong else None,
            )
        if column["span"] is not None:
            top = image.shape[1]
            axis.plot(column["span"], [0.965 * top] * 2, color=colour, lw=4, solid_capstyle="butt")
            axis.plot(
                [x, min(sum(column["span"]) / 2, end)],
                [top, 0.98 * top],
                color=colour,
                lw=0.7,
                clip_on=False,
            )


def middles(columns: Sequence[Mapping[str, Any]], seconds: float) -> list[float]:
    """Returns the time of each column: the middle of its span, or between its neighbours' spans."""
    spans = [column["span"] for column in columns]
    found = []
    for i, span in enumerate(spans):
        if span is not None:
            found.append(sum(span) / 2)
            continue
        before = next((k for k in range(i - 1, -1, -1) if spans[k] is not None), None)
        after = next((k for k in range(i + 1, len(spans)) if spans[k] is not None), None)
        low = 0.0 if before is None else spans[before][1]
        high = seconds if after is None else spans[after][0]
        first = 0 if before is None else before + 1
        gone = (len(spans) if after is None else after) - first
        found.append(low + (high - low) * (i - first + 1) / (gone + 1))
    return found


def apart(
    centres: Sequence[float], widths: Sequence[float], low: float, high: float
) -> list[float]:
    """Moves centres apart, so that texts of these widths do not overlap, within [low, high] if
    there is room."""
    found = list(centres)
    for i in range(len(found)):
        least = low + widths[i] / 2 if i == 0 else found[i - 1] + (widths[i - 1] + widths[i]) / 2
        found[i] = max(found[i], least)
    for i in reversed(range(len(found))):
        last = i == len(found) - 1
        most = high - widths[i] / 2 if last else found[i + 1] - (widths[i] + widths[i + 1]) / 2
        found[i] = min(found[i], most)
    return found
