"""Plots of detected events: reference above and prediction below the spectrogram of each clip.

Style and conventions are those of ``plots.py``. Both strips have a lane for each class that occurs
in either. Solid: an onset that matches one of the other side; pale with a dashed frame: missed
(above) or false (below).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bat.report.plots import COLOURS, figure, short

LANES = 14
"""Most classes that a clip shows: those with most events."""
THINNEST = 0.003
"""Least width of an event, of the clip's length."""


def plot_events(items: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots clips with their events.

    Each of ``items`` has ``title``, ``spectrogram`` (frames, mels), ``hop_ms`` between frames,
    ``seconds``, and ``reference`` and ``predicted``: ``(onset, offset, class name, matched)``.
    """
    lanes = [_lanes(item) for item in items]
    every = sorted({name for names in lanes for name in names})
    colours = {name: COLOURS[i % (len(COLOURS) - 1)] for i, name in enumerate(every)}
    heights = [
        size
        for names in lanes
        for size in (0.35 + 0.17 * len(names), 1.5, 0.55 + 0.17 * len(names))
    ]
    size = (12, 0.6 + sum(heights) + 0.45 * len(items))
    ratios = {"height_ratios": heights}
    with figure(path, len(heights), 1, figsize=size, gridspec_kw=ratios) as (fig, axes):
        for n, (item, names) in enumerate(zip(items, lanes, strict=True)):
            above, middle, below = np.atleast_1d(axes).flat[3 * n : 3 * n + 3]
            image = np.asarray(item["spectrogram"], dtype=float)  # (frames, mels)
            seconds = float(item["seconds"])
            extent = (0.0, len(image) * item["hop_ms"] / 1000, 0.0, float(image.shape[1]))
            middle.imshow(image.T, cmap="Greys", aspect="auto", origin="lower", extent=extent)
            middle.set_ylabel("mel bin")
            middle.grid(False)
            above.set_title(item["title"])
            for axis, side in ((above, "reference"), (below, "predicted")):
                _strip(axis, item[side], names, seconds, colours)
                axis.set_ylabel(side)
            for axis in (above, middle):
                axis.tick_params(labelbottom=False)
            for axis in (above, middle, below):
                axis.set_xlim(0, seconds)
            below.set_xlabel("time (s)")
        fig.supxlabel(
            "solid: the onset matches one of the other side; pale, dashed: missed (above) or "
            "false (below)",
            fontsize=9,
        )
    return Path(path)


def _lanes(item: Mapping[str, Any]) -> list[str]:
    """Returns the classes that are shown, sorted."""
    names = [event[2] for side in ("reference", "predicted") for event in item[side]]
    most = sorted(set(names), key=lambda name: (-names.count(name), name))[:LANES]
    return sorted(most)


def _strip(
    axis: Any,
    events: Sequence[Any],
    names: Sequence[str],
    seconds: float,
    colours: Mapping[str, str],
) -> None:
    for onset, offset, name, matched in events:
        if name not in names:
            continue
        lane, colour = names.index(name), colours[name]
        width = max(offset - onset, THINNEST * seconds)
        axis.barh(
            lane,
            width,
            left=onset,
            height=0.8,
            color=colour if matched else f"{colour}40",
            edgecolor=colour,
            linestyle="-" if matched else "--",
            linewidth=0.9,
        )
    axis.set_yticks(range(len(names)), [short(name, 24) for name in names], fontsize=8)
    axis.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axis.grid(True, axis="x")
