"""Plots of a run: masks, curves, layer gates, probe results. Also the style of all plots.

Every function takes plain numbers and a path, writes one PNG and returns the path. Metrics are
fractions and drawn in percent. Matplotlib is imported with its file-only backend when the first
plot is drawn. Colours are Okabe and Ito's, which colour-blind readers can distinguish; series also
differ in marker or hatch. Names come from users' files: long ones are shortened, and a ``$`` in
them does not start a formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bat.types import Grid

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NAME = 30
"""Maximum length of a name in a legend or a row."""
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "font.size": 10,
    "savefig.dpi": 150,
    "text.parse_math": False,
}


@contextmanager
def figure(
    path: str | Path, rows: int = 1, columns: int = 1, *, figsize: Any = None, **settings: Any
) -> Iterator[Any]:
    """Yields a figure and its (rows, columns) axes, a single one as it is; then writes the PNG.

    Without pyplot, so a notebook keeps its backend.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=figsize, layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False, **settings)
        yield fig, axes if axes.size > 1 else axes[0, 0]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path)


def legend(axis: Any, **settings: Any) -> None:
    """Draws the legend to the right of ``axis``."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), **settings)


def mark_chance(line: Any, chance: float | None) -> None:
    """Draws chance level by ``line`` (``axis.axhline`` or ``axis.axvline``), unless it is None."""
    if chance is not None:
        line(100 * chance, color="#777777", lw=1, ls=":", label="chance")


def line_with_band(
    axis: Any, x: Any, y: np.ndarray, std: np.ndarray, *, top: float | None = 100, **style: Any
) -> None:
    """Draws a line and a band of one standard deviation, which ends at 0 and ``top``."""
    ends = np.clip([y - std, y + std], 0, top)
    axis.fill_between(x, *ends, color=style["color"], alpha=0.16, lw=0)
    axis.plot(x, y, **style)


def from_zero(axis: Any) -> None:
    """Sets the vertical axis from 0 to slightly above the data."""
    top = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1)


def block_axis(axis: Any, L: int) -> None:
    """Labels the horizontal axis with the blocks of an encoder, counted from 1."""
    axis.set_xticks(range(L, 0, -1 if L <= 16 else -2))
    axis.set_xlim(0.5, L + 0.5)
    axis.set_xlabel("block of the encoder")


def frame(axis: Any, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """Draws a rectangle that may reach beyond the axis."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), width, height, fill=False, clip_on=False, **style))


def short(name: str, most: int = NAME) -> str:
    """Shortens a line to at most ``most`` characters by omitting the middle."""
    name = " ".join(str(name).split())
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def chance_of(metric: str, classes: int) -> float | None:
    """Returns chance level: 1 / classes for accuracy, 0.5 for AUROC; None if it depends on data."""
    return {"accuracy": 1 / max(1, classes), "auroc": 0.5}.get(metric)


