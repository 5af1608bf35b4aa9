"""Pictures are written, are pictures, and show the numbers they were given."""

import itertools
import struct

import numpy as np
import pytest

from bat.report import plots
from bat.types import Grid

ROWS = [
    {"step": s, "method": m, "accuracy": 0.5 + s / 1000, "accuracy_std": 0.02}
    for s in (0, 100, 200)
    for m in ("cgp", "linear")
]
METRICS = [
    {"step": 0, "loss": 1.2, "loss_local": 1.0, "lr": 1e-6},
    {"step": 50, "loss": 0.8, "loss_local": 0.7, "lr": 5e-4, "note": "text"},
    {"epoch": 1},
]


def _size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: plots.plot_masks(
            np.random.default_rng(0).random((2, 1, 64, 32)),
            np.random.default_rng(0).random((2, 8)) > 0.5,
            p,
            grid=Grid(time=4, freq=2),
        ),
        lambda p: plots.plot_curves(METRICS, p),
        lambda p: plots.plot_curves([], p),
        lambda p: plots.plot_layer_gates({"cgp": [[0.2, 0.8], [0.4, 0.6]], "lcgp": [0.5, 0.5]}, p),
        lambda p: plots.plot_folds({"cgp": {1: 0.5, 2: 0.7}}, p, metric="accuracy"),
        lambda p: plots.plot_probe_curve(ROWS, p, chance=0.1),
        lambda p: plots.plot_probe_curve(ROWS[2:3], p),
    ],
    ids=["masks", "curves", "no-curves", "gates", "folds", "probe-curve", "one-point"],
)
def test_every_picture_is_a_png_in_a_new_folder(tmp_path, draw):
    path = draw(tmp_path / "plots" / "picture.png")
    assert min(_size(path)) > 300
    from matplotlib import pyplot as plt

    assert plt.get_fignums() == []


def test_curves_take_losses_and_rates_only(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    real = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: (drawn.append(list(y)), real(self, x, y, **k))[1]
    )
    plots.plot_curves(METRICS, tmp_path / "curves.png")
    assert drawn == [[1.2, 0.8], [1.0, 0.7], [1e-6, 5e-4]]


def test_random_control_is_the_value_at_step_zero(tmp_path, monkeypatch):
    lines = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: lines.append((y, k["ls"])))
    plots.plot_probe_curve(ROWS, tmp_path / "curve.png")
    assert lines == [(50.0, "--"), (50.0, "--")]


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that is saved, instead of a file."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: found.extend(self.axes))
    return found


def test_gates_say_what_their_deviation_is_over_and_stay_within_0_and_1(tmp_path, axes):
    from matplotlib.container import ErrorbarContainer

    gates = {"cgp": [[0.0, 1.0], [0.0, 1.0], [0.75, 0.25]], "lcgp": [0.25, 0.75]}
    plots.plot_layer_gates(gates, tmp_path / "g.png")
    plots.plot_layer_gates(gates, tmp_path / "g.png", over="trainings")
    for axis, over in zip(axes, ("folds", "trainings"), strict=True):
        said = [text.get_text() for text in axis.get_legend().get_texts()]
        assert said == ["uniform, 1/2", f"cgp, mean ± std\nof 3 {over}", "lcgp"]
    [bars] = [c for c in axes[0].containers if isinstance(c, ErrorbarContainer)]
    [lines] = bars[2]
    ends = [segment[:, 1].tolist() for segment in lines.get_segments()]
    spread = 0.125**0.5  # more than 0.25
    np.testing.assert_allclose(ends, [(0, 0.25 + spread), (0.75 - spread, 1)], atol=1e-12)


def test_folds_are_in_order_and_say_what_their_deviation_is_over(tmp_path, axes):
    scores = {str(fold): fold / 100 for fold in (10, 2, 1)}
    plots.plot_folds({"cgp": scores}, tmp_path / "f.png", metric="accuracy")
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["1", "2", "10"]
    drawn = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes[0].patches}
    assert drawn == {0: 1, 1: 2, 2: 10}
    legend = axes[0].get_legend()
    assert legend.get_title().get_text() == "mean ± std over 3 folds"
    assert [text.get_text() for text in legend.get_texts()] == ["cgp: 4.3 ± 4.0 %"]
    plots.plot_folds({"cgp": {"test": 0.5}}, tmp_path / "f.png", metric="accuracy")
    legend = axes[1].get_legend()
    assert legend.get_title().get_text() == ""
    assert [text.get_text() for text in legend.get_texts()] == ["cgp: 50.0 %"]


def test_the_band_of_a_probe_s_curve_ends_where_the_metric_does(tmp_path, axes):
    rows = [{"step": s, "method": "cgp", "accuracy": 0.95, "accuracy_std": 0.1} for s in (1, 2)]
    plots.plot_probe_curve(rows, tmp_path / "c.png")
    assert axes[0].collections[0].get_paths()[0].vertices[:, 1].max() == 100


def test_plot_folds__long_names_are_turned_and_chance_is_drawn(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    seen, close = [], plt.close
    monkeypatch.setattr(plt, "close", seen.append)
    scores = {f"site-{i}-2024-05-{i:02d}": 0.1 * i for i in range(1, 10)}
    plots.plot_folds({"cgp": scores}, tmp_path / "a.png", metric="accuracy", chance=0.25)
    plots.plot_folds({"cgp": {"1": 0.5, "2": 0.6}}, tmp_path / "b.png", metric="accuracy")
    turned, plain = (figure.axes[0] for figure in seen)
    assert {label.get_rotation() for label in turned.get_xticklabels()} == {90}
    assert {label.get_rotation() for label in plain.get_xticklabels()} == {0}
    boxes = [label.get_window_extent() for label in turned.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert [list(line.get_ydata()) for line in turned.lines if line.get_label() == "chance"] == [
        [25, 25]
    ]
    assert "chance" not in [line.get_label() for line in plain.lines]
    for figure in seen:
        close(figure)
    assert plots.chance_of("accuracy", 4) == 0.25
    assert plots.chance_of("map", 4) is None
