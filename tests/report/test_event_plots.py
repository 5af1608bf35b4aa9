"""Pictures of events are drawn for odd clips too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bat.report.event_plots import LANES, plot_events


def item(count: int, seconds: float = 3.0, **more: object) -> dict[str, object]:
    events = [(0.1 * i, 0.1 * i + 0.05, f"class $_{i}", i % 2 == 0) for i in range(count)]
    spectrogram = np.random.default_rng(0).random((round(100 * seconds), 32))
    return {"title": "best: x", "spectrogram": spectrogram, "hop_ms": 10.0, "seconds": seconds,
            "reference": events, "predicted": events[::2], **more}  # fmt: skip


@pytest.mark.parametrize(
    "items",
    [
        [item(3), item(2)],
        [item(0), item(1, seconds=120.0)],
        [item(LANES + 6)],
        [item(1, reference=[(0.5, 0.5, "of no length", True)])],
    ],
)
def test_plot_events__draws(items: list[dict[str, object]], tmp_path: Path) -> None:
    image = imread(plot_events(items, tmp_path / "plots/events.png"))
    assert image.shape[1] == 1800
    assert 300 < image.shape[0] < 1500 * len(items)
    assert len(np.unique(image.sum(-1))) > 100  # colours
