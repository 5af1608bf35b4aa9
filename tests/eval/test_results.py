"""Outcomes to summaries and tables; what was written is read back."""

import pytest

from bat.eval.results import FoldResult, gate_bars, summary, table
from bat.train.online import OnlineProbe


def test_summary__means_deviations_and_table():
    fold_results = [
        FoldResult("cgp", "1", {"accuracy": 0.5, "map": 0.25, "absent": []}, [0.25, 0.75]),
        FoldResult("cgp", "2", {"accuracy": 0.75, "map": 0.5, "absent": [3]}, [0.5, 0.5]),
    ]
    found = summary(fold_results)["cgp"]
    assert found["mean"] == {"accuracy": 0.625, "map": 0.375}
    assert found["std"]["accuracy"] == pytest.approx(0.125)
    assert found["gate"] == {"1-0": [0.25, 0.75], "2-0": [0.5, 0.5]}
    assert found["interval"] is None
    text = table({"cgp": found})
    assert "62.50 ± 12.50" in text
    assert "fold 2" in text
    assert "1 class(es) without a held-out clip" in text


def test_gate_bars__scaled_to_the_largest():
    lines = gate_bars([0.25, 0.75], width=6).splitlines()
    assert [line.count("█") for line in lines] == [2, 6]
    assert "0.750" in lines[1]


def test_online_table__percent_but_dprime():
    probe = OnlineProbe.__new__(OnlineProbe)
    probe.rows = [{"step": 0, "method": "cgp", "accuracy": 0.5, "accuracy_std": 0.1,
                   "dprime": 2.77, "dprime_std": 0.0}]  # fmt: skip
    text = probe.table()
    assert "50.0 ± 10.0" in text
    assert "277" not in text
