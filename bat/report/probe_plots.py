"""Plots of probed encoders: comparison of probes, results by block, diagnostics.

Style and conventions are those of ``plots.py``; blocks count from 1. ``baselines`` names the
random-init baselines, which are drawn in grey.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bat.report.plots import (
    COLOURS,
    MARKERS,
    block_axis,
    figure,
    frame,
    from_zero,
    legend,
    line_with_band,
    mark_chance,
    short,
)

GREYS = ("#8a8a8a", "#4d4d4d", "#b4b4b4")
THICK: Any = {"lw": 3.4, "alpha": 0.45, "solid_capstyle": "butt"}
FOR, AGAINST = "#E66100", "#3B6FD4"
"""Colours of evidence for a class and against it."""


def encoder_styles(names: Iterable[str], baselines: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns colour and marker of each encoder, the same in all plots; baselines are hollow."""
    found: dict[str, dict[str, Any]] = {}
    i = hollow = 0
    for name in names:
        if name in baselines:
            marker = MARKERS[(hollow + hollow // 21) % 7]
            found[name] = {"color": GREYS[hollow % 3], "marker": marker, "markerfacecolor": "white"}
            hollow += 1
        else:
            found[name] = {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7]}
            i += 1
    return found


def plot_layer_curve(
    curves: Mapping[str, Mapping[str, ArrayLike | None]],
    path: str | Path,
    *,
    metric: str,
    chance: float | None = None,
    baselines: Collection[str],
    lower: bool = False,
) -> Path:
    """Plots a metric by block, one line per encoder, with a band of one standard deviation.

    ``curves``: encoder -> ``{"mean": (L,), "std": (L,) | None}``; ``chance``: drawn if given;
    ``lower``: True if lower is better.
    """
    L = 1
    with figure(path, figsize=(8.6, 4.4)) as (_, axis):
        for name, style in encoder_styles(curves, baselines).items():
            y = 100 * np.asarray(curves[name]["mean"], dtype=float)
            std = curves[name].get("std")
            band = 100 * np.nan_to_num(np.asarray(0.0 if std is None else std, dtype=float))
            x = np.arange(1, len(y) + 1)
            L = max(L, len(y))
            at = int(y.argmin() if lower else y.argmax())
            label = f"{short(name)}\nbest {y[at]:.1f} %, block {at + 1}"
            top = None if lower else 100
            line_with_band(axis, x, y, band, top=top, label=label, lw=1.8, ms=5, **style)
        mark_chance(axis.axhline, chance)
        block_axis(axis, L)
        axis.set_ylabel(f"{metric} (%)")
        axis.set_title("Layer curve: a linear probe on every block alone")
        legend(axis)
    return Path(path)


def plot_comparison(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    metric: str,
    std_over: str = "seeds",
    confidence: float = 0.95,
    chance: float | None = None,
    baselines: Collection[str],
    finetuned: Mapping[str, float] | None = None,
    lower: bool = False,
) -> Path:
    """Plots one row per method, the best first, with one dot per encoder.

    ``results``: encoder -> method -> ``{"mean", "std", "interval": (lo, hi) | None}``. A thick line
    is one standard deviation over ``std_over`` (``none``: not drawn), a thin one the confidence
    interval at ``confidence``. ``baselines`` do not count for the order; ``finetuned``: an
    encoder's fine-tuned result, as a line; ``lower``: True if lower is better.
    """
    sign, top = (-1, None) if lower else (1, 100)  # an error rate may be above 100 %
    ranked = [name for name in results if name not in baselines] or list(results)
    best = dict.fromkeys((m for methods in results.values() for m in methods), -np.inf)
    for name in ranked:
        for method, found in results[name].items():
            best[method] = max(best[method], sign * found["mean"])
    order = sorted(best, key=lambda method: -best[method])
    n = max(1, len(results))
    inches = (9.6, 1.6 + max(2, len(order)) * max(0.3, 0.13 * n + 0.08))
    lines: dict[str, dict[str, Any]] = {}  # kinds that are drawn, by label
    with figure(path, figsize=inches) as (_, axis):
        axis.grid(False, axis="y")
        for i, (name, style) in enumerate(encoder_styles(results, baselines).items()):
            x, y = [], []
            for method, found in results[name].items():
                at, middle = order.index(method) + (i - (n - 1) / 2) * 0.7 / n, found["mean"]
                x.append(100 * middle)
                y.append(at)
                kinds: list[tuple[Any, str, Any]] = []
                if found.get("interval"):
                    kinds.append((found["interval"], f"{100 * confidence:g} % interval", {"lw": 1}))
                if found.get("std") and std_over != "none":
                    ends = (middle - found["std"], middle + found["std"])
                    kinds.append((ends, f"± std over {std_over}", THICK))
                for ends, label, line in kinds:
                    lines[label] = line
                    ends = np.clip(100 * np.array(ends), 0, top)
                    axis.plot(ends, [at, at], color=style["color"], **line)
            label = short(name) + (" (random init)" if name in baselines else "")
            axis.plot(x, y, ls="", ms=6, label=label, **style)
            if name in (finetuned or {}):
                axis.axvline(100 * (finetuned or {})[name], color=style["color"], lw=1.2, ls="--",
                             label=f"{short(name)}, fine-tuned")  # fmt: skip
        mark_chance(axis.axvline, chance)
        for label, line in lines.items():
            axis.plot([], [], color=GREYS[0], label=label, **line)
        for at in range(0, len(order), 2):
            axis.axhspan(at - 0.5, at + 0.5, color="#f4f4f4", zorder=0, lw=0)
        axis.set_yticks(range(len(order)), [short(method) for method in order])
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.set_xlabel(f"{metric} (%)")
        axis.set_title("Probes and encoders")
        legend(axis)
    return Path(path)


def plot_sinks(
    sinks: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    baselines: Collection[str],
) -> Path:
    """Plots the attention share of the most attended token by block, gates on and off.

    ``sinks``: encoder -> ``{"gate on": (L,), "gate off": (L,) | None, "uniform": 1 / tokens}``.
    Encoders without gates have one line.
    """
    with figure(path, figsize=(8.6, 4.4)) as (_, axis):
        for name, style in encoder_styles(sinks, baselines).items():
            on, off = sinks[name]["gate on"], sinks[name].get("gate off")
            x = range(1, len(on) + 1)
            label = f"{short(name)}, {'no gates' if off is None else 'gates as trained'}"
            axis.plot(x, 100 * np.array(on), lw=1.8, ms=5, label=label, **style)
            if off is not None:
                open_style = {**style, "markerfacecolor": "white", "ls": "--", "lw": 1.3, "ms": 5}
                axis.plot(x, 100 * np.array(off), label=f"{short(name)}, gates open", **open_style)
        for share in sorted({s["uniform"] for s in sinks.values() if s.get("uniform")}):
            label = f"even attention, 1/{round(1 / share)}"
            axis.axhline(100 * share, color="#777777", lw=1, ls=":", label=label)
        block_axis(axis, max((len(s["gate on"]) for s in sinks.values()), default=1))
        from_zero(axis)
        axis.set_ylabel("share of attention (%)")
        axis.set_title("Attention sink: share of the most attended token")
        legend(axis)
    return Path(path)


def plot_norms_ranks(
    statistics: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    baselines: Collection[str],
) -> Path:
    """Plots token norms (mean, one deviation), effective rank and spread over clips by block.

    ``statistics``: encoder -> the result of ``eval.diagnostics.encoder_statistics``. Patches are in
    the top row, class tokens, if any, in the bottom row; missing values are not drawn.
    """
    kinds = {"patches": "patches", "cls": "class token"}
    if not any(s["norms"].get("cls") for s in statistics.values()):
        del kinds["cls"]
    L = max((len(s["norms"]["patches"]) for s in statistics.values()), default=1)
    size = (13, 0.9 + 2.9 * len(kinds))
    with figure(path, len(kinds), 3, figsize=size, sharex=True) as (fig, axes):
        for row, (kind, kind_name) in zip(axes, kinds.items(), strict=True):
            for name, style in encoder_styles(statistics, baselines).items():
                style |= {"label": short(name, 40), "lw": 1.7, "ms": 4.5}
                found = statistics[name]
                norms = np.array(found["norms"].get(kind) or np.empty((0, 3)), dtype=float)
                x = np.arange(1, len(norms) + 1)
                line_with_band(row[0], x, norms[:, 0], norms[:, 1], top=None, **style)
                for axis, what in ((row[1], "rank"), (row[2], "spread")):
                    y = np.array(found.get(what, {}).get(kind) or [], dtype=float)  # None: NaN
                    axis.plot(np.arange(1, len(y) + 1), y, **style)
            titles = ("L2 norm", "Effective rank", "Spread between clips")
            for axis, title in zip(row, titles, strict=True):
                axis.set_title(f"{title}, {kind_name}")
                block_axis(axis, L)
                if not np.isfinite(axis.dataLim.y1):
                    axis.text(0.5, 0.5, "not known", transform=axis.transAxes, ha="center",
                              color="#777777")  # fmt: skip
                    axis.set_yticks([])
                from_zero(axis)
        for axis in axes[:-1].flat:
            axis.set_xlabel("")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))
    return Path(path)


