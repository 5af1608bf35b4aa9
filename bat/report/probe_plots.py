"""Plots comparisons of encoders: ranking of probes, and results and gates by block.

As in ``plots.py``, functions take plain numbers and a path, write one PNG and return the path.
Metrics are fractions and drawn in percent; blocks count from 1. Names come from users' files: they
are shortened in the middle, and a ``$`` in them does not start a formula.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bat.report.plots import COLOURS, MARKERS, figure, short

GREY = "#8a8a8a"
GREYS = (GREY, "#4d4d4d", "#b4b4b4")
THICK: Any = {"lw": 3.4, "alpha": 0.45, "solid_capstyle": "butt"}
CONTROLS = ("random",)
"""Random-init baselines that encoders are compared with."""


@contextmanager
def plain_figure(path: Path, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[Any]:
    """``plots.figure`` without mathtext in names."""
    import matplotlib

    with (
        matplotlib.rc_context({"text.parse_math": False}),
        figure(path, rows, columns, **settings) as found,
    ):
        yield found


def looks(names: Iterable[str], controls: Collection[str] = CONTROLS) -> dict[str, dict[str, Any]]:
    """Returns colour and marker of each encoder, the same in all plots; baselines are grey."""
    found: dict[str, dict[str, Any]] = {}
    i = hollow = 0
    for name in names:
        if name in controls:
            look = {"color": GREYS[hollow % 3], "marker": MARKERS[(hollow + hollow // 21) % 7]}
            found[name] = {**look, "markerfacecolor": "white"}
            hollow += 1
        else:
            found[name] = {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7]}
            i += 1
    return found


def blocks(axis: Any, L: int, *, label: bool = True) -> None:
    """Draws block numbers below ``axis``."""
    axis.set_xticks(range(L, 0, -1 if L <= 16 else -2))
    axis.set_xlim(0.5, L + 0.5)
    if label:
        axis.set_xlabel("block of the encoder")


def from_zero(axis: Any) -> None:
    """Sets the vertical axis from 0 to slightly above the data."""
    top = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1)


def rectangle(x: float, y: float, width: float, height: float, *, color: str, lw: float) -> Any:
    """Returns a frame (an unfilled rectangle)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor=color, lw=lw, clip_on=False)


