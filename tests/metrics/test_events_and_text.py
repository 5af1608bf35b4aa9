"""Metrics of events and of texts against slow versions, hand-made cases, and their directions."""

import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from bat.errors import UserError
from bat.metrics.base import Metric, Value, describe, families, find_metric, rank_key
from bat.metrics.bootstrap import draws
from bat.metrics.events import Events, matches
from bat.metrics.text import Text, edits
from tests.reference import events as slow


def test_matches__random_onsets_equal_the_largest_matching() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1_000):
        one, other = (rng.uniform(0, 3, rng.integers(0, 9)).round(1).tolist() for _ in range(2))
        assert matches(one, other, 0.2) == slow.matches(one, other, 0.2)


def test_edits__random_texts_equal_the_recursion() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1_000):
        one, other = ("".join(rng.choice(list("abc"), rng.integers(0, 12))) for _ in range(2))
        assert edits(one, other) == slow.edits(one, other)


def test_events__hand_made_clips_have_the_counted_f1() -> None:
    metric = Events(classes=3)
    # class 0: hit, extra; class 1: missed by a quarter second; class 2 is never there
    metric.update([(0.1, 0.5, 0), (2.0, 2.2, 0), (1.0, 1.5, 1)], [(0.25, 0.6, 0), (1.25, 1.4, 1)])
    metric.update([], [(0.0, 2.5, 1)])
    found = metric.compute()
    assert found["event_f1"] == pytest.approx(2 * 1 / (3 + 3))
    assert found["event_f1_macro"] == pytest.approx((2 * 1 / (2 + 1) + 0) / 2)
    # segments of 1 s: ours (0, c0), (2, c0), (1, c1); theirs (0, c0), (1, c1) and three of c1
    assert found["segment_f1"] == pytest.approx(2 * 2 / (3 + 5))


def test_events__no_event_at_all_is_undefined() -> None:
    metric = Events(classes=2)
    metric.update([], [])
    assert np.isnan(list(metric.compute().values())).all()


def test_text__rates_are_of_all_clips_together() -> None:
    metric = Text()
    metric.update("a cat", "a bat")
    metric.update("", "on")
    assert metric.compute() == {"token_error_rate": 3 / 7, "wer": 2 / 3, "cer": 3 / 7}
    words = Text(joiner=" ")
    words.update(["do", "re"], ["do", "mi", "re"])
    assert words.compute()["token_error_rate"] == words.compute()["wer"] == 1 / 3
    long = Text()
    long.update("aaaa", "b")
    assert long.compute()["cer"] == 4


@pytest.mark.parametrize("value", ["event_f1", "event_f1_macro", "segment_f1"])
def test_replicates__each_draw_is_the_metric_of_the_drawn_clips(value: str) -> None:
    rng = np.random.default_rng(2)
    clips = [
        [[(float(t), float(t) + 0.3, int(rng.integers(2))) for t in rng.uniform(0, 2, 3)]
         for _ in range(2)]
        for _ in range(5)
    ]  # fmt: skip
    metric = Events(classes=2)
    for pair in clips:
        metric.update(*pair)
    found = metric.replicates(value, resamples=7, seed=3)
    (counts,) = draws(5, resamples=7, seed=3)
    for replicate, drawn in zip(found, counts, strict=True):
        again = Events(classes=2)
        for pair, times in zip(clips, drawn, strict=True):
            for _ in range(times):
                again.update(*pair)
        assert replicate == pytest.approx(again.compute()[value])


def test_find_metric__names_directions_and_dotted_paths() -> None:
    assert find_metric("event_f1") == (Events, "event_f1")
    assert rank_key("accuracy", 0.9) > rank_key("accuracy", 0.8)
    assert rank_key("wer", 0.1) > rank_key("wer", 0.2) > rank_key("wer", float("nan"))
    assert find_metric(f"{__name__}.Purity.purity") == (Purity, "purity")
    assert describe("purity").better == "lower"
    assert describe("unheard_of").title == "unheard_of"
    for name in ("event_f", "nowhere.Purity.purity", f"{__name__}.Purity.map"):
        with pytest.raises(UserError, match="metric"):
            find_metric(name)
    assert set(families()) >= {"accuracy", "map", "event_f1", "token_error_rate"}


class Purity(Metric):
    takes: ClassVar = "labels"
    values: ClassVar = {"purity": Value("purity", better="lower")}

    def update(self, predicted, true) -> None: ...

    def compute(self):
        return {"purity": 0.5}


def test_families__reports_need_no_torch() -> None:
    code = "import sys, bat.report.page, bat.eval.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
