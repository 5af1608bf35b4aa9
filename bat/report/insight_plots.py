"""Plots the diagnostics of an encoder: selected patches, attention sinks, norms and ranks.

Style, colours and conventions are those of ``probe_plots.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bat.report.probe_plots import (
    CONTROLS,
    blocks,
    from_zero,
    looks,
    plain_figure,
    rectangle,
    short,
)

FOR, AGAINST = "#E66100", "#3B6FD4"
"""Colours of evidence for a class and against it."""


def plot_prototype_maps(maps: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Plots clips and the patches of each that the strongest prototypes of its class select.

    Each of ``maps`` has ``label``, ``key``, ``spectrogram`` (frames, mels), ``evidence`` (T, F),
    ``hop_ms`` between frames, ``seconds`` that the clip fills (from
    ``eval.diagnostics.prototype_maps``). Left: the spectrogram. Right: the same in grey, with
    selected patches framed and tinted by their contribution to the class's logit; evidence against
    the class is blue.
    """
    path = Path(path)
    n = max(1, len(maps))
    settings: dict[str, Any] = {"figsize": (12, 0.7 + 2.3 * n), "sharey": "row"}
    with plain_figure(path, n, 2, **settings) as (fig, axes):
        for (left, right), item in zip(axes, maps, strict=False):
            image = np.asarray(item["spectrogram"], dtype=float)  # (frames, mels)
            found = np.asarray(item["evidence"], dtype=float)  # (T, F)
            frames, mels = image.shape
            seconds = frames * item["hop_ms"] / 1000
            where = {"extent": (0.0, seconds, 0.0, float(mels)), "aspect": "auto"}
            for axis, colours in ((left, "magma"), (right, "Greys")):
                axis.grid(False)
                axis.imshow(image.T, cmap=colours, origin="lower", **where)
                axis.set_xlabel("time (s)")
                if item["seconds"] < seconds - item["hop_ms"] / 1000:
                    axis.axvline(item["seconds"], color="#00A0A0", lw=1.2, ls="--")
            left.set_ylabel("mel bin")
            left.set_title(short(item["label"], 56))
            picture = _tint(right, found, (seconds / found.shape[0], mels / found.shape[1]))
            count = f"{int((found != 0).sum())} of {found.size} patches selected"
            right.set_title(f"{short(item['key'], 28)}: {count}")
            fig.colorbar(picture, ax=right, label="adds to logit", pad=0.01)
    return path


def plot_sinks(
    sinks: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    controls: Collection[str] = CONTROLS,
) -> Path:
    """Plots the attention share of the most attended token by block, gates on and off.

    ``sinks``: encoder -> ``{"gate on": (L,), "gate off": (L,) | None, "uniform": 1 / tokens}``.
    Encoders without gates have one line.
    """
    path = Path(path)
    L = max((len(s["gate on"]) for s in sinks.values()), default=1)
    with plain_figure(path, figsize=(8.6, 4.4)) as (_, axes):
        axis = axes[0, 0]
        for name, look in looks(sinks, controls).items():
            shares = sinks[name]
            off = shares.get("gate off")
            kinds = [("gate on", "-", 1.8)] + ([("gate off", "--", 1.3)] if off is not None else [])
            for kind, line, width in kinds:
                y = 100 * np.asarray(shares[kind], dtype=float)
                what = {"gate on": "gates as trained", "gate off": "gates open"}[kind]
                label = f"{short(name)}, {what if off is not None else 'no gates'}"
                style = look | ({"markerfacecolor": "white"} if kind == "gate off" else {})
                x = np.arange(1, len(y) + 1)
                axis.plot(x, y, ls=line, lw=width, ms=5, label=label, **style)
        for share in sorted({s["uniform"] for s in sinks.values() if s.get("uniform")}):
            axis.axhline(100 * share, color="#777777", lw=1, ls=":",
                         label=f"even attention, 1/{round(1 / share)}")  # fmt: skip
        blocks(axis, L)
        from_zero(axis)
        axis.set_ylabel("share of attention (%)")
        axis.set_title("Attention sink: what the most attended token draws")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path


def plot_norms_ranks(
    insights: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    controls: Collection[str] = CONTROLS,
) -> Path:
    """Plots token norms (mean, one deviation), effective rank and spread over clips by block.

    ``insights``: encoder -> the result of ``eval.diagnostics.encoder_statistics``. Patches are in
    the top row, class tokens, if any, in the bottom row; missing values are not drawn.
    """
    path = Path(path)
    kinds = [k for k in ("patches", "cls") if any(s["norms"].get(k) for s in insights.values())]
    kinds = kinds or ["patches"]
    names = {"patches": "patches", "cls": "class token"}
    L = max((len(s["norms"]["patches"]) for s in insights.values()), default=1)
    settings: dict[str, Any] = {"figsize": (13, 0.9 + 2.9 * len(kinds)), "sharex": True}
    with plain_figure(path, len(kinds), 3, **settings) as (fig, axes):
        for (norm, rank, spread), kind in zip(axes, kinds, strict=True):
            for name, look in looks(insights, controls).items():
                found = insights[name]
                table = np.asarray(found["norms"].get(kind) or np.empty((0, 3)), dtype=float)
                x = np.arange(1, len(table) + 1)
                mean, std = table[:, 0], table[:, 1]
                ends = np.maximum(0, [mean - std, mean + std])
                norm.fill_between(x, *ends, color=look["color"], alpha=0.15, lw=0)
                norm.plot(x, mean, lw=1.7, ms=4.5, label=short(name, 40), **look)
                for axis, what in ((rank, "rank"), (spread, "spread")):
                    y = np.array(found.get(what, {}).get(kind) or [], dtype=float)  # None: NaN
                    axis.plot(np.arange(1, len(y) + 1), y, lw=1.7, ms=4.5, **look)
            norm.set_title(f"L2 norm, {names[kind]}")
            rank.set_title(f"Effective rank, {names[kind]}")
            spread.set_title(f"Spread between clips, {names[kind]}")
            for axis in (norm, rank, spread):
                blocks(axis, L, label=kind == kinds[-1])
                if not np.isfinite(axis.dataLim.y1):
                    axis.text(0.5, 0.5, "not known", transform=axis.transAxes, ha="center",
                              color="#777777")  # fmt: skip
                    axis.set_yticks([])
                from_zero(axis)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))
    return path


def _tint(axis: Any, found: np.ndarray, side: tuple[float, float]) -> Any:
    """Draws patches (T, F) of ``side`` (seconds, mels) in the colour of their evidence."""
    from matplotlib.colors import LinearSegmentedColormap

    most = float(np.abs(found).max()) or 1.0
    shades = [(*_rgb(AGAINST), 0.85), (*_rgb(AGAINST), 0.0), (*_rgb(FOR), 0.0), (*_rgb(FOR), 0.85)]
    colours = LinearSegmentedColormap.from_list(
        "evidence", list(zip((0, 0.5, 0.5, 1), shades, strict=True))
    )
    T, F = found.shape
    where = {"extent": (0.0, T * side[0], 0.0, F * side[1]), "aspect": "auto", "origin": "lower"}
    picture = axis.imshow(found.T, cmap=colours, vmin=-most, vmax=most, interpolation="nearest",
                          **where)  # fmt: skip
    for t, f in np.argwhere(found != 0):
        colour = FOR if found[t, f] > 0 else AGAINST
        axis.add_patch(rectangle(t * side[0], f * side[1], *side, color=colour, lw=1.0))
    return picture


def _rgb(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(to_rgb(colour))
