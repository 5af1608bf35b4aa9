"""Writes the scores that sed_eval and psds_eval give to random cases of events.

    python tools/event_scores.py tests/metrics/event_scores.json

Needs sed_eval 0.2.1, psds_eval 0.5.3, ``setuptools<81``, ``pandas<3``, ``numpy<2`` and bat's
``bat/metrics`` (no torch): an environment of their own, for bat's has a newer numpy. The cases are
drawn anew from their seed wherever they are needed; ``tests/metrics/test_sed_eval.py`` computes
bat's scores of them and compares them with the file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where bat is only checked out

from bat.metrics.events import Event
from bat.metrics.psds import Scenario, joined

CASES, PSDS_CASES = 1_000, 30
"""Of each scenario; psds_eval takes 0.3 s for one."""
NAMES = ("cough", "door", "phone")
SECONDS = 10.0
SCENARIOS = (
    Scenario(0.7, 0.7, 1.0, 0.0),
    Scenario(0.1, 0.1, 0.3, 0.5),
    Scenario(0.5, 0.5, 0.3, 1.0, 0.0),
)
Clip = tuple[list[Event], list[Event]]
"""Estimated and reference events of a recording."""
Sweep = tuple[list[list[Event]], list[Event]]
"""The same, estimated at several thresholds."""


def apart(rng: np.random.Generator, count: int, c: int) -> list[Event]:
    """Returns events of class ``c`` that do not overlap, on a grid that makes ties and exact
    borders."""
    times = np.sort(rng.choice(int(SECONDS * 20), 2 * count, replace=False)) / 20
    return [(float(a), float(b), c) for a, b in times.reshape(-1, 2)]


def scene(rng: np.random.Generator, *, least: int = 0) -> list[Event]:
    return [e for c in range(len(NAMES)) for e in apart(rng, int(rng.integers(least, 5)), c)]


def event_cases() -> Iterator[list[Clip]]:
    """Yields ``CASES`` cases of one to three recordings."""
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        clips = []
        for _ in range(int(rng.integers(1, 4))):
            true = scene(rng)
            jitter = rng.normal(0, 0.2, len(true)).round(3)
            guessed = [
                (round(min(max(a + float(d), 0.0), b - 0.01), 3), b, c)
                for (a, b, c), d in zip(true, jitter, strict=True)
                if rng.random() < 0.8
            ]
            clips.append((guessed + scene(rng)[:2], true))
        yield clips


def psds_cases(scenario: Scenario) -> Iterator[tuple[Scenario, list[Sweep]]]:
    """Yields ``PSDS_CASES`` cases of two recordings at four thresholds, with the greatest rate."""
    rng = np.random.default_rng(1)
    for _ in range(PSDS_CASES):
        most = float(rng.choice([100, 1_000, 5_000]))  # of small sets the rates are high
        clips: list[Sweep] = [([], scene(rng, least=1)) for _ in range(2)]
        for level in np.linspace(0, 1, 4):
            for sweep, true in clips:
                wide = [
                    (max(0.0, a - rng.uniform(0, 0.4)), min(SECONDS, b + rng.uniform(0, 0.4)), c)
                    for a, b, c in true
                    if rng.random() > level
                ]
                wide += [(a, b, 2 - c) for a, b, c in scene(rng) if rng.random() > level]
                sweep.append(
                    [
                        (float(a), float(b), c)
                        for c in range(len(NAMES))
                        for a, b in joined([e[:2] for e in wide if e[2] == c])
                    ]
                )
        yield scenario._replace(most_per_hour=most), clips


def digest(cases: Any) -> str:
    """Returns a hash of cases, which tells whether a generator still draws the same."""
    return hashlib.sha256(json.dumps(cases).encode()).hexdigest()


def _listed(events: list[Event], file: str) -> list[dict[str, object]]:
    return [
        {"filename": file, "onset": a, "offset": b, "event_onset": a, "event_offset": b,
         "event_label": NAMES[c]} for a, b, c in events
    ]  # fmt: skip


def _sed_eval(clips: list[Clip]) -> tuple[float, float]:
    """Returns event-based F1 by onset and segment-based F1."""
    import sed_eval

    events = sed_eval.sound_event.EventBasedMetrics(
        list(NAMES),
        t_collar=0.2,
        evaluate_onset=True,
        evaluate_offset=False,
        event_matching_type="optimal",
    )
    segments = sed_eval.sound_event.SegmentBasedMetrics(list(NAMES), time_resolution=1.0)
    for i, (guessed, true) in enumerate(clips):
        for metric, more in ((events, {}), (segments, {"evaluated_length_seconds": SECONDS})):
            metric.evaluate(_listed(true, f"{i}"), _listed(guessed, f"{i}"), **more)
    found = (m.results_overall_metrics()["f_measure"]["f_measure"] for m in (events, segments))
    one, other = (0.0 if np.isnan(value) else float(value) for value in found)
    return one, other


def _psds_eval(scenario: Scenario, clips: list[Sweep]) -> float:
    import pandas
    import psds_eval

    columns = ["filename", "onset", "offset", "event_label"]
    truth = pandas.DataFrame([r for i, c in enumerate(clips) for r in _listed(c[1], f"{i}")])
    theirs = psds_eval.PSDSEval(
        dtc_threshold=scenario.dtc,
        gtc_threshold=scenario.gtc,
        cttc_threshold=scenario.cttc,
        ground_truth=truth[columns],
        metadata=pandas.DataFrame({"filename": ["0", "1"], "duration": [SECONDS] * 2}),
    )
    for k in range(4):
        rows = [r for i, c in enumerate(clips) for r in _listed(c[0][k], f"{i}")]
        theirs.add_operating_point(pandas.DataFrame(rows, columns=columns))
    how = {"alpha_ct": scenario.alpha_ct, "alpha_st": scenario.alpha_st}
    return float(theirs.psds(**how, max_efpr=scenario.most_per_hour).value)


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    names = ("sed_eval", "psds_eval", "numpy", "pandas")
    made: dict[str, Any] = {
        "made by": "tools/event_scores.py",
        "with": {name: importlib.metadata.version(name) for name in names},
        "sed_eval": {},
        "psds_eval": [],
    }
    cases = list(event_cases())
    scores = [_sed_eval(clips) for clips in cases]
    made["sed_eval"] = {
        "cases": digest(cases),
        "event_f1": [round(a, 11) for a, _ in scores],
        "segment_f1": [round(b, 11) for _, b in scores],
    }
    for scenario in SCENARIOS:
        drawn = list(psds_cases(scenario))
        values = [round(_psds_eval(*case), 11) for case in drawn]
        made["psds_eval"].append({"cases": digest(drawn), "psds": values})
    Path(path).write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
