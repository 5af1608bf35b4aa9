"""A run's folder holds the pictures of this run, and none of the one before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bat.eval import pictures as probe_pictures
from bat.eval.pictures import draw_comparison, draw_encoder
from tests.report.probe_summaries import METHODS, summary

CLIP = {"label": "dog", "key": "1", "spectrogram": np.ones((32, 16)), "evidence": np.ones((2, 1)),
        "hop_ms": 10.0, "seconds": 0.32}  # fmt: skip


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    """``draw(maps=..., **summary)``: the names of what lies in ``plots`` afterwards."""

    def run(*, maps: str = "", asked: int = 8, compare: bool = True, **given: Any) -> set[str]:
        whole = {"multi_label": False, **summary(depth=2, **given)}
        found = (maps, [CLIP]) if maps else ("", [])
        for name, entry in whole["encoders"].items():
            evaluation: Any = SimpleNamespace(
                maps=lambda: found,
                ready=SimpleNamespace(
                    labels=whole["labels"],
                    task=SimpleNamespace(metric="accuracy"),
                    splits=whole["splits"],
                ),
                config=SimpleNamespace(
                    seeds=len(whole["seeds"]), diagnostics=SimpleNamespace(maps=asked)
                ),
            )
            draw_encoder(tmp_path / "plots" / name, evaluation, entry)
        if compare:
            draw_comparison(tmp_path / "plots", whole)
        plots = tmp_path / "plots"
        return {str(p.relative_to(plots)) for p in plots.rglob("*") if p.is_file()}

    return run


def test_draw__removes_plots_of_the_run_before(draw: Any, tmp_path: Path) -> None:
    top = {"attention-sinks.png", "comparison.png", "layer-curve.png", "norms-ranks.png"}
    small = {"folds": ("1", "2"), "seeds": (0, 1)}
    before = draw(encoders=["A", "random"], maps="cgp", **small)
    own = ("folds.png", "layer-gates.png", "prototype-maps-cgp.png")
    assert before == {f"{e}/{name}" for e in ("A", "random") for name in own} | top | {"gates.png"}
    (tmp_path / "plots" / "mine.png").write_bytes(b"")
    (tmp_path / "plots" / "A" / "mine.png").write_bytes(b"")
    (tmp_path / "plots" / "notes").mkdir()
    (tmp_path / "plots" / "notes" / "mine.txt").write_bytes(b"")
    after = draw(encoders=["A"], methods=["linear"], **small)  # no gate, no prototypes
    mine = {"mine.png", "A/mine.png", "notes/mine.txt"}
    assert after == {"A/folds.png"} | top | mine
    assert not (tmp_path / "plots" / "random").exists()
    split = draw(encoders=["A"], methods=["linear"], folds=("test",))
    assert split == top | mine


def test_draw_encoder__keeps_valid_maps(draw: Any) -> None:
    small = {"encoders": ["A"], "folds": ("1",), "seeds": (0,), "compare": False}
    assert "A/prototype-maps-cgp.png" in draw(maps="cgp", **small)
    assert "A/prototype-maps-cgp.png" in draw(**small)
    assert "A/prototype-maps-cgp.png" not in draw(asked=0, **small)
    assert "A/prototype-maps-cgp.png" in draw(maps="cgp", **small)
    other = draw(maps="proto", methods=["cgp", "proto"], **small)
    assert {name for name in other if "maps" in name} == {"A/prototype-maps-proto.png"}


def test_draw_encoder__folds_of_few_methods(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def gates(_: Any, path: Path, *, over: str) -> Path:
        seen["over"] = over
        return path

    monkeypatch.setattr(probe_pictures, "plot_layer_gates", gates)
    methods = [*METHODS, *"abcde"]
    small = {"encoders": ["A"], "folds": ("1", "2"), "compare": False}
    assert "A/folds.png" in draw(methods=methods[:7], seeds=(0, 1), **small)
    assert seen["over"] == "trainings"
    assert "A/folds.png" not in draw(methods=methods, seeds=(0,), **small)
    assert seen["over"] == "folds"
