"""Rounds, label checks and the table."""

from types import SimpleNamespace

import numpy as np
import pytest

from bat.data.index import open_index
from bat.data.toy import make_toy
from bat.shapes import UserError
from bat.tasks.base import load_task
from bat.train.held_out import check_labels, make_rounds
from bat.train.results import Outcome, gate_bars, summary, table


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return open_index(make_toy(tmp_path_factory.mktemp("toy"), seconds=0.2))


def test_every_fold_is_held_out_once(index):
    rounds = make_rounds(index)
    assert [r.name for r in rounds] == ["1", "2"]
    for held in rounds:
        assert sorted([*held.train, *held.test]) == list(range(10))
    assert np.array_equal(rounds[0].test, rounds[1].train)
    assert [r.name for r in make_rounds(index, [2])] == ["2"]


def test_impossible_folds_are_errors(index):
    with pytest.raises(UserError, match="no clip has fold 3"):
        make_rounds(index, [3])
    with pytest.raises(UserError, match="holds nothing out"):
        make_rounds(index, [])
    one = SimpleNamespace(folds=[1], splits=[])
    with pytest.raises(UserError, match="two folds are needed"):
        make_rounds(one)
    with pytest.raises(UserError, match="neither folds nor a train and a test split"):
        make_rounds(SimpleNamespace(folds=[], splits=["train"]))


def test_splits_make_one_round():
    ids = {"train": np.array([0, 1]), "test": np.array([2])}
    index = SimpleNamespace(folds=[], splits=["test", "train"], clips_in_split=ids.__getitem__)
    (held,) = make_rounds(index)
    assert held.name == "test"
    assert held.train.tolist() == [0, 1]
    assert held.test.tolist() == [2]
    with pytest.raises(UserError, match="the data has no folds"):
        make_rounds(index, [1])


def test_label_sets_that_do_not_match(index):
    check_labels(load_task("toy"), index)
    with pytest.raises(UserError, match="'esc10' has 10 classes, the data has 5"):
        check_labels(load_task("esc10"), index)
    with pytest.raises(UserError, match="1 of 3 clips have no label"):
        check_labels(load_task("toy"), _Unlabelled())


def test_other_labels_of_the_same_number_are_listed():
    own, in_esc50 = load_task("esc10").label_sets

    def index(names):
        return SimpleNamespace(
            classes=10, vocabulary=sorted(names), labels_per_clip=np.ones(3, np.int64)
        )

    for names in (own, in_esc50):
        check_labels(load_task("esc10"), index(names))
    said = "lacks dog_bark, rain; the task does not know cat, snow. Point data.root"
    with pytest.raises(UserError, match=said):
        check_labels(load_task("esc10"), index(own - {"dog_bark", "rain"} | {"cat", "snow"}))


class _Unlabelled:
    classes, vocabulary, labels_per_clip = 5, list("abcde"), np.array([1, 0, 1])

    def __len__(self):
        return 3


def test_summary_and_table():
    outcomes = [
        Outcome("cgp", "1", {"accuracy": 0.5, "map": 0.25, "absent": []}, [0.25, 0.75]),
        Outcome("cgp", "2", {"accuracy": 0.75, "map": 0.5, "absent": [3]}, [0.5, 0.5]),
    ]
    found = summary(outcomes)["cgp"]
    assert found["mean"] == {"accuracy": 0.625, "map": 0.375}
    assert found["std"]["accuracy"] == pytest.approx(0.125 * 2**0.5)
    assert found["gate"] == {"1": [0.25, 0.75], "2": [0.5, 0.5]}
    text = table({"cgp": found})
    assert "62.50 ± 17.68" in text
    assert "fold 2" in text
    assert "1 class(es) without a held-out clip" in text


def test_gate_bars_are_scaled_to_the_largest():
    lines = gate_bars([0.25, 0.75], width=6).splitlines()
    assert [line.count("█") for line in lines] == [2, 6]
    assert "0.750" in lines[1]
