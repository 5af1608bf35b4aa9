"""Sections and tables of probe summaries: numbers, marks and notes."""

import copy
import math
from typing import Any

import pytest

from bat.report.sections import sections
from bat.report.tables import as_markdown, as_text, grid, number, plain, ranking
from tests.report.probe_summaries import METHODS, summary


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def add_difference(given: dict[str, Any], one: Any, other: Any, interval: list[float]) -> None:
    names = {"of": [one.encoder, one.method], "minus": [other.encoder, other.method]}
    entry = names | {"difference": 0.04, "interval": interval}
    given.setdefault("differences", []).append(entry)


def test_grid__methods_are_rows_and_encoders_columns() -> None:
    given = summary()
    [section] = sections([given])
    table = grid(section, ["accuracy"])
    assert table.header == ["probe", "A", "B", "random"]
    assert [line[0] for line in table.cells] == list(METHODS)
    for column, name in enumerate(table.header[1:], 1):
        for row, method in enumerate(METHODS):
            entry = given["encoders"][name]["results"][method]
            mean, std = 100 * entry["mean"]["accuracy"], 100 * entry["std"]["accuracy"]
            assert table.cells[row][column] == f"{mean:.2f} ± {std:.2f}"
    assert not table.best  # no interval says so


@pytest.mark.parametrize(("low", "leads"), [(0.01, True), (-0.01, False), (math.nan, False)])
def test_grid__best_is_marked_only_beyond_the_paired_interval(low: float, leads: bool) -> None:
    given = summary(encoders=["A", "B"], methods=["linear", "cgp", "lcgp"])
    [section] = sections([given])
    own = [row for row in section.ranking if row.encoder == "A"]
    add_difference(given, own[0], own[1], [low, 0.03])
    add_difference(given, own[0], own[2], [0.01, 0.03])
    [section] = sections([given])
    row = section.methods.index(own[0].method)
    assert grid(section, ["accuracy"]).best == ({(row, 1)} if leads else set())
    assert ("better than every other" in as_text([given])) == leads
    assert ("**" in as_markdown([given])) == leads
    [alone] = sections([summary(encoders=["A"], methods=["linear"])])
    assert not grid(alone, ["accuracy"]).best  # one probe leads nothing


def test_grid__dprime_is_not_in_percent() -> None:
    table = grid(sections([summary(encoders=["A"])])[0], ["accuracy", "dprime"])
    assert table.header == ["probe", "accuracy", "d-prime"]
    assert table.cells[0][2] == "1.81 ± 0.00"


def test_ranking__best_first_nan_last_without_single_blocks() -> None:
    given = summary()
    results = given["encoders"]["A"]["results"]
    results["curve@3"] = results["cgp"]
    results["linear"]["mean"]["accuracy"] = math.nan
    [section] = sections([given])
    table = ranking(section)
    assert len(table.cells) == 9
    means = [row.entry["mean"]["accuracy"] for row in section.ranking]
    assert means[:-1] == sorted(means[:-1], reverse=True)
    assert table.cells[-1][1:4] == ["linear", "A", number(None)]
    assert table.header[-1] == "parameters"
    assert {line[-1] for line in table.cells} == {"23.53 M"}


def test_ranking__paired_differences_are_shown_for_a_single_run() -> None:
    given = summary(encoders=["A"], methods=["linear", "cgp"])
    [first, last] = sections([given])[0].ranking
    add_difference(given, first, last, [-0.01, 0.05])
    table = ranking(sections([given])[0])
    assert table.header[-1] == "best minus this"
    assert [line[-1] for line in table.cells] == ["", "+4.00 [-1.00, 5.00]"]
    other = summary(encoders=["B"])
    assert "best minus this" not in ranking(sections([given, other])[0]).header


def test_as_text__gap_to_fine_tuning_and_gains_over_random_init() -> None:
    given = summary()
    [section] = sections([given])
    pairs = section.baselines()
    assert {row.encoder for row, _ in pairs} == {"A", "B"}
    assert all(b.encoder == "random" and b.method == row.method for row, b in pairs)
    assert len(pairs) == 2 * len(METHODS)  # every probe, not the best alone
    best = section.best("A")
    assert best is not None
    gap = f"95.20 {100 * (best.entry['mean']['accuracy'] - 0.952):+.2f}"
    text = as_text([given])
    assert any(" ".join(line.split()).endswith(gap) for line in lines_of(text, "A "))
    assert "flattered by this selection" in text
    add_difference(given, *pairs[0], [-0.001, 0.082])
    assert any("+4.00 [-0.10, 8.20]" in line for line in lines_of(as_text([given]), "A "))
    given["encoders"]["random"]["width"] = 384  # of another shape: no baseline of these
    assert not sections([given])[0].baselines()
    assert "Gain over random init" not in as_text([given])


