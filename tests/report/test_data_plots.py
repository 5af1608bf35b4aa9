"""The picture of a data set: drawn for plain, many-classed, unlabelled and empty sets alike."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.report.data_plots import compact, plot_data

RNG = np.random.default_rng(0)
PLAIN: dict[str, Any] = {
    "title": "a set",
    "classes": {"cat": 3, "$dog$ ": 5},
    "seconds": np.array([1.0, 2.0, np.nan]),
    "rates": {"8000": 1, "44100": 2},
    "codecs": {"wav": 3},
    "splits": {"train": 2},
    "folds": {"10": 1, "9": 2},
    "labels_per_clip": {1: 3, 0: 1},
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"classes": {f"class {i}": int(9000 / (i + 1)) for i in range(527)}},
        {"classes": {f"c{i}": 5 for i in range(40)} | {"none": 0}},
        {"classes": {}, "splits": {}, "folds": {}, "labels_per_clip": {0: 3}},
        {"seconds": RNG.exponential(100, 1000) + 0.1},
        {"seconds": np.full(5, 10.0)},
        {"seconds": np.full(5, np.nan), "rates": {}},
        {"rates": {str(8000 + i): i for i in range(40)}},
    ],
)
def test_a_picture_of_anything(tmp_path: Path, change: dict[str, Any]) -> None:
    path = plot_data(tmp_path / "new/info.png", **(PLAIN | change))
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 1000
    from matplotlib import pyplot as plt

    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (12_024, "12k"),
        (1500, "1.5k"),
        (1_912_024, "1.91M"),
        (10_000, "10k"),
        (999_600, "1M"),
    ],
)
def test_short_numbers(number: float, text: str) -> None:
    assert compact(number) == text


def test_the_numbers_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    ticks: dict[str, list[str]] = {}

    def keep(name: str) -> None:
        real = getattr(Axes, name)

        def spy(self: Any, x: Any, y: Any = None, *a: Any, **k: Any) -> Any:
            title = self.get_title(loc="left")
            if name == "set_xticks":
                ticks[title] = list(y or [])
            elif x is not None:  # barh and hist call bar in their turn
                drawn.setdefault(title, list(x if name == "hist" else y))
            return real(self, x, *([] if y is None else [y]), *a, **k)

        monkeypatch.setattr(Axes, name, spy)

    for name in ("bar", "barh", "hist", "set_xticks"):
        keep(name)
    plot_data(tmp_path / "x.png", **PLAIN)
    assert drawn == {
        "Clips a class (2 classes)": [5, 3],
        "Clips by length (1 unknown)": [1.0, 2.0],
        "Labels a clip": [1, 3],
        "Sample rates": [1, 2],
        "Codecs": [3],
        "Splits and folds": [2, 2, 1],
    }
    assert ticks["Splits and folds"] == ["train", "fold 9", "fold 10"]
    assert ticks["Sample rates"] == ["8,000", "44,100"]