def plot_layer_curve(
    curves: Mapping[str, Mapping[str, ArrayLike | None]],
    path: str | Path,
    *,
    metric: str,
    chance: float | None = None,
    controls: Collection[str] = CONTROLS,
    lower: bool = False,
    title: str = "Layer curve: a linear probe on every block alone",
) -> Path:
    """Plots a metric by block, one line per encoder, with a band of one standard deviation.

    ``curves``: encoder -> ``{"mean": (L,), "std": (L,) | None}``; ``chance``: drawn if given;
    ``lower``: True if lower is better.
    """
    path = Path(path)
    with plain_figure(path, figsize=(8.6, 4.4)) as (_, axes):
        axis = axes[0, 0]
        for name, look in looks(curves, controls).items():
            curve = curves[name]
            y = 100 * np.asarray(curve["mean"], dtype=float)
            x = np.arange(1, len(y) + 1)
            if curve.get("std") is not None:
                band = 100 * np.nan_to_num(np.asarray(curve["std"], dtype=float))
                ends = np.clip([y - band, y + band], 0, None if lower else 100)
                axis.fill_between(x, *ends, color=look["color"], alpha=0.15, lw=0)
            at = int(y.argmin() if lower else y.argmax())
            best = f"best {y[at]:.1f} %, block {at + 1}"
            axis.plot(x, y, label=f"{short(name)}\n{best}", lw=1.8, ms=5, **look)
        if chance is not None:
            axis.axhline(100 * chance, color="#777777", lw=1, ls=":", label="chance")
        blocks(axis, max((len(np.asarray(c["mean"])) for c in curves.values()), default=1))
        axis.set_ylabel(f"{metric} (%)")
        axis.set_title(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path


def plot_gates_heat(
    gates: Mapping[str, ArrayLike], path: str | Path, *, title: str = "Layer gate by block"
) -> Path:
    """Plots each row's gate as a line of cells, in percent; rows may have different depths.

    ``gates``: name (an encoder, a method, a seed) -> (L,), or (n, L) over folds and seeds, of which
    the mean is drawn. The cell of a row's largest weight is framed.
    """
    path = Path(path)
    rows = [np.atleast_2d(np.asarray(g, dtype=float)).mean(0) for g in gates.values()]
    L = max((len(row) for row in rows), default=1)
    table = np.full((max(1, len(rows)), L), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = 100 * row
    top = np.nanmax(table) if np.isfinite(table).any() else 100.0
    inches = (min(14.0, 3.4 + 0.52 * L), 1.5 + 0.42 * len(table))
    with plain_figure(path, figsize=inches) as (fig, axes):
        axis = axes[0, 0]
        axis.grid(False)
        where = {"aspect": "auto", "extent": (0.5, L + 0.5, len(table) - 0.5, -0.5)}
        picture = axis.imshow(table, cmap="Blues", vmin=0, vmax=top, **where)
        for i, row in enumerate(rows):
            for block, weight in enumerate(100 * row, start=1):
                axis.text(block, i, f"{weight:.0f}", ha="center", va="center", fontsize=8.5,
                          color="white" if weight > 0.6 * top else "#222222")  # fmt: skip
            frame = (int(row.argmax()) + 0.5, i - 0.5)
            axis.add_patch(rectangle(*frame, 1, 1, color=COLOURS[1], lw=1.8))
        axis.set_yticks(range(len(rows)), [short(name) for name in gates])
        axis.tick_params(length=0)
        blocks(axis, L)
        axis.set_title(title)
        fig.colorbar(picture, ax=axis, label="weight (%)", pad=0.01)
    return path


def plot_comparison(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    metric: str,
    std_over: str = "seeds",
    confidence: float = 0.95,
    chance: float | None = None,
    controls: Collection[str] = CONTROLS,
    finetuned: Mapping[str, float] | None = None,
    lower: bool = False,
    title: str = "Probes and encoders",
) -> Path:
    """Plots one row per method, the best first, with one dot per encoder.

    ``results``: encoder -> method -> ``{"mean", "std", "interval": (lo, hi) | None}``. A thick line
    is one standard deviation over ``std_over`` (``none``: not drawn), a thin one the confidence
    interval at ``confidence``. ``controls``: encoders drawn in grey, which do not count for the
    order; ``finetuned``: an encoder's fine-tuned result, as a line; ``lower``: True if lower is
    better.
    """
    path = Path(path)
    sign, top = (-1, None) if lower else (1, 100)  # an error rate may be above 100 %
    best: dict[str, float] = {}
    for name, methods in results.items():
        for method, row in methods.items():
            if name not in controls or set(results) <= set(controls):
                best[method] = max(best.get(method, -np.inf), sign * row["mean"])
            best.setdefault(method, -np.inf)
    order = sorted(best, key=lambda method: -best[method])
    n = max(1, len(results))
    inches = (9.6, 1.6 + max(2, len(order)) * max(0.3, 0.13 * n + 0.08))
    with plain_figure(path, figsize=inches) as (_, axes):
        axis = axes[0, 0]
        axis.grid(False, axis="y")
        spread = interval = False
        for i, (name, look) in enumerate(looks(results, controls).items()):
            methods, colour = results[name], look["color"]
            have = [method for method in order if method in methods]
            y = np.array([order.index(method) for method in have]) + (i - (n - 1) / 2) * 0.7 / n
            x = 100 * np.array([methods[method]["mean"] for method in have])
            for at, middle, method in zip(y, x, have, strict=True):
                found = methods[method]
                if found.get("interval"):
                    interval = True
                    ends = np.clip(100 * np.array(found["interval"]), 0, top)
                    axis.plot(ends, [at, at], color=colour, lw=1)
                if found.get("std") and std_over != "none":
                    spread = True
                    ends = np.clip(np.array([-1, 1]) * 100 * found["std"] + middle, 0, top)
                    axis.plot(ends, [at, at], color=colour, **THICK)
            label = short(name) + (" (control)" if name in controls else "")
            axis.plot(x, y, ls="", ms=6, label=label, **look)
            if name in (finetuned or {}):
                axis.axvline(100 * (finetuned or {})[name], color=colour, lw=1.2, ls="--",
                             label=f"{short(name)}, fine-tuned")  # fmt: skip
        if chance is not None:
            axis.axvline(100 * chance, color="#777777", lw=1, ls=":", label="chance")
        if spread:
            axis.plot([], [], color=GREY, label=f"± std over {std_over}", **THICK)
        if interval:
            axis.plot([], [], color=GREY, lw=1, label=f"{100 * confidence:g} % interval")
        for at in range(0, len(order), 2):
            axis.axhspan(at - 0.5, at + 0.5, color="#f4f4f4", zorder=0, lw=0)
        axis.set_yticks(range(len(order)), [short(method) for method in order])
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.set_xlabel(f"{metric} (%)")
        axis.set_title(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path
