"""Strict configuration: precedence, fragments, every problem at once, every shipped file."""

import shutil
from pathlib import Path

import pytest

from bat.config import locate
from bat.config.compose import compose, from_yaml, to_dict, to_yaml
from bat.config.schema import Finetune, Pretrain, Probe
from bat.errors import UserError

SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "probe": Probe}
CHECKOUT = Path(locate.__file__).parents[2]


def said(command: str, *words: str) -> str:
    """The error of ``bat-COMMAND WORDS``."""
    with pytest.raises(UserError) as caught:
        compose(SCHEMAS[command], command, list(words))
    return str(caught.value)


@pytest.mark.parametrize("command", SCHEMAS)
def test_recipe__every_shipped_one_composes_reads_back_and_reaches_its_rate(
    command: str, tmp_path: Path
) -> None:
    for name in locate.known_recipes(command):
        config = compose(SCHEMAS[command], command, [f"recipe={name}"])
        assert config.recipe == name
        assert config.optim.notes(config.train.steps) == [] or getattr(config.train, "epochs", 0)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert to_dict(from_yaml(SCHEMAS[command], tmp_path / "config.yaml")) == to_dict(config)


@pytest.mark.parametrize("recipe", locate.known_recipes("probe"))
def test_recipe__every_probing_one_takes_every_protocol(recipe: str) -> None:
    for protocol in ("bat", "unmute", "validated"):
        assert compose(Probe, "probe", [f"recipe={recipe}", f"protocol={protocol}"])


@pytest.mark.parametrize("group", ["model", "data", "objective", "hardware"])
def test_fragment__every_shipped_one_is_taken_on_the_command_line(group: str) -> None:
    assert {f.name for f in (CHECKOUT / "configs").iterdir()} == {
        "model", "data", "objective", "hardware", "protocol"}  # fmt: skip
    for name in locate.known_fragments(group):
        compose(Pretrain, "pretrain", ["recipe=as2m", f"{group}={name}"])


def test_clip_seconds__one_frame_more_than_is_kept_is_fine() -> None:
    """120 s are 12,001 frames where a task counts 12,000."""
    words = ["recipe=toy", "frontend.frames=12000"]
    assert compose(Pretrain, "pretrain", [*words, "data.clip_seconds=120"]).frontend.frames == 12000
    assert "makes 12002 frames" in said("pretrain", *words, "data.clip_seconds=120.01")


def test_as2m__is_the_papers_base_configuration() -> None:
    """docs/method.md 3, number by number."""
    c = compose(Pretrain, "pretrain", ["recipe=as2m"])
    assert (c.model.width, c.model.depth, c.model.heads, c.model.gate) == (768, 12, 12, True)
    assert (c.model.norm_order, c.model.pos_layout, c.model.mlp_ratio) == ("post", "reference", 4)
    assert (c.frontend.kind, c.frontend.frames, c.frontend.n_mels) == ("bat", 1024, 128)
    assert (c.data.batch, c.data.clip_seconds, c.train.accumulate) == (24, 10, 1)
    o = c.optim
    assert (o.lr, o.betas, o.weight_decay, o.decay) == (5e-4, [0.9, 0.95], 0.05, "all")
    assert (o.warmup_steps, o.min_lr, o.clip_norm) == (53_000, 1e-6, None)
    assert c.train.steps == 400_000
    mask, ema = c.objective.mask, c.objective.ema
    assert (mask.views, mask.ratio, mask.block) == (16, 0.8, 5)
    assert (ema.start, ema.end, ema.steps) == (0.9998, 0.99999, 100_000)
    assert (c.objective.target, c.objective.decoder) == ("eob", "vit12h")
    assert (c.objective.decoder_depth, c.objective.global_target) == (6, "patch_mean")
    assert (c.objective.target_centering, c.hardware.precision) == ("none", "auto")


def test_as2m_finetune__is_balanced_as_in_the_paper() -> None:
    """docs/method.md 5."""
    c = compose(Finetune, "finetune", ["recipe=as2m"])
    assert (c.data.balance, c.data.epoch_clips, c.data.batch) == ("class", 200_000, 96)
    assert (c.train.steps, c.optim.warmup_steps, c.optim.lr) == (200_000, 20_000, 5e-5)
    assert (c.optim.layer_decay, c.augment.mixup_p, c.drop_path) == (0.75, 0.9, 0.1)
    assert (c.data.clip_seconds, c.frames, c.pad_offset) == (10.23, 1024, "random")
    for command in ("probe", "finetune"):
        assert compose(SCHEMAS[command], command, ["recipe=esc50"]).pad == "clip"


