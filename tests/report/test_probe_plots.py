"""Pictures of comparisons and of encoders: small and large, with the numbers given."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bat.report import insight_plots, plots, probe_plots
from bat.report.probe_plots import short

RNG = np.random.default_rng(0)
LONG = "checkpoints/a very long $name$ of_an_encoder/step=400000.safetensors"
ENCODERS = ["bat", "eat", LONG, "random"]
METHODS = [f"method {i}" for i in range(13)]


def sinks(L: int, *, gates: bool = True) -> dict[str, Any]:
    shares = np.linspace(0.05, 0.4, L).tolist()
    return {"gate on": shares, "gate off": shares[::-1] if gates else None, "uniform": 1 / 513}


def insight(L: int, *, cls: bool = True, known: bool = True) -> dict[str, Any]:
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


CASES: dict[str, Callable[[Path], Path]] = {
    "curves": lambda p: probe_plots.plot_layer_curve(
        {e: {"mean": RNG.random(24 if e == LONG else 12), "std": [0.1] * (24 if e == LONG else 12)}
         for e in ENCODERS}, p, metric="accuracy", chance=0.1),
    "one fold's curve": lambda p: probe_plots.plot_layer_curve(
        {"bat": {"mean": [0.3, 0.4], "std": None}}, p, metric="mAP"),
    "gates": lambda p: probe_plots.plot_gates_heat(
        {e: RNG.dirichlet(np.ones(24 if e == LONG else 12), 5) for e in ENCODERS}, p),
    "one gate": lambda p: probe_plots.plot_gates_heat({"cgp": [1.0]}, p),
    "comparison": lambda p: probe_plots.plot_comparison(
        {e: {m: row(RNG.random()) for m in METHODS} for e in ENCODERS}, p, metric="accuracy",
        finetuned={"bat": 0.95}, chance=0.1),
    "one number": lambda p: probe_plots.plot_comparison(
        {"random": {"cgp": row(0.5, errors=False)}}, p, metric="mAP", std_over="none"),
    "sinks": lambda p: insight_plots.plot_sinks(
        {"bat": sinks(12), "eat": sinks(12, gates=False), LONG: sinks(24)}, p),
    "norms": lambda p: insight_plots.plot_norms_ranks(
        {"bat": insight(12), "eat": insight(12, cls=False), LONG: insight(24)}, p),
    "norms without class token or rank": lambda p: insight_plots.plot_norms_ranks(
        {"bat": insight(4, cls=False, known=False)}, p),
    "maps": lambda p: insight_plots.plot_prototype_maps(
        [clip(), clip(label=LONG, key=LONG, seconds=0.3), clip(evidence=np.zeros((4, 2)))], p),
    "no map": lambda p: insight_plots.plot_prototype_maps([], p),
}  # fmt: skip


@pytest.mark.parametrize("draw", CASES.values(), ids=list(CASES))
def test_every_picture_is_a_png_in_a_new_folder(
    tmp_path: Path, draw: Callable[[Path], Path]
) -> None:
    path = draw(tmp_path / "plots" / "picture.png")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 250
    assert plt.get_fignums() == []


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figure that is saved, instead of a file."""
    found: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: found.extend(self.axes))
    return found


def lines(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }


def test_curve_s_line_is_the_metric_in_percent_by_block(tmp_path: Path, axes: list[Axes]) -> None:
    curves = {"bat": {"mean": [0.25, 0.75, 0.5], "std": [0.125, 0.0, 0.0]}}
    probe_plots.plot_layer_curve(curves, tmp_path / "c.png", metric="mAP")
    assert lines(axes[0]) == {"bat\nbest 75.0 %, block 2": [(1, 25), (2, 75), (3, 50)]}
    band = axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (12.5, 75)


def test_gates_are_means_over_runs_and_the_largest_is_framed(
    tmp_path: Path, axes: list[Axes]
) -> None:
    gates = {"a": [[0.1, 0.9], [0.3, 0.7]], "b": [0.5, 0.25, 0.25]}
    probe_plots.plot_gates_heat(gates, tmp_path / "g.png")
    table = np.asarray(axes[0].images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(table, [[20, 80, np.nan], [50, 25, 25]])
    assert [text.get_text() for text in axes[0].texts] == ["20", "80", "50", "25", "25"]
    assert [patch.get_xy() for patch in axes[0].patches] == [(1.5, -0.5), (0.5, 0.5)]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]


def test_methods_are_in_order_of_the_best_encoder_not_of_the_control(
    tmp_path: Path, axes: list[Axes]
) -> None:
    results = {
        "random": {"linear": row(0.9), "cgp": row(0.1, errors=False)},
        "bat": {"linear": row(0.5), "cgp": row(0.7), "vqt": row(0.6)},
    }
    probe_plots.plot_comparison(results, tmp_path / "c.png", metric="accuracy")
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["cgp", "vqt", "linear"]
    drawn = lines(axes[0])
    assert sorted(x for x, _ in drawn["random (control)"]) == [10, 90]
    assert [(x, round(y)) for x, y in drawn["bat"]] == [(70, 0), (60, 1), (50, 2)]
    assert {"± std over seeds", "95 % interval"} < set(drawn)
    ends = [line.get_xdata() for line in axes[0].lines if len(line.get_xdata()) == 2]
    found = sorted((round(float(a), 6), round(float(b), 6)) for a, b in ends)
    for pair in [(60, 75), (68, 72), (88, 92), (80, 95)]:  # interval and deviation
        assert pair in found
    colours = {line.get_label(): line.get_color() for line in axes[0].lines}
    assert colours["random (control)"] == probe_plots.GREY
    assert colours["bat"] == probe_plots.COLOURS[0]


