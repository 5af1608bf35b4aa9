"""Sections and tables of probing summaries: whose numbers stand where, what is marked and said."""

import copy
import math
from typing import Any

import pytest

from bat.report.cells import grid, number, ranking
from bat.report.sections import sections
from bat.report.tables import as_markdown, as_text, comparison, plain
from tests.report.probe_summaries import METHODS, summary


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_methods_are_rows_and_encoders_columns() -> None:
    given = summary()
    [section] = sections([given])
    header, cells, best = grid(section, ["accuracy"])
    assert header == ["probe", "A", "B", "random"]
    assert [line[0] for line in cells] == list(METHODS)
    for name, column in (("A", 1), ("B", 2), ("random", 3)):
        for row, method in enumerate(METHODS):
            entry = given["encoders"][name]["results"][method]
            mean, std = 100 * entry["mean"]["accuracy"], 100 * entry["std"]["accuracy"]
            assert cells[row][column] == f"{mean:.2f} ± {std:.2f}"
    assert not best  # no interval says so


@pytest.mark.parametrize(("low", "leads"), [(0.01, True), (-0.01, False), (math.nan, False)])
def test_grid__best_is_marked_only_beyond_the_paired_interval(low: float, leads: bool) -> None:
    given = summary(encoders=["A", "B"], methods=["linear", "cgp", "lcgp"])
    [section] = sections([given])
    own = [row for row in section.ranking if row.encoder == "A"]
    given["differences"] = [
        {"of": ["A", own[0].method], "minus": ["A", r.method], "difference": 0.02, "interval": i}
        for r, i in ((own[1], [low, 0.03]), (own[2], [0.01, 0.03]))
    ]
    [section] = sections([given])
    row = section.methods.index(own[0].method)
    assert grid(section, ["accuracy"])[2] == ({(row, 1)} if leads else set())
    assert ("better than every other" in as_text([given])) == leads
    assert ("**" in as_markdown([given])) == leads
    [alone] = sections([summary(encoders=["A"], methods=["linear"])])
    assert not grid(alone, ["accuracy"])[2]  # one probe leads nothing


def test_ranking_and_comparison_start_with_the_best_and_hold_all() -> None:
    given = summary()
    given["encoders"]["A"]["results"]["curve@3"] = given["encoders"]["A"]["results"]["cgp"]
    rows = comparison([given])
    assert len(rows) == 9
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True)
    entry = given["encoders"][rows[0]["encoder"]]["results"][rows[0]["method"]]
    assert (rows[0]["low"], rows[0]["high"]) == tuple(entry["interval"])
    header, cells = ranking(sections([given])[0])
    assert [c[1:3] for c in cells] == [[row["method"], row["encoder"]] for row in rows]
    assert header[-1] == "parameters"
    assert {line[-1] for line in cells} == {"23.53 M"}


def test_a_mean_that_is_no_number_comes_last_and_is_a_dash() -> None:
    given = summary(encoders=["A"])
    given["encoders"]["A"]["results"]["linear"]["mean"]["accuracy"] = math.nan
    [section] = sections([given])
    assert section.ranking[-1].method == "linear"
    assert ranking(section)[1][-1][3] == number(None)


def test_dprime_is_not_in_percent() -> None:
    header, cells, _ = grid(sections([summary(encoders=["A"])])[0], ["accuracy", "dprime"])
    assert header == ["probe", "accuracy", "d-prime"]
    assert cells[0][2] == "1.81 ± 0.00"


def test_gap_to_fine_tuning_and_gains_over_the_untrained() -> None:
    given = summary()
    pairs = [(g.row, g.control) for g in sections([given])[0].gains()]
    assert {row.encoder for row, _ in pairs} == {"A", "B"}
    assert all(c.encoder == "random" and c.method == row.method for row, c in pairs)
    assert len(pairs) == 2 * len(METHODS)  # every probe, not the best alone
    gaps = {gap.encoder: gap for gap in sections([given])[0].gaps()}
    row = sections([given])[0].best("A")
    assert row is not None
    assert gaps["A"].finetuned == 0.952
    text = as_text([given])
    mean = row.entry["mean"]["accuracy"]
    expected = f"{100 * (mean - 0.952):+.2f}"
    assert any(expected in line for line in lines_of(text, "A "))
    one, other = pairs[0]
    gain = {"difference": 0.04, "interval": [-0.001, 0.082]}
    names = {"of": [one.encoder, one.method], "minus": [other.encoder, other.method]}
    given["differences"] = [names | gain]
    assert any("+4.00 [-0.10, 8.20]" in line for line in lines_of(as_text([given]), "A "))
    assert "flattered by the choice" in as_text([given])
    given["encoders"]["random"]["width"] = 384  # of another shape: no control of these
    assert not sections([given])[0].gains()
    assert "Gain over untrained" not in as_text([given])


