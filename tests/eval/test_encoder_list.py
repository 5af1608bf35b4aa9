"""Encoder lists: names, random-init baselines, results of fine-tuning."""

import json

import pytest
import torch

from bat.config.schema import Probe
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.encoder_list import encoders_of, finetuned_of
from bat.types import Grid
from bat.weights import export


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one architecture, one of another."""
    folder = tmp_path_factory.mktemp("runs")
    for name, width, seed in (("a", 16, 0), ("b", 16, 1), ("wide", 32, 0)):
        torch.manual_seed(seed)
        model = BAT(width=width, depth=2, heads=2, grid=Grid(13, 8))
        export(folder / name / "export", backbone="bat", encoder=model.config(),
               weights={"student": model.state_dict()}, meta={})  # fmt: skip
    return folder


def _config(*checkpoints, **words) -> Probe:
    return Probe(checkpoint=",".join(map(str, checkpoints)), **words)


def test_encoders_of__one_random_baseline_for_each_architecture(runs):
    a, b, wide = runs / "a", runs / "b", runs / "wide"
    assert encoders_of(_config(a, b, "random")) == {
        "a": str(a), "b": str(b), "random-a": f"random:{a}"}  # fmt: skip
    found = encoders_of(_config(a, "random", wide))
    assert list(found) == ["a", "random-a", "random-wide", "wide"]
    assert encoders_of(_config("random")) == {"random": "random"}
    assert list(encoders_of(_config("random:S", a))) == ["random-S", "a"]
    assert list(encoders_of(_config(f"random:{a}", a, "random"))) == ["random-a", "a"]


def test_encoders_of__equal_names_are_numbered(runs):
    found = encoders_of(_config(runs / "a", runs / "a/export"))
    assert list(found) == ["a", "a-2"]


def test_encoders_of__path_with_a_comma(tmp_path):
    (tmp_path / "x,y").mkdir()
    assert list(encoders_of(_config(tmp_path / "x,y"))) == ["x,y"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no checkpoint given"), ("a,,b", "empty name"), ("random,random", "names random twice")],
)
def test_encoders_of__mistakes_are_named(text, said):
    with pytest.raises(UserError, match=said):
        encoders_of(Probe(checkpoint=text))


def test_finetuned_of__numbers_and_runs(runs, tmp_path):
    run = {"task": "toy", "results": {"linear": {"mean": {"accuracy": 0.75}}}}
    (tmp_path / "summary.json").write_text(json.dumps(run))
    config = _config(runs / "a", "random", runs / "b", finetuned=["97.5", "none", str(tmp_path)])
    names = list(encoders_of(config))
    found = finetuned_of(config, names, task="toy", metric="accuracy", data="x")
    assert found == {"a": 0.975, "b": 0.75}
    joined = _config(runs / "a", runs / "b", finetuned=[f"none, {tmp_path}"])
    assert finetuned_of(joined, ["a", "b"], task="toy", metric="accuracy", data="x") == {"b": 0.75}
    for entries, said in (
        (["1", "2", "3", "4"], "4 entries for 3"),
        (["101"], "no percentage"),
        (["nan"], "no percentage"),
        ([str(runs)], "no finished run of bat-finetune"),
    ):
        config.finetuned = entries
        with pytest.raises(UserError, match=said):
            finetuned_of(config, names, task="toy", metric="accuracy", data="x")
    (tmp_path / "summary.json").write_text(json.dumps({**run, "data": "y"}))
    config.finetuned = [str(tmp_path)]
    with pytest.raises(UserError, match="evaluated on other clips"):
        finetuned_of(config, names, task="toy", metric="accuracy", data="x")
    assert finetuned_of(config, names, task="toy", metric="accuracy", data="y") == {"a": 0.75}
    with pytest.raises(UserError, match="is of task 'toy', this probe run of 'esc10'"):
        finetuned_of(config, names, task="esc10", metric="accuracy", data="x")
