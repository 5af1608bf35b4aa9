"""Plots are written as PNG files and show the numbers they were given."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bat.report import data_plots, plots, probe_plots
from bat.types import Grid

RNG = np.random.default_rng(0)
LONG = "checkpoints/a very long $name$ of_an_encoder/step=400000.safetensors"
ENCODERS = {"bat": 12, "eat": 12, LONG: 24, "random": 12}  # blocks
RANDOM: dict[str, Any] = {"baselines": ["random"]}
ROWS = [
    {"step": s, "method": m, "accuracy": 0.5 + s / 1000, "accuracy_std": 0.02}
    for s in (0, 100, 200)
    for m in ("cgp", "linear")
]
METRICS: list[dict[str, Any]] = [
    {"step": 0, "loss": 1.2, "loss_local": 1.0, "lr": 1e-6},
    {"step": 50, "loss": 0.8, "loss_local": 0.7, "lr": 5e-4, "note": "text"},
    {"epoch": 1},
]
DATA: dict[str, Any] = {
    "title": "a set",
    "classes": {"cat": 3, "$dog$ ": 5},
    "seconds": np.array([1.0, 2.0, np.nan]),
    "rates": {"8000": 1, "44100": 2},
    "codecs": {"wav": 3},
    "splits": {"train": 2},
    "folds": {"10": 1, "9": 2},
    "labels_per_clip": {1: 3, 0: 1},
}


def sinks(L: int, *, gates: bool = True) -> dict[str, Any]:
    shares = np.linspace(0.05, 0.4, L).tolist()
    return {"gate on": shares, "gate off": shares[::-1] if gates else None, "uniform": 1 / 513}


def diagnostics(L: int, *, cls: bool = True, known: bool = True) -> dict[str, Any]:
    norms, rank = [[20.0, 1.0, 30.0]] * L, [5.0 * known or None] * L
    return {
        "norms": {"patches": norms, "cls": norms if cls else None},
        "rank": {"patches": rank, "cls": rank if cls else None},
        "spread": {"patches": rank, "cls": rank if cls else None},
    }


def row(mean: float, *, errors: bool = True) -> dict[str, Any]:
    interval = [mean - 0.1, mean + 0.05] if errors else None
    return {"mean": mean, "std": 0.02 if errors else None, "interval": interval}


def clip(**changes: Any) -> dict[str, Any]:
    found = np.zeros((4, 2))
    found[1, 0], found[3, 1] = 2.0, -1.0
    image = RNG.random((64, 32))
    whole = {"label": "dog", "key": "1-100-A", "spectrogram": image, "evidence": found}
    return whole | {"hop_ms": 10.0, "seconds": 0.64} | changes


def data(**changes: Any) -> Callable[[Path], Path]:
    return lambda path: data_plots.plot_data(path, **(DATA | changes))


CASES: dict[str, Callable[[Path], Path]] = {
    "masks": lambda p: plots.plot_masks(
        RNG.random((2, 1, 64, 32)), RNG.random((2, 8)) > 0.5, p, grid=Grid(time=4, freq=2)),
    "no curves": lambda p: plots.plot_curves([], p),
    "layer curves": lambda p: probe_plots.plot_layer_curve(
        {e: {"mean": RNG.random(L), "std": [0.1] * L} for e, L in ENCODERS.items()}, p,
        metric="accuracy", chance=0.1, **RANDOM),
    "gates": lambda p: plots.plot_layer_gates(
        {e: RNG.dirichlet(np.ones(L), 5) for e, L in ENCODERS.items()}, p),
    "comparison": lambda p: probe_plots.plot_comparison(
        {e: {f"m{i}": row(RNG.random()) for i in range(13)} for e in ENCODERS}, p,
        metric="accuracy", finetuned={"bat": 0.95}, chance=0.1, **RANDOM),
    "one number": lambda p: probe_plots.plot_comparison(
        {"random": {"cgp": row(0.5, errors=False)}, "bat": {}}, p, metric="mAP",
        std_over="none", **RANDOM),
    "sinks": lambda p: probe_plots.plot_sinks({"bat": sinks(12), LONG: sinks(24)}, p, **RANDOM),
    "norms": lambda p: probe_plots.plot_norms_ranks(
        {"bat": diagnostics(12), "eat": diagnostics(12, cls=False), LONG: diagnostics(24)}, p,
        **RANDOM),
    "prototype maps": lambda p: probe_plots.plot_prototype_maps(
        [clip(label=LONG, key=LONG, seconds=0.3), clip(evidence=np.zeros((4, 2)))], p),
    "no map": lambda p: probe_plots.plot_prototype_maps([], p),
    "data of many classes": data(classes={f"class {i}": 9000 // (i + 1) for i in range(527)}),
    "data without labels and lengths": data(
        classes={}, splits={}, folds={}, rates={}, seconds=np.full(5, np.nan)),
    "data of many lengths": data(
        seconds=RNG.exponential(100, 1000) + 0.1, rates={str(8000 + i): i for i in range(40)}),
}  # fmt: skip


@pytest.mark.parametrize("draw", CASES.values(), ids=list(CASES))
def test_plots__are_png_files_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[[Path], Path]
) -> None:
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 50)  # sooner
    head = draw(tmp_path / "plots" / "plot.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 80
    assert plt.get_fignums() == []


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figures that are saved, instead of files."""
    found: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: found.extend(self.axes))
    return found