def test_precedence__schema_fragment_recipe_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("use: [model/S, hardware/cpu]\nmodel: {depth: 3}\noptim: {lr: 0.1}\n")
    c = compose(Pretrain, "pretrain", [f"recipe={recipe}", "optim.lr=0.2", "log.wandb=off"])
    assert c.model.mlp_ratio == 4.0  # schema
    assert c.model.width == 384  # fragment
    assert c.model.depth == 3  # recipe over fragment
    assert c.optim.lr == 0.2  # command line over recipe
    assert (c.recipe, c.log.wandb) == ("mine", "off")  # YAML reads off as false
    c = compose(Pretrain, "pretrain", ["recipe=as2m", "model=L", "hardware=cpu"])
    assert (c.model.width, c.model.depth, c.hardware.precision) == (1024, 24, "32-true")


def test_protocol__overrides_the_recipe_but_not_single_values() -> None:
    given = compose(Probe, "probe", ["recipe=esc50"])
    assert (given.protocol.name, given.protocol.selection, given.seeds) == ("bat", "none", 1)
    assert (given.train.steps, given.train.epochs, given.data.batch) == (4_000, 0, 48)
    unmute = compose(Probe, "probe", ["recipe=esc50", "protocol=unmute", "protocol.sobol=8"])
    assert (unmute.protocol.name, unmute.protocol.selection) == ("unmute", "validation")
    assert (unmute.train.epochs, unmute.data.batch, unmute.protocol.sobol) == (30, 128, 8)
    assert (unmute.protocol.lrs, unmute.protocol.prototype_lrs, unmute.protocol.weight_decays) == (
        [1e-4, 7e-3], [2e-3, 8e-2], [1e-5, 5e-4])  # fmt: skip
    head = unmute.head
    assert (head.per_class, head.norm, head.dropout, unmute.seeds) == ("task", False, 0, 5)
    assert (unmute.protocol.search, unmute.optim.warmup_steps) == ("first", 0)
    back = compose(Probe, "probe", ["recipe=esc10", "protocol=bat"])
    assert (back.optim.lr, back.head.prototypes, back.protocol.lrs) == (1e-3, 10_000, [])
    assert (back.optim.betas, back.optim.min_lr) == ([0.9, 0.999], 1e-6)
    c = compose(Probe, "probe", ["recipe=as20k", "protocol=unmute"])
    assert (c.data.roll, c.pad_offset, c.data.batch, c.seeds) == (False, "start", 128, 5)
    assert (c.head.norm, c.head.vqt_norm, c.head.dropout) == (False, None, 0)
    assert compose(Probe, "probe", ["recipe=as20k"]).head.vqt_norm is False