def test_as_text__one_probe_of_one_encoder_shows_its_folds() -> None:
    given = summary(encoders=["A"], methods=["cgp"], seeds=[0])
    entry = given["encoders"]["A"]["results"]["cgp"]
    shown = [line.split() for line in lines_of(as_text([given]), "A ") if " cgp " in line][:5]
    folds = entry["folds"].items()
    assert [line[2] for line in shown] == [fold for fold, _ in folds]
    assert [line[4] for line in shown] == [f"{100 * m['0']['accuracy']:.2f}" for _, m in folds]


@pytest.mark.parametrize(
    ("folds", "seeds", "note"),
    [
        (("1", "2"), (0, 1), "over seeds, each the mean of its folds"),
        (("1", "2"), (0,), "over folds; there is one seed"),
        (("eval",), (0,), "nothing tells how far training varies"),
    ],
)
def test_notes__deviations_are_explained(
    folds: tuple[str, ...], seeds: tuple[int, ...], note: str
) -> None:
    given = [summary(folds=folds, seeds=seeds)]
    for text in (as_text(given), as_markdown(given)):
        assert note in text
        assert ("±" in text) == (len(folds) * len(seeds) > 1)


def test_notes__excluded_classes_class_tokens_permuted_labels_and_f1() -> None:
    given = summary()
    assert "above 0.5" not in as_text([given])
    given["permute_labels"] = True
    given["encoders"]["B"]["cls_rule"] = "no class token in this encoder: the mean patch instead"
    given["encoders"]["A"]["results"]["cgp"]["mean"]["f1"] = 0.0
    for text in (as_text([given]), as_markdown([given])):
        assert "excluded from that fold's macro means: sea" in text
        assert "B: no class token in this encoder: the mean patch instead." in text
        assert "every clip has another clip's labels" in text
        assert "esc10 with permuted labels" in text
        assert "above 0.5" in text


def test_sections__runs_of_one_task_are_merged() -> None:
    one, two = summary(encoders=["A"]), summary(encoders=["B"], draw=1)
    [section] = sections([one, two])
    assert list(section.encoders) == ["A", "B"]
    assert section.differ == []
    two["protocol"] = {**two["protocol"], "selection": "none"}
    two["seeds"], two["steps"] = [0], 50
    [section] = sections([one, two])
    assert section.differ == ["seeds", "steps (400, 50)", "protocol.selection (validation, none)"]
    assert f"they differ in {', '.join(section.differ)}" in as_text([one, two])
    assert len(sections([one, summary(task="scv2")])) == 2
    assert len(sections([one, summary(labels=["a", "b", "c"])])) == 2
    assert len(sections([one, {**one, "permute_labels": True}])) == 2


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"head": {"prototypes": 4}}, "head.prototypes (10000, 4)"),
        ({"head": {"per_class": 3}}, "head.per_class (null, 3)"),
        ({"data": "00ff"}, "the data (other clips, labels or folds, or files and shards)"),
        ({"clip_seconds": None}, "clip_seconds (5.0, null)"),
        ({"confidence": 0.9}, "confidence (0.95, 0.9)"),
        ({"encoders": {"A": {"frames": 1024}}}, "frames of A (512, 1024)"),
    ],
)
def test_sections__differences_between_runs_are_listed(
    changes: dict[str, Any], difference: str
) -> None:
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
    assert sections([one, two])[0].differ == [difference]


def test_sections__methods_of_equal_weights_are_merged_other_weights_renamed() -> None:
    one = summary(encoders=["A"], methods=["linear"])
    two = summary(encoders=["A"], methods=["cgp"]) | {"run": "second"}
    before = copy.deepcopy(one)
    [section] = sections([one, two])
    assert {n: list(e["results"]) for n, e in section.encoders.items()} == {"A": ["linear", "cgp"]}
    assert one == before
    two["encoders"]["A"]["digest"] = "of other weights"
    assert list(sections([one, two])[0].encoders) == ["A", "A (second)"]
    again = summary(encoders=["A"], methods=["linear"], draw=5) | {"run": "third"}
    assert list(sections([one, again])[0].encoders) == ["A", "A (third)"]


def test_class_precision__mean_where_it_is_defined() -> None:
    given = summary(encoders=["A"], methods=["cgp"], folds=["1", "2"], seeds=[0])
    folds = given["encoders"]["A"]["results"]["cgp"]["folds"]
    folds["1"]["0"]["per_class"]["ap"] = [0.2, None, None, 0.5, 1.0]
    folds["2"]["0"]["per_class"]["ap"] = [0.4, 0.3, None, 0.5, 0.0]
    [section] = sections([given])
    assert section.class_precision(section.rows[0]) == pytest.approx([0.3, 0.3, None, 0.5, 0.5])


def test_as_markdown__tables_whatever_names_hold() -> None:
    given = summary(encoders=["a|b*c", "[x](http://evil)"], methods=["cgp", "linear"])
    text = as_markdown([given])
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")][:4]
    assert header == r"| probe | a\|b\*c | [x]\(http://evil) |"
    assert rule == "| --- | ---: | ---: |"
    assert [row.split(" | ")[0] for row in rows] == ["| cgp", "| linear"]
    assert plain("a\n# b\t<i>") == r"a \# b \<i\>"
    assert "Protocol: name=validated" in text
