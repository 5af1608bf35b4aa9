"""The objective seam: choosing one in the settings, one from outside, the example of the docs."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bat
from bat.config.compose import compose, from_yaml, to_dict, to_yaml
from bat.config.schema import Pretrain
from bat.errors import UserError
from bat.io import read_jsonl
from bat.objectives.base import Objective, check_encoders, check_scalars, find_objective
from bat.train.pretrain import build_objective
from bat.train.run_pretrain import pretrain
from tests.train.runs import assert_same_run, run_and_cut

EXAMPLE = "my_objectives.Contrastive"


@pytest.fixture
def page(docs_example: Callable[[str, str], str]) -> str:
    """docs/add_an_objective.md, with ``EXAMPLE`` importable."""
    return docs_example("add_an_objective.md", "my_objectives")


SMALL = ["recipe=toy", "model.width=48", "model.depth=2", "model.heads=2", "train.steps=4"]
SMALL += ["train.save_every=2", "train.log_every=1", "log.progress=false"]
SMALL += ["online.every=2", "online.steps=2", "online.folds=1"]


def settings(*words: str) -> Pretrain:
    return compose(Pretrain, "pretrain", [*SMALL, *words])


def test_objective_outside__trains_resumes_exports_and_is_probed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"objective.name={EXAMPLE}", "objective.temperature=0.1"]
    words += [f"data.cache={tmp_path / 'shards'}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(settings(*words, f"out={whole}"))
    run_and_cut(monkeypatch, settings(*words, f"out={parts}"), at=3)
    pretrain(settings(*words, f"out={parts}"))
    assert_same_run(whole, parts)
    rows = [r for r in read_jsonl(whole / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(0 <= r["contrastive_accuracy"] <= 1 for r in rows)
    assert bat.load_encoder(whole).depth == 2
    moved = build_objective(settings(*words)).encoders()["student"].state_dict()
    assert set(bat.load_encoder(whole).state_dict()) == set(moved)
    assert (whole / "plots" / "masks.png").is_file()
    assert from_yaml(Pretrain, whole / "config.yaml").objective.temperature == 0.1
    (said,) = re.findall(r"^PYTHONPATH=. bat-pretrain (.*)$", page, re.MULTILINE)
    line = said.split()
    assert compose(Pretrain, "pretrain", line).objective.name == EXAMPLE


def test_objective_outside__its_settings_are_checked_as_all_others(page: str) -> None:
    words = [f"objective.name={EXAMPLE}", "objective.temprature=1", "objective.projection=x"]
    with pytest.raises(UserError) as caught:
        settings(*words)
    assert "did you mean 'objective.temperature'" in str(caught.value)
    assert "'objective.projection=x' (command line) has the wrong type" in str(caught.value)
    with pytest.raises(UserError, match=r"objective\.temperature=-1\.0 must be positive"):
        settings(words[0], "objective.temperature=-1")


def test_choice__an_objective_of_the_command_line_replaces_the_recipes_section(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = settings("objective=mae", "objective.decoder_depth=3")
    assert (chosen.objective.name, chosen.objective.decoder_depth) == ("mae", 3)
    assert not hasattr(chosen.objective, "mask")
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "mae" in line
    assert "objective.mask.views" in line
    caplog.clear()
    by_name = settings("objective.name=mae", "objective.decoder_depth=3")
    assert to_dict(by_name) == to_dict(chosen)
    caplog.clear()
    same = settings("objective=masked_latent")  # the recipe's own: its values stay
    assert to_dict(same) == to_dict(settings())
    assert same.objective.mask.views == 4
    assert not caplog.records


def test_choice__a_recipe_chooses_by_name_or_fragment(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("use: [model/tiny, objective/mae]\nobjective: {mask_ratio: 0.7}\n")
    by_fragment = compose(Pretrain, "pretrain", [f"recipe={recipe}"])
    recipe.write_text("use: [model/tiny]\nobjective: {mask_ratio: 0.7, name: mae}\n")
    by_name = compose(Pretrain, "pretrain", [f"recipe={recipe}"])
    assert to_dict(by_name) == to_dict(by_fragment)
    assert (by_name.objective.name, by_name.objective.mask_ratio) == ("mae", 0.7)
    back = compose(Pretrain, "pretrain", [f"recipe={recipe}", "objective=masked_latent"])
    assert back.objective.mask.ratio == 0.8


def test_choice__written_settings_read_back(tmp_path: Path) -> None:
    config = settings("objective=mae")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = from_yaml(Pretrain, tmp_path / "config.yaml")
    assert to_dict(again) == to_dict(config)
    assert type(again.objective) is type(config.objective)


def test_old_keys__are_refused_with_the_new_name(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings("mask.views=2", "ema.start=0.9")
    assert "'mask.views' (command line) is now 'objective.mask.views'" in str(caught.value)
    assert "'ema.start' (command line) is now 'objective.ema.start'" in str(caught.value)
    old = to_dict(settings())
    objective = old["objective"]
    old |= {"mask": objective.pop("mask"), "ema": objective.pop("ema")}
    del objective["name"]
    (tmp_path / "config.yaml").write_text(to_yaml(old))
    with pytest.raises(UserError, match=r"does not fit this version[^$]*'objective\.ema\.steps'"):
        from_yaml(Pretrain, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("masked_latnt", "did you mean 'masked_latent'"),
        ("base", "unknown objective.name=base"),
        ("no_such_module.Thing", r"cannot import objective.name=no_such_module.Thing.*PYTHONPATH="),
        ("torch.nn.Linear", "torch.nn.Linear is not a subclass of bat.objectives.base.Objective"),
        (f"{__name__}.Undecorated", "Undecorated.Config must be a @dataclass"),
    ],
)
def test_names__what_is_wrong_is_said(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_objective(name)


class Undecorated(Objective):
    class Config(Objective.Config):
        width: int = 3


def test_encoder_without_views__is_refused_by_objectives_that_hide_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bat.encoders.base import Encoder
    from bat.objectives.mae import MAE
    from bat.objectives.masked_latent import MaskedLatent

    class Whole(Encoder):
        from_weights = config = features = inputs = first = None  # type: ignore[assignment]
        hop_seconds = time_patches = None  # type: ignore[assignment]

    for objective in (MAE, MaskedLatent):
        with pytest.raises(UserError, match=r"Whole cannot do .*model\.backbone"):
            objective.build(objective.Config(), Whole(), seed=0)


def test_whole_graphs__are_refused_where_an_objective_names_none(page: str) -> None:
    model = build_objective(settings(f"objective.name={EXAMPLE}"))
    type(model).graphs = ()
    with pytest.raises(UserError, match=r"hardware\.compile=whole.*hardware\.compile=blocks"):
        model.speed_up(compile="whole")


def test_large_model__has_the_papers_decoder() -> None:
    config = compose(Pretrain, "pretrain", ["recipe=as2m", "model=L"])
    with torch.device("meta"):
        decoder = build_objective(config).student.decoder
    assert (decoder.in_proj.in_features, decoder.in_proj.out_features) == (1024, 768)


class _Unfinished(Objective):
    def forward(self, batch):
        return {"loss": torch.zeros(())}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.zeros(()), "must return a dictionary with 'loss'"),
        ({"total": torch.zeros(())}, "must return a dictionary with 'loss'"),
        ({"loss": 1.0}, "float as 'loss'"),
        ({"loss": torch.zeros(()), "accuracy": torch.zeros(3)}, r"\(3,\) as 'accuracy'"),
    ],
)
def test_forward__what_is_no_dictionary_of_scalars_is_named(page: str, returned, said) -> None:
    objective = build_objective(settings(f"objective.name={EXAMPLE}"))
    with pytest.raises(UserError, match=f"Contrastive.forward .*{said}"):
        check_scalars(objective, returned)


def test_encoders__must_name_a_student(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_objective(settings(f"objective.name={EXAMPLE}"))
    check_encoders(objective)
    encoder = objective.encoders()["student"]
    monkeypatch.setattr(type(objective), "encoders", lambda self: {"model": encoder})
    with pytest.raises(UserError, match=r"Contrastive.encoders\(\) must return .*'model'"):
        check_encoders(objective)


def test_find_objective__missing_methods_are_named() -> None:
    with pytest.raises(UserError, match="_Unfinished lacks build, encoders"):
        find_objective(f"{__name__}._Unfinished")