def lines(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }


def ticks(axis: Axes, name: str) -> list[str]:
    return [label.get_text() for label in getattr(axis, f"get_{name}ticklabels")()]


def legend(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_plot_curves__losses_and_rates_are_drawn(tmp_path: Path, axes: list[Axes]) -> None:
    plots.plot_curves(METRICS, tmp_path / "c.png")
    losses, rates = (lines(axis) for axis in axes)
    assert losses == {"loss": [(0, 1.2), (50, 0.8)], "loss_local": [(0, 1.0), (50, 0.7)]}
    assert rates == {"lr": [(0, 1e-6), (50, 5e-4)]}


def test_plot_probe_curve__baseline_is_step_zero_and_bands_end_at_100(
    tmp_path: Path, axes: list[Axes]
) -> None:
    plots.plot_probe_curve(ROWS, tmp_path / "c.png", chance=0.1)
    drawn = lines(axes[0])
    assert drawn["cgp (last 70.0 %)"] == [(0, 50), (100, 60), (200, 70)]
    assert {y for _, y in drawn["cgp at step 0 (50.0 %)"]} == {50}
    assert {y for _, y in drawn["chance"]} == {10}
    rows = [{"step": s, "method": "cgp", "accuracy": 0.95, "accuracy_std": 0.1} for s in (1, 2)]
    plots.plot_probe_curve(rows, tmp_path / "c.png")
    assert axes[1].collections[0].get_paths()[0].vertices[:, 1].max() == 100


def test_plot_folds__folds_are_in_order_with_mean_and_chance(
    tmp_path: Path, axes: list[Axes]
) -> None:
    scores = {str(fold): fold / 100 for fold in (10, 2, 1)}
    plots.plot_folds({"cgp": scores}, tmp_path / "f.png", metric="accuracy", chance=0.25)
    assert ticks(axes[0], "x") == ["1", "2", "10"]
    drawn = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes[0].patches}
    assert drawn == {0: 1, 1: 2, 2: 10}
    assert legend(axes[0]) == ["chance", "cgp: 4.3 ± 4.0 %"]
    assert axes[0].get_legend().get_title().get_text() == "mean ± std over 3 folds"
    assert {y for _, y in lines(axes[0])["chance"]} == {25}
    plots.plot_folds({"cgp": {"test": 0.5}}, tmp_path / "f.png", metric="accuracy")
    assert legend(axes[1]) == ["cgp: 50.0 %"]
    assert plots.chance_of("accuracy", 4) == 0.25
    assert plots.chance_of("map", 4) is None


