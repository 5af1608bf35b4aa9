"""Plots the distribution of a data set's labels, lengths, sample rates, splits and folds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bat.report.plots import COLOURS, figure, short

NAMED = 30
"""Maximum number of classes drawn as named bars; more are drawn as a curve over their rank."""
BARS = 12
"""Maximum number of bars in the other panels; the largest are drawn."""


def plot_data(
    path: str | Path,
    *,
    title: str,
    classes: Mapping[str, int],
    seconds: ArrayLike,
    rates: Mapping[str, int],
    codecs: Mapping[str, int],
    splits: Mapping[str, int],
    folds: Mapping[str, int],
    labels_per_clip: Mapping[int, int],
) -> Path:
    """Plots six panels: clips per class and length, labels per clip; rates, codecs, splits, folds.

    Args:
        classes: number of clips of each class.
        seconds: (n,) length of each clip; NaN for unknown.
        rates, codecs, splits, folds, labels_per_clip: number of clips of each value.
    """
    with figure(path, 2, 3, figsize=(14, 8.2)) as (fig, axes):
        fig.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        _classes(axes[0, 0], classes)
        _lengths(axes[0, 1], np.asarray(seconds, dtype=np.float64))
        labels = {str(n): labels_per_clip[n] for n in sorted(labels_per_clip)}
        hertz = {f"{int(r):,}": rates[r] for r in sorted(rates, key=int)}
        parts = {**splits, **{f"fold {f}": folds[f] for f in sorted(folds, key=int)}}
        _bars(axes[0, 2], labels, "Labels per clip", "labels")
        _bars(axes[1, 0], hertz, "Sample rates", "Hz")
        _bars(axes[1, 1], dict(sorted(codecs.items())), "Codecs", "file suffix")
        _bars(axes[1, 2], parts, "Splits and folds", "")
    return Path(path)


def _classes(axis: Any, classes: Mapping[str, int]) -> None:
    order = sorted(classes.items(), key=lambda pair: -pair[1])
    counts = np.array([n for _, n in order])
    axis.set_title(f"Clips per class ({len(order)} classes)")
    if not counts.sum():
        _empty(axis, "no labels")
        return
    uneven = counts.max() > 30 * max(1, counts.min())
    if len(order) <= NAMED:
        axis.barh(range(len(order)), counts, color=COLOURS[0])
        axis.set_yticks(range(len(order)), [short(name, 22) for name, _ in order],
                        fontsize=9 if len(order) <= 16 else 7)  # fmt: skip
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlabel("clips")
        axis.set_xscale("log" if uneven else "linear")
        _plain_ticks(axis.xaxis)
        return
    rank, shown = np.arange(1, len(order) + 1), np.maximum(counts, 0.5)
    axis.fill_between(rank, shown, 0.5, color=COLOURS[0], alpha=0.35, step="mid")
    axis.step(rank, shown, color=COLOURS[0], where="mid")
    axis.set_xlabel("class, from the most to the least frequent")
    axis.set_ylabel("clips")
    axis.set_yscale("log" if uneven else "linear")
    _plain_ticks(axis.yaxis)
    for at, ha, above in ((0, "left", 8), (len(order) - 1, "right", 24)):
        name, n = order[at]
        axis.annotate(f"{short(name, 28)}: {n:,}", (rank[at], shown[at]), (0, above),
                      textcoords="offset points", ha=ha, fontsize=8)  # fmt: skip
    axis.margins(y=0.15)
    axis.set_ylim(bottom=0.5 if uneven else 0)


def _lengths(axis: Any, seconds: np.ndarray) -> None:
    unknown, seconds = int(np.isnan(seconds).sum()), seconds[~np.isnan(seconds)]
    axis.set_title("Clips by length" + (f" ({unknown:,} unknown)" if unknown else ""))
    if not len(seconds):
        _empty(axis, "no length is known")
        return
    axis.set_xlabel("seconds")
    axis.set_ylabel("clips")
    low, high, median = float(seconds.min()), float(seconds.max()), float(np.median(seconds))
    wide = high > 50 * low > 0
    bins = np.geomspace(low, high, 41) if wide else 40
    counts = axis.hist(seconds, bins=bins, color=COLOURS[2])[0]
    if counts.max() > 50 * counts[counts > 0].min():  # else few clips are invisible
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(bottom=0.5)
    axis.set_xscale("log" if wide else "linear")
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.axvline(median, color="#333333", lw=1.1, ls="--", label=f"median {median:.3g} s")
    axis.legend(loc="best")
    axis.margins(y=0.15)


def _bars(axis: Any, counts: Mapping[str, int], title: str, xlabel: str) -> None:
    """Draws bars with their numbers on top."""
    axis.set_title(title)
    if not counts:
        _empty(axis, "none")
        return
    shown = dict(counts)
    if len(shown) > BARS:
        largest = sorted(counts, key=lambda name: -counts[name])[:BARS]
        shown = {name: n for name, n in counts.items() if name in largest}
        axis.set_title(f"{title} (the {BARS} most frequent of {len(counts)})")
    colours = [COLOURS[4] if name.startswith("fold ") else COLOURS[1] for name in shown]
    bars = axis.bar(range(len(shown)), list(shown.values()), 0.7, color=colours)
    roomy = len(shown) <= 7
    texts = [f"{n:,}" if roomy else compact(n) for n in shown.values()]
    axis.bar_label(bars, texts, fontsize=9 if roomy else 8, padding=2)
    _plain_ticks(axis.yaxis)
    names = [short(name, 12) for name in shown]
    crowded = sum(map(len, names)) > 45
    axis.set_xticks(range(len(shown)), names, rotation=30 if crowded else 0,
                    ha="right" if crowded else "center")  # fmt: skip
    side = max(0.6, 2.0 - len(shown) / 2)  # one or two bars stay narrow
    axis.set_xlim(-side, len(shown) - 1 + side)
    axis.grid(False, axis="x")
    axis.set_xlabel(xlabel)
    axis.set_ylabel("clips")
    axis.margins(y=0.12)


def _empty(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="#777777")
    axis.set_xticks([])
    axis.set_yticks([])


def _plain_ticks(axis: Any) -> None:
    """Labels the major ticks of ``xaxis`` or ``yaxis`` by ``compact``, without formulas."""
    axis.set_major_formatter(compact)
    axis.set_minor_formatter(lambda *_: "")


def compact(number: float, _: object = None) -> str:
    """Formats counts: ``999``, ``1.5k``, ``12k``, ``1.91M``; ignores matplotlib's position."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # rounds to one of these
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
