"""Event metrics equal those of sed_eval and psds_eval, whose scores of 1,000 and 90 random cases
``tools/event_scores.py`` has written to ``event_scores.json``: they cannot be installed here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bat.metrics.events import Event, Events
from bat.metrics.psds import Psds, Scenario

TOOLS = Path(__file__).resolve().parents[2] / "tools"
STORED: dict[str, Any] = json.loads(Path(__file__).with_name("event_scores.json").read_text())


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "event_scores.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("event_scores")


def test_events__equal_sed_eval(tool: ModuleType) -> None:
    cases, stored = list(tool.event_cases()), STORED["sed_eval"]
    assert tool.digest(cases) == stored["cases"], "numpy draws other cases: write the file anew"
    assert len(cases) == 1_000
    for number, clips in enumerate(cases):
        metric = Events(classes=len(tool.NAMES))
        for guessed, true in clips:
            metric.update(guessed, true)
        found = metric.compute()
        for name in ("event_f1", "segment_f1"):  # 0 of sed_eval: nothing estimated, nothing there
            value = np.nan_to_num(found[name])
            assert value == pytest.approx(stored[name][number], abs=1e-9), (name, number)


@pytest.mark.parametrize("which", range(3))
def test_psds__equals_psds_eval(which: int, tool: ModuleType) -> None:
    cases, stored = list(tool.psds_cases(tool.SCENARIOS[which])), STORED["psds_eval"][which]
    assert tool.digest(cases) == stored["cases"], "numpy draws other cases: write the file anew"
    assert len(cases) == 30
    for number, (scenario, clips) in enumerate(cases):
        metric = Psds(classes=len(tool.NAMES), scenarios={"psds1": scenario})
        for sweep, true in clips:
            metric.update((tool.SECONDS, sweep), true)
        assert metric.compute()["psds1"] == pytest.approx(stored["psds"][number], abs=1e-9), number


def test_psds__by_hand() -> None:
    """10 s with one event of each of two classes; the second threshold finds the other event too,
    with a false detection of its class over the first: 360 an hour, and a cross-trigger on an
    event of 2 s: 1,800 an hour."""
    true: list[Event] = [(1.0, 3.0, 0), (5.0, 7.0, 1), (6.0, 6.5, 1)]  # the last two are one
    sweep = [[(1.0, 3.0, 0)], [(1.0, 3.0, 0), (5.0, 7.0, 1), (1.0, 3.0, 1)]]
    for alpha_ct, alpha_st, value in ((0.0, 0.0, 0.75), (0.0, 1.0, 0.5), (1.0, 0.0, 0.5)):
        metric = Psds(
            classes=3,  # one does not occur
            scenarios={"psds1": Scenario(0.5, 0.5, 0.5, alpha_ct, alpha_st, most_per_hour=720)},
        )
        metric.update((10.0, sweep), true)
        assert metric.compute()["psds1"] == pytest.approx(value)
    empty = Psds(classes=2)
    empty.update((10.0, [[]]), [])
    assert np.isnan(empty.compute()["psds2"])