def test_plot_layer_curve__line_and_band_are_in_percent(tmp_path: Path, axes: list[Axes]) -> None:
    curves = {"bat": {"mean": [0.25, 0.75, 0.95], "std": [0.375, 0.0, 0.125]}}
    probe_plots.plot_layer_curve(curves, tmp_path / "c.png", metric="mAP", **RANDOM)
    assert lines(axes[0]) == {"bat\nbest 95.0 %, block 3": [(1, 25), (2, 75), (3, 95)]}
    band = axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 100)


def test_plot_layer_gates__mean_and_std_are_shown_and_the_largest_framed(
    tmp_path: Path, axes: list[Axes]
) -> None:
    gates = {"a": [[0.1, 0.9], [0.3, 0.7]], "b": [0.5, 0.25, 0.25]}
    plots.plot_layer_gates(gates, tmp_path / "g.png", over="trainings")
    table = np.asarray(axes[0].images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(table, [[20, 80, np.nan], [50, 25, 25]])
    shown = [text.get_text() for text in axes[0].texts]
    assert shown == ["20\n±10", "80\n±10", "50", "25", "25"]
    assert axes[0].get_title(loc="left").endswith("mean ± std over trainings")
    assert [patch.get_xy() for patch in axes[0].patches] == [(1.5, -0.5), (0.5, 0.5)]
    assert ticks(axes[0], "y") == ["a", "b"]


def test_plot_comparison__order_is_that_of_the_best_trained_encoder(
    tmp_path: Path, axes: list[Axes]
) -> None:
    results = {
        "random": {"linear": row(0.9), "cgp": row(0.1, errors=False)},
        "bat": {"linear": row(0.5), "cgp": row(0.7), "vqt": row(0.6)},
        "eat": {"cgp": {"mean": 0.05, "std": 0.2, "interval": [-0.01, 0.3]}},
    }
    probe_plots.plot_comparison(results, tmp_path / "c.png", metric="accuracy", **RANDOM)
    assert ticks(axes[0], "y") == ["cgp", "vqt", "linear"]
    drawn = lines(axes[0])
    assert sorted(x for x, _ in drawn["random (random init)"]) == [10, 90]
    assert [(x, round(y)) for x, y in drawn["bat"]] == [(50, 2), (70, 0), (60, 1)]
    assert {"± std over seeds", "95 % interval"} < set(drawn)
    ends = [line.get_xdata() for line in axes[0].lines if len(line.get_xdata()) == 2]
    found = {(round(float(a), 6), round(float(b), 6)) for a, b in ends}
    assert {(60, 75), (68, 72), (88, 92), (80, 95), (0, 25), (0, 30)} <= found
    baselines = {n: {"linear": row(0.2), "cgp": row(0.4)} for n in ("random", "random-S")}
    probe_plots.plot_comparison(
        baselines, tmp_path / "c.png", metric="mAP", baselines=list(baselines)
    )
    assert ticks(axes[1], "y") == ["cgp", "linear"]


def test_encoder_styles__baselines_are_grey_and_all_differ() -> None:
    names = ["random", "bat", "random-S", "eat", "random-L"]
    baselines = [name for name in names if name.startswith("random")]
    found = probe_plots.encoder_styles(names, baselines)
    assert [found[n]["color"] for n in baselines] == list(probe_plots.GREYS)
    assert all(found[n]["markerfacecolor"] == "white" for n in baselines)
    assert len({(style["color"], style["marker"]) for style in found.values()}) == len(names)


def test_plot_sinks__with_and_without_gates(tmp_path: Path, axes: list[Axes]) -> None:
    shares = {"gate on": [0.1, 0.2], "gate off": [0.1, 0.4], "uniform": 0.05}
    plain = {"gate on": [0.3, 0.5], "gate off": None, "uniform": 0.05}
    probe_plots.plot_sinks({"bat": shares, "eat": plain}, tmp_path / "s.png", **RANDOM)
    drawn = lines(axes[0])
    assert drawn["bat, gates as trained"] == [(1, 10), (2, 20)]
    assert drawn["bat, gates open"] == [(1, 10), (2, 40)]
    assert drawn["eat, no gates"] == [(1, 30), (2, 50)]
    assert [y for _, y in drawn["even attention, 1/20"]] == [5, 5]


def test_plot_norms_ranks__unknown_values_are_named(tmp_path: Path, axes: list[Axes]) -> None:
    probe_plots.plot_norms_ranks({"bat": diagnostics(3, known=False)}, tmp_path / "n.png", **RANDOM)
    texts = [[t.get_text() for t in axis.texts] for axis in axes]
    assert texts == [[], ["not known"], ["not known"]] * 2
    assert lines(axes[0])["bat"] == [(1, 20), (2, 20), (3, 20)]


def test_plot_prototype_maps__patches_are_framed_at_their_seconds_and_mels(
    tmp_path: Path, axes: list[Axes]
) -> None:
    probe_plots.plot_prototype_maps([clip(seconds=0.5)], tmp_path / "m.png")
    left, right = axes[:2]
    frames = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in right.patches]
    np.testing.assert_allclose(frames, [(0.16, 0, 0.16, 16), (0.48, 16, 0.16, 16)])
    colours = [patch.get_edgecolor()[:3] for patch in right.patches]
    assert colours[0][0] > colours[0][2]  # for the class: orange
    assert colours[1][2] > colours[1][0]
    assert right.get_title(loc="left") == "1-100-A: 2 of 8 patches selected"
    assert left.images[0].get_extent() == [0, 0.64, 0, 32]
    assert list(left.lines[0].get_xdata()) == [0.5, 0.5]  # the clip's end
    tint = right.images[1]
    assert np.asarray(tint.get_array())[0, 1] == 2  # (F, T): mel bands upwards
    assert tint.origin == "lower"


