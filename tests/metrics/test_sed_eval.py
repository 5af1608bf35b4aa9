"""Event metrics equal sed_eval and psds_eval, where these are installed.

Neither is a dependency: sed_eval 0.2.1 imports pkg_resources (``setuptools<81``), psds_eval 0.5.3
calls what pandas 3 has removed (``pandas<3``). Both need no torch; in an environment of their own:
``pytest --noconftest tests/metrics/test_sed_eval.py``.
"""

from __future__ import annotations

import importlib.metadata
import warnings

import numpy as np
import pytest

from bat.metrics.events import Event, Events
from bat.metrics.psds import Psds, Scenario, joined

CASES = 1_000
NAMES = ("cough", "door", "phone")
SECONDS = 10.0


def apart(rng: np.random.Generator, count: int, c: int) -> list[Event]:
    """Events of class ``c`` that do not overlap, on a grid that makes ties and exact borders."""
    times = np.sort(rng.choice(int(SECONDS * 20), 2 * count, replace=False)) / 20
    return [(float(a), float(b), c) for a, b in times.reshape(-1, 2)]


def scene(rng: np.random.Generator, *, least: int = 0) -> list[Event]:
    return [e for c in range(len(NAMES)) for e in apart(rng, int(rng.integers(least, 5)), c)]


def listed(events: list[Event], file: str) -> list[dict[str, object]]:
    return [
        {"filename": file, "onset": a, "offset": b, "event_onset": a, "event_offset": b,
         "event_label": NAMES[c]} for a, b, c in events
    ]  # fmt: skip


def test_events__equal_sed_eval() -> None:
    warnings.simplefilter("ignore")
    sed_eval = pytest.importorskip("sed_eval", reason="sed_eval is not installed")
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        ours = Events(classes=len(NAMES))
        theirs = sed_eval.sound_event.EventBasedMetrics(
            list(NAMES), t_collar=0.2, evaluate_onset=True, evaluate_offset=False,
            event_matching_type="optimal",
        )  # fmt: skip
        segments = sed_eval.sound_event.SegmentBasedMetrics(list(NAMES), time_resolution=1.0)
        for clip in range(int(rng.integers(1, 4))):
            true = scene(rng)
            jitter = rng.normal(0, 0.2, len(true)).round(3)
            guessed = [
                (round(min(max(a + d, 0), b - 0.01), 3), b, c)
                for (a, b, c), d in zip(true, jitter, strict=True)
                if rng.random() < 0.8
            ] + scene(rng)[:2]
            ours.update(guessed, true)
            for metric, more in ((theirs, {}), (segments, {"evaluated_length_seconds": SECONDS})):
                metric.evaluate(listed(true, f"{clip}"), listed(guessed, f"{clip}"), **more)
        found = ours.compute()
        expected = {
            "event_f1": theirs.results_overall_metrics()["f_measure"]["f_measure"],
            "segment_f1": segments.results_overall_metrics()["f_measure"]["f_measure"],
        }
        for name, value in expected.items():
            if np.isnan(found[name]):  # nothing estimated and nothing there
                assert np.isnan(value) or value == 0
            else:
                assert found[name] == pytest.approx(value if value == value else 0.0, abs=1e-9)


@pytest.mark.parametrize(
    "scenario",
    [Scenario(0.7, 0.7, 1.0, 0.0), Scenario(0.1, 0.1, 0.3, 0.5), Scenario(0.5, 0.5, 0.3, 1.0, 0.0)],
)
def test_psds__equals_psds_eval(scenario: Scenario) -> None:
    warnings.simplefilter("ignore")
    psds_eval = pytest.importorskip("psds_eval", reason="psds_eval is not installed")
    if int(importlib.metadata.version("pandas").split(".")[0]) > 2:
        pytest.skip("psds_eval 0.5.3 needs pandas<3")
    import pandas

    rng = np.random.default_rng(1)
    for case in range(CASES // 3 + 1):
        most = float(rng.choice([100, 1_000, 5_000]))  # of small sets the rates are high
        scenario = scenario._replace(most_per_hour=most)
        ours = Psds(classes=len(NAMES), scenarios={"psds1": scenario})
        clips = [scene(rng, least=1) for _ in range(2)]
        sweeps = [[] for _ in clips]
        points = []
        for level in np.linspace(0, 1, 4):
            rows = []
            for i, true in enumerate(clips):
                wide = [
                    (max(0.0, a - rng.uniform(0, 0.4)), min(SECONDS, b + rng.uniform(0, 0.4)), c)
                    for a, b, c in true if rng.random() > level
                ] + [(a, b, 2 - c) for a, b, c in scene(rng) if rng.random() > level]  # fmt: skip
                found = [
                    (float(a), float(b), c) for c in range(len(NAMES))
                    for a, b in joined([e[:2] for e in wide if e[2] == c])
                ]  # fmt: skip
                sweeps[i].append(found)
                rows += listed(found, f"{i}")
            points.append(pandas.DataFrame(rows, columns=["filename", "onset", "offset",
                                                          "event_label"]))  # fmt: skip
        for sweep, true in zip(sweeps, clips, strict=True):
            ours.update((SECONDS, sweep), true)
        truth = pandas.DataFrame([r for i, c in enumerate(clips) for r in listed(c, f"{i}")])
        lengths = pandas.DataFrame({"filename": ["0", "1"], "duration": [SECONDS] * 2})
        theirs = psds_eval.PSDSEval(
            dtc_threshold=scenario.dtc, gtc_threshold=scenario.gtc, cttc_threshold=scenario.cttc,
            ground_truth=truth[["filename", "onset", "offset", "event_label"]], metadata=lengths,
        )  # fmt: skip
        for point in points:
            theirs.add_operating_point(point)
        value = theirs.psds(
            alpha_ct=scenario.alpha_ct, alpha_st=scenario.alpha_st, max_efpr=most
        ).value
        assert ours.compute()["psds1"] == pytest.approx(value, abs=1e-9), case


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
