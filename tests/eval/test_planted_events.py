"""Planted events are found, permuted ones are not; the pictures show what was detected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bat.config.compose import compose
from bat.config.schema import Probe
from bat.eval.event_pictures import compared
from bat.eval.probe import probe
from bat.eval.report import report
from bat.metrics.events import matches, pairs
from bat.tasks import toy_events
from tests.reference import events as reference


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other clips than those of the toy task, with which the settings were tried: 96 to train, 8
    that select the rate, 16 to evaluate once."""
    root, clip = tmp_path_factory.mktemp("planted"), toy_events.clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_events, "clip", lambda number: clip(1_000 + number))
        patch.setattr(toy_events, "CLIPS", {"train": 96, "valid": 8, "test": 16})
        toy_events.make(root)
    return root


def run(encoder: Path, root: Path, out: Path, *words: str) -> dict[str, float]:
    given = [
        "recipe=toy_events", f"checkpoint={encoder}", f"data.root={root}", f"out={out}",
        f"data.cache={out.parent / 'cache'}", "log.progress=false", "bootstrap=0",
        "diagnostics.encoder=false", "head.prototypes=128", "head.dropout=0", "data.batch=16",
        "protocol.prototype_lrs=[0.03,0.1]", "train.steps=600", *words,
    ]  # fmt: skip
    merged = dict(word.split("=", 1) for word in given)
    probe(compose(Probe, "probe", [f"{k}={v}" for k, v in merged.items()]))
    (entry,) = json.loads((out / "summary.json").read_text())["encoders"].values()
    found: dict[str, float] = entry["results"]["cgp"]["mean"]
    return found


def test_probe__finds_planted_events_on_a_random_encoder(planted: Path, tmp_path: Path) -> None:
    """25 s of one core: 600 steps over the frozen features of 96 clips of 3 s."""
    encoder = narrow(tmp_path / "encoder")
    found = run(encoder, planted, tmp_path / "run")
    assert found["event_f1"] > 0.9
    assert found["psds1"] > 0.5 if "psds1" in found else found["segment_f1"] > 0.85
    picture = tmp_path / "run/plots/encoder/events-cgp.png"
    assert picture.is_file()
    page = report([tmp_path / "run"]).html.read_text()
    assert "Events cgp" in page
    chance = run(encoder, planted, tmp_path / "permuted", "permute_labels=true", "train.steps=200")
    assert chance["event_f1"] < 0.3
    assert chance["map"] < 0.4  # a third of the patches sound


def narrow(folder: Path) -> Path:
    """The export of an encoder with random weights, wide enough to tell tones apart."""
    import torch

    from bat.encoders.bat import BAT
    from bat.types import Grid
    from bat.weights import export

    torch.manual_seed(0)
    model = BAT(width=48, depth=2, heads=2, grid=Grid(64, 8))
    weights = {"student": model.state_dict()}
    return export(folder, backbone="bat", encoder=model.config(), weights=weights, meta={})


def test_pairs__are_the_largest_matching() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (rng.uniform(0, 2, rng.integers(0, 6)).round(2).tolist() for _ in "ab")
        found = pairs(one, other, 0.2)
        assert len(found) == matches(one, other, 0.2) == reference.matches(one, other, 0.2)
        assert all(abs(one[i] - other[j]) <= 0.2 for i, j in found)
        for side in zip(*found, strict=True):
            assert len(set(side)) == len(found)


def test_compared__marks_what_matches_and_scores_the_clip() -> None:
    true = [(1.0, 2.0, 0), (3.0, 4.0, 1), (5.0, 6.0, 0)]
    predicted = [(5.1, 5.5, 0), (1.15, 2.0, 0), (3.0, 4.0, 0)]
    clip = compared("x", predicted, true, 0.2)
    assert [event[3] for event in clip.reference] == [True, False, True]
    assert [event[3] for event in clip.predicted] == [True, True, False]
    assert clip.score == pytest.approx(2 * 2 / 6)
    assert clip.wrong == 2