def test_problems__all_are_named_at_once_with_suggestions() -> None:
    words = ["optim.lrr=1", "train.steps=many", "model.pos_layout=polar", "sed=1", "optim=3"]
    text = said("pretrain", "recipe=toy", *words)
    assert "unknown key 'optim.lrr' (command line); did you mean 'optim.lr'?" in text
    assert "'train.steps=many' (command line) has the wrong type" in text
    assert "model.pos_layout=polar" in text
    assert "unknown key 'sed' (command line); did you mean 'seed'?" in text
    assert "'optim' (command line) is a section" in text
    bad = ["data.window=0", "data.min_seconds=-1", "data.max_bad=1.5", "optim.betas=[0.9,1]"]
    bad += ["model.width=100", "model.heads=3", "data.shards=[a, b]", "data.mix=[1]"]
    bad += ["data.balance=class", "online.head.dropout=1", "objective.mask.ratio=1.5"]
    text = said("pretrain", "recipe=toy", *bad)
    assert "data.window=0 must be at least 1" in text
    assert "data.min_seconds=-1.0 must not be negative" in text
    assert "data.max_bad=1.5 must lie in [0, 1]" in text
    assert "optim.betas=[0.9, 1.0] must lie in [0, 1)" in text
    assert "online.head.dropout=1.0 must lie in [0, 1)" in text
    assert "objective.mask.ratio=1.5 must lie in (0, 1)" in text
    assert "model.width=100 is not a multiple of model.heads=3" in text
    assert "data.mix=[1.0] has 1 weights for 2 data.shards" in text
    assert "data.balance=class needs data.epoch_clips" in text


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("pretrain", "", "no recipe given"),
        ("pretrain", "toy", "Did you mean recipe=toy"),
        ("pretrain", "recipe=tooy", "unknown recipe 'tooy' for bat-pretrain. Did you mean 'toy'"),
        ("pretrain", "recipe=missing.yaml", "missing.yaml does not exist"),
        ("pretrain", "recipe=toy seed=1 seed=2", "given twice"),
        ("pretrain", "recipe=toy model=XXL", "unknown fragment 'model/XXL'. Known: model/B"),
        ("pretrain", "recipe=toy objective=a.Mine", "say objective.name=a.Mine"),
        ("pretrain", "recipe=toy data.root=[1", "cannot read the value"),
        ("pretrain", "recipe=toy train.keep_every=7", "not a multiple of train.save_every"),
        ("probe", "recipe=toy data.window=3", "is for bat-pretrain and bat-finetune"),
        ("probe", "recipe=toy hardware.activation_checkpointing=true", "a frozen encoder has no"),
        ("probe", "recipe=toy data.mix=[1]", "is for bat-pretrain: leave it away"),
        ("finetune", "recipe=toy data.labels=drop", "is for bat-pretrain: leave it away"),
        ("finetune", "recipe=toy health.min_std=1", "health.min_std is for bat-pretrain"),
        ("probe", "recipe=esc10 optim.lr=1e-4", "optim.lr=0.0001 with protocol.lrs"),
        ("probe", "recipe=own train.steps=500", "train.steps=500 with train.epochs=30"),
        ("probe", "recipe=esc10 protocol.weight_decays=[0.1,0.3]", "optim.weight_decay=0.2 with"),
        ("probe", "recipe=esc10 optim.min_lr=1e-2", "optim.min_lr=0.01 is above [0.004]"),
        ("probe", "recipe=esc50 optim.min_lr=1e-2", "optim.min_lr=0.01 is above optim.lr=0.001"),
        ("probe", "recipe=esc50 protocol.lrs=[1e-3]", "protocol.selection=none: nothing is"),
        ("probe", "recipe=esc50 head.per_class=all", "head.per_class=all must be a number, task"),
        ("finetune", "recipe=esc50 augment.spec_repeats=0", "augment.spec_repeats=0 must be"),
        ("finetune", "recipe=esc50 augment.spec_freq=1", "augment.spec_freq=1 masks nothing"),
        (
            "finetune",
            "recipe=esc50 augment.spec_freq=0 augment.spec_time=0 augment.spec_repeats=2",
            "augment.spec_repeats=2 with",
        ),
        ("finetune", "recipe=toy augment.mixup_alpha=0.4", "0.4 with augment.mixup_p=0"),
    ],
)
def test_compose__what_is_wrong_is_named(command: str, words: str, message: str) -> None:
    assert message in said(command, *words.split())


def test_recipe__is_found_in_the_users_folder_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").write_text("use: [model/S]\n")
    monkeypatch.setenv("BAT_RECIPES", str(tmp_path))
    assert compose(Pretrain, "pretrain", ["recipe=mine"]).model.width == 384
    assert "mine" in locate.known_recipes("pretrain")
    monkeypatch.setenv("BAT_RECIPES", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="is not a folder"):
        locate.known_recipes("pretrain")
    monkeypatch.delenv("BAT_RECIPES")
    package = tmp_path / "site-packages" / "bat"  # without a checkout beside it
    for kind in ("recipes", "configs"):
        shutil.copytree(CHECKOUT / kind, package / "_shipped" / kind)
    monkeypatch.setattr(locate, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert locate.find_recipe("toy", "pretrain").is_relative_to(package)
    assert compose(Pretrain, "pretrain", ["recipe=as2m", "model=S"]).model.width == 384


@pytest.mark.parametrize(
    ("word", "shards"),
    [
        ("data.shards=s-{00..11}.tar", ["s-{00..11}.tar"]),
        ("data.shards=[a, https://host/b]", ["a", "https://host/b"]),
        ("data.shards=null", []),
    ],
)
def test_list__of_one_needs_no_brackets(word: str, shards: list[str]) -> None:
    assert compose(Pretrain, "pretrain", ["recipe=as2m", word]).data.shards == shards


def test_environment__variables_cannot_get_into_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    words = ["task=${oc.env:SECRET}", "data.shards=[a,'${oc.env:SECRET}']"]
    text = said("pretrain", "recipe=toy", *words)
    assert text.count("outside the configuration") == 2
    assert "hunter2" not in text
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("use: [model/tiny]\ndata: {root: '/data/${oc.env:SECRET}'}\n")
    assert "outside the configuration" in said("pretrain", f"recipe={recipe}")


def test_optim__a_warm_up_longer_than_the_run_is_said() -> None:
    optim = compose(Probe, "probe", ["recipe=esc50"]).optim
    (note,) = optim.notes(300)
    assert "optim.warmup_steps=400 are more than train.steps=300" in note
    assert optim.notes(400) == []
