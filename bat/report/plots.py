"""Plots of a run: masks, curves, layer gates, probe accuracy.

Every function takes plain numbers and a path, writes one PNG and returns the path. Matplotlib is
imported with its file-only backend when the first plot is drawn. Colours are Okabe and Ito's,
which colour-blind readers can distinguish; series also differ in marker or hatch.
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
}


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[Any]:
    """Yields a figure and its axes, which is written to ``path`` and closed at the end."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, layout="constrained", squeeze=False, **settings)
        try:
            yield fig, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path)
        finally:
            plt.close(fig)


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
    """Plots the first few spectrograms, whole and with their masked patches shaded.

    ``spectrograms`` (n, frames, mels) or (n, 1, frames, mels); ``masks`` (n, N) True for removed
    patches, N = ``grid.tokens``, time-major; ``hop_ms`` between frames.
    """
    path = Path(path)
    images = np.asarray(spectrograms, dtype=np.float32)
    images = images.reshape(-1, *images.shape[-2:])[:clips]  # (n, frames, mels)
    hidden = np.asarray(masks, dtype=bool).reshape(-1, grid.time, grid.freq)[: len(images)]
    n, frames, mels = images.shape
    side_t, side_f = frames // grid.time, mels // grid.freq
    seconds = frames * hop_ms / 1000
    where = {"extent": (0.0, seconds, 0.0, float(mels)), "aspect": "auto", "origin": "lower"}
    with figure(path, n, 2, figsize=(10, 0.6 + 1.75 * n), sharex=True, sharey=True) as (fig, axes):
        for row in range(n):
            left, right = axes[row]
            for axis in (left, right):
                axis.grid(False)
                picture = axis.imshow(
                    images[row].T, cmap="magma", vmin=images.min(), vmax=images.max(), **where
                )
            cover = np.kron(hidden[row], np.ones((side_t, side_f)))  # (frames, mels)
            veil = np.zeros((mels, frames, 4), dtype=np.float32)
            veil[..., :3] = 0.82
            veil[..., 3] = 0.93 * cover.T
            right.imshow(veil, interpolation="nearest", **where)
            left.set_ylabel("mel bin")
            left.set_title(short(names[row], 42) if row < len(names) else f"clip {row + 1}")
            kept = int((~hidden[row]).sum())
            right.set_title(f"what the student sees: {kept} of {grid.tokens} patches")
        for axis in axes[-1]:
            axis.set_xlabel("time (s)")
            axis.xaxis.get_major_locator().set_params(nbins=8, prune="upper")  # gap to the next
        fig.colorbar(picture, ax=axes, label="log-mel", shrink=min(1.0, 1.6 / n), pad=0.01)
    return path


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots losses and learning rate over optimiser steps, from the rows of ``metrics.jsonl``.

    All numeric keys that name a loss (``loss``, ``loss_local``, ``train/loss`` ...) and ``lr`` are
    drawn; rows without ``step`` are omitted.
    """
    path = Path(path)
    rows = [r for r in rows if isinstance(r.get("step"), int | float)]
    losses = sorted({k for r in rows for k in r if "loss" in k.lower() and _is_number(r[k])})
    rates = sorted({k for r in rows for k in r if _is_rate(k) and _is_number(r[k])})
    settings = {"figsize": (8, 5.4), "sharex": True, "height_ratios": (3, 1.2)}
    with figure(path, 2, 1, **settings) as (_, axes):
        top, bottom = axes[:, 0]
        for i, key in enumerate(losses):
            x, y = _series(rows, key)
            top.plot(x, y, color=COLOURS[i % 7], label=key, lw=1.6, **_points(x, i))
        top.set_title("Training loss")
        top.set_ylabel("loss")
        if len(losses) > 1:
            top.legend()
        for i, key in enumerate(rates):
            x, y = _series(rows, key)
            bottom.plot(x, y, color=COLOURS[i % 7], lw=1.6, **_points(x, i))
        bottom.set_title("Learning rate")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("optimiser step")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        _from_zero(bottom)
    return path


def plot_layer_gates(
    gates: Mapping[str, ArrayLike], path: str | Path, *, over: str = "folds"
) -> Path:
    """Plots each block's weight in the layer gate as bars.

    ``gates``: name -> (L,), or (n, L), of which the mean is drawn and the standard deviation as a
    line. ``over``: label of the n, ``trainings`` if they are not all of different folds.
    """
    path = Path(path)
    tables = {name: np.atleast_2d(np.asarray(gate, dtype=float)) for name, gate in gates.items()}
    L = max((t.shape[1] for t in tables.values()), default=1)
    inches = min(13.0, max(7.5, 4.5 + 0.4 * L * max(1, len(tables)) ** 0.5))
    with figure(path, figsize=(inches, 3.8)) as (_, axes):
        axis = axes[0, 0]
        width = 0.8 / max(1, len(tables))
        for i, (name, table) in enumerate(tables.items()):
            x = np.arange(1, table.shape[1] + 1) + (i - (len(tables) - 1) / 2) * width
            spread = table.std(0) if len(table) > 1 else None
            label = name if spread is None else f"{name}, mean ± std\nof {len(table)} {over}"
            mean = table.mean(0)
            ends = None if spread is None else np.minimum(spread, [mean, 1 - mean])  # within [0, 1]
            axis.bar(x, mean, 0.92 * width, yerr=ends, color=COLOURS[i % 7], label=label,
                     capsize=2.5, error_kw={"lw": 1.1, "ecolor": "#333333"})  # fmt: skip
        axis.axhline(1 / L, color="#555555", lw=1.1, ls="--", label=f"uniform, 1/{L}")
        axis.set_xticks(range(1, L + 1))
        axis.grid(False, axis="x")
        axis.set_xlabel("block of the encoder")
        axis.set_ylabel(r"gate weight $\alpha$")
        axis.set_title("Layer gate: the blocks the probe listens to")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _from_zero(axis)
    return path


def plot_folds(
    folds: Mapping[str, Mapping[Any, float]],
    path: str | Path,
    *,
    metric: str,
    chance: float | None = None,
    title: str = "",
) -> Path:
    """Plots bars of a metric (a fraction) by held-out fold, one group per method, with the mean.

    At most as many methods as there are colours. ``chance``: drawn dotted if given.
    """
    assert len(folds) <= len(COLOURS), len(folds)
    path = Path(path)
    names = sorted({fold for scores in folds.values() for fold in scores}, key=_numbers_first)
    inches = min(12.0, max(6.5, 4 + 0.4 * len(names) * max(1, len(folds))))
    with figure(path, figsize=(inches, 3.8)) as (_, axes):
        axis = axes[0, 0]
        width = 0.8 / max(1, len(folds))
        for i, (method, scores) in enumerate(folds.items()):
            offset = (i - (len(folds) - 1) / 2) * width
            x = np.array([names.index(fold) for fold in scores]) + offset
            y = 100 * np.array(list(scores.values()))
            spread = f" ± {y.std():.1f}" if len(y) > 1 else ""
            axis.bar(x, y, 0.92 * width, color=COLOURS[i],
                     label=f"{method}: {y.mean():.1f}{spread} %")  # fmt: skip
            axis.axhline(y.mean(), color=COLOURS[i], lw=1.2, ls="--")
        shown = [short(str(n), 24) for n in names]
        axis.set_xticks(range(len(names)), shown)
        if sum(len(n) + 2 for n in shown) > 9 * inches:  # bars would touch
            axis.tick_params(axis="x", rotation=90)
        if chance is not None:
            axis.axhline(100 * chance, color="#777777", lw=1, ls=":", label="chance")
        axis.grid(False, axis="x")
        axis.set_xlabel("held-out fold")
        axis.set_ylabel(f"{metric} (%)")
        axis.set_title(title or f"{metric[:1].upper()}{metric[1:]} by held-out fold")
        axis.set_ylim(0, max(100, 1.05 * axis.dataLim.y1))  # an error rate may be above 100 %
        said = f"mean ± std over {len(names)} folds" if len(names) > 1 else None
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=said, alignment="left")
    return path


def plot_probe_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str = "accuracy",
    chance: float | None = None,
    title: str = "Probe accuracy along pre-training",
) -> Path:
    """Plots probe results over pre-training steps; the random-init baseline is dashed.

    ``rows``: mappings with ``step``, ``method``, ``metric`` (a fraction) and, if there are
    folds, ``{metric}_std``: mean line and band. Step 0 is the same encoder with random weights.
    ``chance``: drawn dotted if given.
    """
    path = Path(path)
    methods = sorted({r["method"] for r in rows})
    with figure(path, figsize=(8, 4.4)) as (_, axes):
        axis = axes[0, 0]
        for i, method in enumerate(methods):
            own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["step"])
            x = np.array([r["step"] for r in own], dtype=float)
            y = 100 * np.array([r[metric] for r in own], dtype=float)
            band = 100 * np.array([r.get(f"{metric}_std") or 0.0 for r in own], dtype=float)
            colour = COLOURS[i % 7]
            if x[0] == 0:
                axis.axhline(y[0], color=colour, lw=1.2, ls="--",
                             label=f"{method}, random weights ({y[0]:.1f} %)")  # fmt: skip
            ends = np.clip([y - band, y + band], 0, 100)
            axis.fill_between(x, *ends, color=colour, alpha=0.16, lw=0)
            axis.plot(x, y, color=colour, lw=2, marker=MARKERS[i % 7], ms=5,
                      label=f"{method} (last {y[-1]:.1f} %)")  # fmt: skip
        if chance is not None:
            axis.axhline(100 * chance, color="#777777", lw=1, ls=":", label="chance")
        axis.set_xlabel("pre-training step")
        axis.set_ylabel(f"{metric} on held-out folds (%)")
        axis.set_title(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers_first(fold: Any) -> tuple[bool, int, str]:
    """Sort key that puts 2 before 10, also for strings."""
    name = str(fold)
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def _is_rate(key: str) -> bool:
    return key.split("/")[-1] in ("lr", "learning_rate")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    own = [(r["step"], r[key]) for r in rows if key in r and _is_number(r[key])]
    return np.array([s for s, _ in own], dtype=float), np.array([v for _, v in own], dtype=float)


def _points(x: np.ndarray, i: int) -> dict[str, Any]:
    """Returns the marker settings of a line with few points."""
    return {"marker": MARKERS[i % 7], "ms": 4} if len(x) <= 30 else {}


def _from_zero(axis: Any) -> None:
    top = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1)