def test_sinks_with_and_without_gates(tmp_path: Path, axes: list[Axes]) -> None:
    shares = {"gate on": [0.1, 0.2], "gate off": [0.1, 0.4], "uniform": 0.05}
    plain = {"gate on": [0.3, 0.5], "gate off": None, "uniform": 0.05}
    insight_plots.plot_sinks({"bat": shares, "eat": plain}, tmp_path / "s.png")
    drawn = lines(axes[0])
    assert drawn["bat, gates as trained"] == [(1, 10), (2, 20)]
    assert drawn["bat, gates open"] == [(1, 10), (2, 40)]
    assert drawn["eat, no gates"] == [(1, 30), (2, 50)]
    assert [y for _, y in drawn["even attention, 1/20"]] == [5, 5]


def test_what_is_not_known_is_said(tmp_path: Path, axes: list[Axes]) -> None:
    insight_plots.plot_norms_ranks({"bat": insight(3, known=False)}, tmp_path / "n.png")
    assert len(axes) == 6
    assert [[t.get_text() for t in axis.texts] for axis in axes] == [
        [], ["not known"], ["not known"]
    ] * 2  # fmt: skip
    assert lines(axes[0])["bat"] == [(1, 20), (2, 20), (3, 20)]


def test_selected_patches_are_framed_at_their_seconds_and_mels(
    tmp_path: Path, axes: list[Axes]
) -> None:
    insight_plots.plot_prototype_maps([clip(seconds=0.5)], tmp_path / "m.png")
    left, right = axes[:2]
    frames = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in right.patches]
    np.testing.assert_allclose(frames, [(0.16, 0, 0.16, 16), (0.48, 16, 0.16, 16)])
    colours = [patch.get_edgecolor()[:3] for patch in right.patches]
    assert colours[0][0] > colours[0][2]  # for the class: orange
    assert colours[1][2] > colours[1][0]
    assert right.get_title(loc="left") == "1-100-A: 2 of 8 patches selected"
    assert left.get_title(loc="left") == "dog"
    assert left.images[0].get_extent() == [0, 0.64, 0, 32]
    assert list(left.lines[0].get_xdata()) == [0.5, 0.5]  # where the clip ends
    tint = np.asarray(right.images[1].get_array())
    assert tint[0, 1] == 2  # (F, T): mel bands upwards
    assert right.images[1].origin == "lower"


def test_names_are_shortened_in_the_middle() -> None:
    assert short("a  name\nof two lines") == "a name of two lines"
    assert short("0123456789", 10) == "0123456789"
    assert short("0123456789A", 10) == "01234…789A"
    assert len(short(LONG)) == plots.NAME


def test_controls_are_told_apart(tmp_path: Path, axes: list[Axes]) -> None:
    names = ["random", "bat", "random-S", "eat", "random-L"]
    controls = [name for name in names if name.startswith("random")]
    found = probe_plots.looks(names, controls)
    assert [found[n]["color"] for n in controls] == list(probe_plots.GREYS)
    assert len({(look["color"], look["marker"]) for look in found.values()}) == len(names)
    assert found["bat"]["marker"] == found["random"]["marker"] == "o"  # theirs are counted apart
    results = {name: {"cgp": row(0.5)} for name in names}
    probe_plots.plot_comparison(results, tmp_path / "c.png", metric="mAP", controls=controls)
    drawn = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_markerfacecolor())
        for line in axes[0].lines
        if str(line.get_label()).endswith("(control)")
    }
    assert len(set(drawn.values())) == 3
    assert all(face == "white" for _, _, face in drawn.values())


def test_controls_alone_decide_the_order_among_themselves(tmp_path: Path, axes: list[Axes]) -> None:
    results = {n: {"linear": row(0.2), "cgp": row(0.4)} for n in ("random", "random-S")}
    probe_plots.plot_comparison(results, tmp_path / "c.png", metric="mAP", controls=[*results])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["cgp", "linear"]


def test_deviations_end_where_the_metric_does(tmp_path: Path, axes: list[Axes]) -> None:
    wide = {"mean": 0.9, "std": 0.2, "interval": [0.8, 1.05]}
    low = {"mean": 0.05, "std": 0.2, "interval": [-0.01, 0.3]}
    results = {"bat": {"cgp": wide, "linear": low}}
    probe_plots.plot_comparison(results, tmp_path / "c.png", metric="accuracy")
    ends = [line.get_xdata() for line in axes[0].lines if len(line.get_xdata()) == 2]
    drawn = {(round(float(a), 6), round(float(b), 6)) for a, b in ends}
    assert {(70, 100), (80, 100), (0, 25), (0, 30)} <= drawn
    curves = {"bat": {"mean": [0.9, 0.05], "std": [0.2, 0.2]}}
    probe_plots.plot_layer_curve(curves, tmp_path / "l.png", metric="accuracy")
    band = axes[1].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 100)