def plot_masks(
    spectrograms: ArrayLike,
    masks: ArrayLike,
    path: str | Path,
    *,
    grid: Grid,
    hop_ms: float = 10.0,
    names: Sequence[str] = (),
    clips: int = 4,
) -> Path:
    """Plots the first few spectrograms, whole and without their masked patches.

    ``spectrograms`` (n, frames, mels) or (n, 1, frames, mels); ``masks`` (n, N) True for removed
    patches, N = ``grid.tokens``, time-major; ``hop_ms`` between frames.
    """
    images = np.asarray(spectrograms, dtype=np.float32)
    images = images.reshape(-1, *images.shape[-2:])[:clips]  # (n, frames, mels)
    n, frames, mels = images.shape
    hidden = np.asarray(masks, dtype=bool).reshape(-1, grid.time, grid.freq)[:n]
    patch = np.ones((frames // grid.time, mels // grid.freq), dtype=bool)
    extent = (0.0, frames * hop_ms / 1000, 0.0, float(mels))
    with figure(path, n, 2, figsize=(10, 0.6 + 1.75 * n), sharex=True, sharey=True) as (fig, axes):
        for row, (image, mask) in enumerate(zip(images, hidden, strict=True)):
            seen = np.where(np.kron(mask, patch), np.nan, image)  # (frames, mels)
            for axis, shown in zip(axes[row], (image, seen), strict=True):
                axis.grid(False)
                axis.set_facecolor("#d4d4d4")
                picture = axis.imshow(shown.T, cmap="magma", vmin=images.min(), vmax=images.max(),
                                      extent=extent, aspect="auto", origin="lower")  # fmt: skip
            axes[row, 0].set_ylabel("mel bin")
            name = short(names[row], 42) if row < len(names) else f"clip {row + 1}"
            axes[row, 0].set_title(name)
            kept = int((~mask).sum())
            axes[row, 1].set_title(f"what the student sees: {kept} of {grid.tokens} patches")
        for axis in axes[-1]:
            axis.set_xlabel("time (s)")
            axis.xaxis.get_major_locator().set_params(nbins=8, prune="upper")  # gap to the next
        fig.colorbar(picture, ax=axes, label="log-mel", shrink=min(1.0, 1.6 / n), pad=0.01)
    return Path(path)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots losses and learning rate over optimiser steps, from the rows of ``metrics.jsonl``.

    All numeric keys that name a loss (``loss``, ``loss_local``, ``train/loss`` ...) and ``lr`` are
    drawn; rows without ``step`` are omitted.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(row.get("step"), int | float) and type(value) in (int, float):
                series.setdefault(key, []).append((row["step"], value))
    losses = sorted(key for key in series if "loss" in key.lower())
    rates = sorted(key for key in series if key.split("/")[-1] in ("lr", "learning_rate"))
    settings = {"figsize": (8, 5.4), "sharex": True, "height_ratios": (3, 1.2)}
    with figure(path, 2, 1, **settings) as (_, axes):
        top, bottom = axes[:, 0]
        for axis, keys in ((top, losses), (bottom, rates)):
            for i, key in enumerate(keys):
                x, y = np.array(series[key], dtype=float).T
                points = {"marker": MARKERS[i % 7], "ms": 4} if len(x) <= 30 else {}
                axis.plot(x, y, color=COLOURS[i % 7], label=key, lw=1.6, **points)
        top.set_title("Training loss")
        top.set_ylabel("loss")
        if len(losses) > 1:
            top.legend()
        bottom.set_title("Learning rate")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("optimiser step")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        from_zero(bottom)
    return Path(path)


def plot_series(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | Path,
    *,
    baseline: bool = False,
) -> Path:
    """Plots panels below each other over the same steps: title -> name of a line -> (step, value).

    ``baseline``: each line's value at step 0 is dashed, and the axis begins at zero.
    Lines without values and panels without lines are omitted. A name has one colour in all panels,
    and ``NAME: MORE`` has that of ``NAME``.
    """
    some = {title: {n: xy for n, xy in lines.items() if xy} for title, lines in panels.items()}
    some = {title: lines for title, lines in some.items() if lines}
    names = list(dict.fromkeys(name for lines in some.values() for name in lines))
    heads = list(dict.fromkeys(name.partition(": ")[0] for name in names))
    n = max(1, len(some))
    with figure(path, n, 1, figsize=(9, 0.6 + 2.1 * n), sharex=True) as (_, axes):
        column = np.ravel(axes)
        for axis, (title, lines) in zip(column, some.items(), strict=False):
            for name, points in lines.items():
                x, y = np.array(points, dtype=float).T
                i, colour = names.index(name), heads.index(name.partition(": ")[0]) % 7
                style: Any = {"marker": MARKERS[i % 7], "ms": 3.5} if len(x) <= 30 else {}
                dash = "-" if i < 7 else "--"
                label = short(name)
                if baseline and x[0] == 0:
                    axis.axhline(y[0], color=COLOURS[colour], lw=1.0, ls="--")
                    label += f": {y[0]:.3g} at step 0, {y[-1]:.3g}"
                axis.plot(x, y, dash, color=COLOURS[colour], lw=1.5, label=label, **style)
            axis.set_title(title)
            if baseline:
                from_zero(axis)
            if len(lines) > 1 or baseline:
                legend(axis)
        column[-1].set_xlabel("optimiser step")
    return Path(path)


def plot_layer_gates(
    gates: Mapping[str, ArrayLike], path: str | Path, *, over: str = "folds"
) -> Path:
    """Plots each row's layer gate as a line of cells, in percent; rows may differ in depth.

    ``gates``: name (an encoder, a method) -> (L,), or (n, L), of which mean and standard deviation
    are shown. ``over``: name of the n, ``trainings`` if they are not all of different folds. The
    cell of a row's largest weight is framed.
    """
    rows = [100 * np.atleast_2d(np.asarray(gate, dtype=float)) for gate in gates.values()]
    L = max(row.shape[1] for row in rows)
    table = np.full((len(rows), L), np.nan)
    for i, row in enumerate(rows):
        table[i, : row.shape[1]] = row.mean(0)
    repeated = any(len(row) > 1 for row in rows)
    top = np.nanmax(table)
    inches = (min(14.0, 3.4 + 0.52 * L), 1.5 + (0.55 if repeated else 0.42) * len(rows))
    with figure(path, figsize=inches) as (fig, axis):
        axis.grid(False)
        extent = (0.5, L + 0.5, len(rows) - 0.5, -0.5)
        picture = axis.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto", extent=extent)
        for i, row in enumerate(rows):
            for block, (weight, std) in enumerate(zip(row.mean(0), row.std(0), strict=True), 1):
                text = f"{weight:.0f}" + (f"\n±{std:.0f}" if len(row) > 1 else "")
                axis.text(block, i, text, ha="center", va="center", fontsize=8.5,
                          color="white" if weight > 0.6 * top else "#222222")  # fmt: skip
            largest = int(row.mean(0).argmax())
            frame(axis, largest + 0.5, i - 0.5, 1, 1, edgecolor=COLOURS[1], lw=1.8)
        axis.set_yticks(range(len(rows)), [short(name) for name in gates])
        axis.tick_params(length=0)
        block_axis(axis, L)
        spread = f", mean ± std over {over}" if repeated else ""
        axis.set_title(f"Layer gate by block{spread}")
        fig.colorbar(picture, ax=axis, label="weight (%)", pad=0.01)
    return Path(path)


def plot_folds(
    folds: Mapping[str, Mapping[Any, float]],
    path: str | Path,
    *,
    metric: str,
    chance: float | None = None,
    title: str = "",
) -> Path:
    """Plots bars of a metric by held-out fold, one group per method, with the mean.

    At most as many methods as there are colours. ``chance``: drawn dotted if given.
    """
    assert len(folds) <= len(COLOURS), len(folds)
    names = sorted({str(fold) for scores in folds.values() for fold in scores}, key=_numbers_first)
    n = max(1, len(folds))
    width, inches = 0.8 / n, min(12.0, max(6.5, 4 + 0.4 * len(names) * n))
    with figure(path, figsize=(inches, 3.8)) as (_, axis):
        for i, (method, scores) in enumerate(folds.items()):
            x = np.array([names.index(str(fold)) for fold in scores]) + (i - (n - 1) / 2) * width
            y = 100 * np.array(list(scores.values()))
            spread = f" ± {y.std():.1f}" if len(y) > 1 else ""
            label = f"{method}: {y.mean():.1f}{spread} %"
            axis.bar(x, y, 0.92 * width, color=COLOURS[i], label=label)
            axis.axhline(y.mean(), color=COLOURS[i], lw=1.2, ls="--")
        shown = [short(name, 24) for name in names]
        axis.set_xticks(range(len(names)), shown)
        if sum(len(name) + 2 for name in shown) > 9 * inches:  # they would touch
            axis.tick_params(axis="x", rotation=90)
        mark_chance(axis.axhline, chance)
        axis.grid(False, axis="x")
        axis.set_xlabel("held-out fold")
        axis.set_ylabel(f"{metric} (%)")
        axis.set_title(title or f"{metric[:1].upper()}{metric[1:]} by held-out fold")
        axis.set_ylim(0, max(100, 1.05 * axis.dataLim.y1))  # an error rate may be above 100 %
        over = f"mean ± std over {len(names)} folds" if len(names) > 1 else None
        legend(axis, title=over, alignment="left")
    return Path(path)


def plot_probe_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str = "accuracy",
    chance: float | None = None,
) -> Path:
    """Plots probe results over pre-training steps; the random-init baseline is dashed.

    ``rows``: mappings with ``step``, ``method``, ``metric`` and, if there are folds,
    ``{metric}_std``: mean line and band. Step 0 is the same encoder with random weights.
    ``chance``: drawn dotted if given.
    """
    with figure(path, figsize=(8, 4.4)) as (_, axis):
        for i, method in enumerate(sorted({r["method"] for r in rows})):
            own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["step"])
            x = [r["step"] for r in own]
            y = 100 * np.array([r[metric] for r in own], dtype=float)
            std = 100 * np.array([r.get(f"{metric}_std") or 0.0 for r in own], dtype=float)
            style: Any = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "lw": 2, "ms": 5}
            if x[0] == 0:
                label = f"{method} at step 0 ({y[0]:.1f} %)"
                axis.axhline(y[0], color=style["color"], lw=1.2, ls="--", label=label)
            line_with_band(axis, x, y, std, label=f"{method} (last {y[-1]:.1f} %)", **style)
        mark_chance(axis.axhline, chance)
        axis.set_xlabel("pre-training step")
        axis.set_ylabel(f"{metric} on held-out folds (%)")
        axis.set_title("Probe results along pre-training")
        legend(axis)
    return Path(path)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    """Sort key that puts 2 before 10, and numbers before names."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