def test_f1_of_zero_is_explained() -> None:
    given = summary(encoders=["A"], methods=["linear", "cgp"])
    assert "above 0.5" not in as_text([given])
    given["encoders"]["A"]["results"]["cgp"]["mean"]["f1"] = 0.0
    assert "above 0.5" in as_text([given])


@pytest.mark.parametrize(
    ("folds", "seeds", "said"),
    [
        (("1", "2"), (0, 1), "over seeds, each the mean of its rounds"),
        (("1", "2"), (0,), "over rounds (folds); there is one seed"),
        (("eval",), (0,), "nothing tells how far training varies"),
    ],
)
def test_what_deviations_are_over_is_said(
    folds: tuple[str, ...], seeds: tuple[int, ...], said: str
) -> None:
    given = [summary(folds=folds, seeds=seeds)]
    for text in (as_text(given), as_markdown(given)):
        assert said in text
        assert ("±" in text) == (len(folds) * len(seeds) > 1)


def test_left_out_classes_class_tokens_and_permuted_labels_are_said() -> None:
    given = summary()
    given["control"] = "permuted"
    given["encoders"]["B"]["cls_rule"] = "no class token in this encoder: the mean patch instead"
    for text in (as_text([given]), as_markdown([given])):
        assert "left out of that round's macro means: sea" in text
        assert "B: no class token in this encoder: the mean patch instead." in text
        assert "every clip has another clip's labels" in text
        assert "esc10 with permuted labels" in text


def test_one_probe_of_one_encoder_shows_its_rounds() -> None:
    given = summary(encoders=["A"], methods=["cgp"], seeds=[0])
    entry = given["encoders"]["A"]["results"]["cgp"]
    text = as_text([given])
    shown = [line.split() for line in lines_of(text, "A ") if line.split()[1] == "cgp"][:5]
    assert [line[2] for line in shown] == ["1", "2", "3", "4", "5"]
    assert [line[4] for line in shown] == [
        f"{100 * fold['0']['accuracy']:.2f}" for fold in entry["folds"].values()
    ]
    assert f"mean accuracy {100 * entry['mean']['accuracy']:.2f} ±" in text


def test_runs_of_one_task_stand_side_by_side() -> None:
    one, two = summary(encoders=["A"]), summary(encoders=["B"], draw=1)
    [section] = sections([one, two])
    assert list(section.encoders) == ["A", "B"]
    assert section.differ == []
    two["protocol"] = {**two["protocol"], "selection": "none"}
    two["seeds"], two["steps"] = [0], 50
    [section] = sections([one, two])
    assert section.differ == [
        "seeds",
        "steps (400, 50)",
        "protocol.selection (validation, none)",
    ]
    assert "differ in seeds, steps (400, 50), protocol.selection (validation, none)" in as_text(
        [one, two]
    )
    assert len(sections([one, summary(task="scv2")])) == 2
    assert len(sections([one, summary(labels=["a", "b", "c"])])) == 2
    assert len(sections([one, {**one, "control": "permuted"}])) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": {"prototypes": 4}}, "head.prototypes (10000, 4)"),
        ({"head": {"per_class": 3}}, "head.per_class (null, 3)"),
        ({"optim": {"lr": 0.03}}, "optim.lr (0.001, 0.03)"),
        ({"data": "00ff"}, "the data (other clips, labels or folds)"),
        ({"clip_seconds": 1.5}, "clip_seconds (5.0, 1.5)"),
        ({"min_steps": 300}, "min_steps (null, 300)"),
        ({"confidence": 0.9}, "confidence (0.95, 0.9)"),
        ({"encoders": {"A": {"frames": 1024}}}, "frames of A (512, 1024)"),
    ],
)
def test_what_runs_do_not_have_in_common_is_said(changes: dict[str, Any], said: str) -> None:
    one = summary(encoders=["A"], methods=["linear"])
    two = summary(encoders=["A"], methods=["cgp"])
    assert sections([one, two])[0].differ == []

    def change(tree: dict[str, Any], by: dict[str, Any]) -> None:
        for key, value in by.items():
            if isinstance(value, dict):
                change(tree[key], value)
            else:
                tree[key] = value

    change(two, changes)
    assert sections([one, two])[0].differ == [said]
    assert f"they differ in {said}. Compare with care." in as_text([one, two])