def plot_prototype_maps(maps: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots clips and the patches of each that the strongest prototypes of its class select.

    Each of ``maps`` has ``label``, ``key``, ``spectrogram`` (frames, mels), ``evidence`` (T, F),
    ``hop_ms`` between frames, ``seconds`` that the clip fills (from
    ``eval.diagnostics.prototype_maps``). Left: the spectrogram. Right: the same in grey, with
    selected patches framed and tinted by their contribution to the class's logit; evidence against
    the class is blue.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shades = [(AGAINST, 0.85), (AGAINST, 0.0), (FOR, 0.0), (FOR, 0.85)]
    colours = [to_rgba(*shade) for shade in shades]
    tints = LinearSegmentedColormap.from_list(
        "evidence", list(zip((0, 0.5, 0.5, 1), colours, strict=True))
    )
    n = max(1, len(maps))
    with figure(path, n, 2, figsize=(12, 0.7 + 2.3 * n), sharey="row") as (fig, axes):
        for (left, right), item in zip(axes, maps, strict=False):
            image = np.asarray(item["spectrogram"], dtype=float)  # (frames, mels)
            evidence = np.asarray(item["evidence"], dtype=float)  # (T, F)
            seconds = len(image) * item["hop_ms"] / 1000
            where: dict[str, Any] = {"aspect": "auto", "origin": "lower"}
            where["extent"] = (0.0, seconds, 0.0, float(image.shape[1]))
            for axis, colour in ((left, "magma"), (right, "Greys")):
                axis.grid(False)
                axis.imshow(image.T, cmap=colour, **where)
                axis.set_xlabel("time (s)")
                if item["seconds"] < seconds - item["hop_ms"] / 1000:
                    axis.axvline(item["seconds"], color="#00A0A0", lw=1.2, ls="--")
            left.set_ylabel("mel bin")
            left.set_title(short(item["label"], 56))
            most = float(np.abs(evidence).max()) or 1.0
            picture = right.imshow(evidence.T, cmap=tints, vmin=-most, vmax=most,
                                   interpolation="nearest", **where)  # fmt: skip
            width, height = seconds / evidence.shape[0], image.shape[1] / evidence.shape[1]
            for t, f in np.argwhere(evidence != 0):
                colour = FOR if evidence[t, f] > 0 else AGAINST
                frame(right, t * width, f * height, width, height, edgecolor=colour, lw=1.0)
            count = f"{int((evidence != 0).sum())} of {evidence.size} patches selected"
            right.set_title(f"{short(item['key'], 28)}: {count}")
            fig.colorbar(picture, ax=right, label="adds to logit", pad=0.01)
    return Path(path)
