"""Pictures are written, are pictures, and show the numbers they were given."""

import struct

import numpy as np
import pytest

from bat.report import plots
from bat.shapes import Grid

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