def test_plot_data__numbers_are_drawn_in_order(tmp_path: Path, axes: list[Axes]) -> None:
    data_plots.plot_data(tmp_path / "x.png", **DATA)
    drawn = {axis.get_title(loc="left"): axis for axis in axes}
    heights = {t: [p.get_height() for p in axis.patches] for t, axis in drawn.items()}
    assert [p.get_width() for p in drawn["Clips per class (2 classes)"].patches] == [5, 3]
    assert sum(heights["Clips by length (1 unknown)"]) == 2
    assert heights["Labels per clip"] == [1, 3]
    assert heights["Sample rates"] == [1, 2]
    assert heights["Splits and folds"] == [2, 2, 1]
    assert ticks(drawn["Splits and folds"], "x") == ["train", "fold 9", "fold 10"]
    assert ticks(drawn["Sample rates"], "x") == ["8,000", "44,100"]


def test_plot_data__log_axes_have_plain_ticks(tmp_path: Path, axes: list[Axes]) -> None:
    uneven = {"cat": 3, "dog": 500}
    data(classes=uneven, seconds=RNG.exponential(100, 1000) + 0.1)(tmp_path / "x.png")
    assert axes[0].get_xscale() == axes[1].get_xscale() == "log"  # $10^2$ would not be parsed
    assert not [t for axis in axes for t in (*ticks(axis, "x"), *ticks(axis, "y")) if "$" in t]


def test_short__middle_is_omitted() -> None:
    assert plots.short("a  name\nof two lines") == "a name of two lines"
    assert plots.short("0123456789", 10) == "0123456789"
    assert plots.short("0123456789A", 10) == "01234…789A"
    assert len(plots.short(LONG)) == plots.NAME


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.5, "0.5"), (999, "999"), (12_024, "12k"), (1_912_024, "1.91M"), (999_600, "1M")],
)
def test_compact__three_digits_and_unit(number: float, text: str) -> None:
    assert data_plots.compact(number) == text