def test_runs_that_do_not_say_their_settings_are_not_taken_for_alike() -> None:
    """Of a version before they were written down."""
    one, two = summary(encoders=["A"]), summary(encoders=["B"])
    for key in ("head", "optim", "data", "clip_seconds"):
        del two[key]
    [section] = sections([one, two])
    assert section.differ == [
        "the data (other clips, labels or folds)",
        "clip_seconds (5.0, null)",
        "head (unknown of 1)",
        "optim (unknown of 1)",
    ]
    for key in ("head", "optim", "data", "clip_seconds"):
        del one[key]
    assert sections([one, two])[0].differ == []


def test_the_same_encoder_gets_its_methods_together_another_one_another_name() -> None:
    one = summary(encoders=["A"], methods=["linear"])
    two = summary(encoders=["A"], methods=["cgp"]) | {"run": "second"}
    before = copy.deepcopy(one)
    [section] = sections([one, two])
    assert {name: list(e["results"]) for name, e in section.encoders.items()} == {
        "A": ["linear", "cgp"]
    }
    assert one == before
    two["encoders"]["A"]["digest"] = "of other weights"
    assert list(sections([one, two])[0].encoders) == ["A", "A (second)"]
    again = summary(encoders=["A"], methods=["linear"], draw=5) | {"run": "third"}
    assert list(sections([one, again])[0].encoders) == ["A", "A (third)"]


def test_paired_differences_stand_in_the_ranking_of_a_single_run() -> None:
    given = summary(encoders=["A"], methods=["linear", "cgp"])
    [first, last] = sections([given])[0].ranking
    given["differences"] = [
        {
            "of": ["A", first.method],
            "minus": ["A", last.method],
            "difference": 0.021,
            "interval": [-0.01, 0.05],
        }
    ]
    header, cells = ranking(sections([given])[0])
    assert header[-1] == "best minus this"
    assert [cells[0][1], cells[0][-1]] == [first.method, ""]
    assert cells[1][-1] == "+2.10 [-1.00, 5.00]"
    other = summary(encoders=["B"])
    assert "best minus this" not in ranking(sections([given, other])[0])[0]


def test_class_precision_is_the_mean_where_it_is_defined() -> None:
    given = summary(encoders=["A"], methods=["cgp"], folds=["1", "2"], seeds=[0])
    folds = given["encoders"]["A"]["results"]["cgp"]["folds"]
    folds["1"]["0"]["per_class"]["ap"] = [0.2, None, None, 0.5, 1.0]
    folds["2"]["0"]["per_class"]["ap"] = [0.4, 0.3, None, 0.5, 0.0]
    [section] = sections([given])
    assert section.class_precision(section.rows[0]) == pytest.approx([0.3, 0.3, None, 0.5, 0.5])


def test_markdown_is_a_table_whatever_names_hold() -> None:
    given = summary(encoders=["a|b*c", "[x](http://evil)"], methods=["cgp", "linear"])
    text = as_markdown([given])
    table = [line for line in text.splitlines() if line.startswith("|")]
    header, rule, *rows = table[:4]
    assert header == r"| probe | a\|b\*c | [x]\(http://evil) |"
    assert rule == "| --- | ---: | ---: |"
    assert [row.split(" | ")[0] for row in rows] == ["| cgp", "| linear"]
    assert plain("a\n# b\t<i>") == r"a \# b \<i\>"
    assert "Protocol: name=validated" in text
