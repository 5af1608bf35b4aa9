"""Strict configuration: precedence, fragments, every problem at once, every shipped file."""

from pathlib import Path

import pytest

from bat.config import locate
from bat.config.compose import compose, from_yaml, to_dict, to_yaml
from bat.config.schema import Finetune, Pretrain, Probe
from bat.errors import UserError

SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "probe": Probe}
SHIPPED = [(c, name) for c in SCHEMAS for name in locate.known_recipes(c)]


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_every_shipped_recipe_resolves(command: str, name: str) -> None:
    config = compose(SCHEMAS[command], command, [f"recipe={name}"])
    assert config.recipe == name


GROUPS = ("model", "data", "objective", "hardware", "protocol")


@pytest.mark.parametrize("command", SCHEMAS)
@pytest.mark.parametrize(
    "file", sorted(p.name for p in (Path(locate.__file__).parents[2] / "configs").rglob("*.yaml"))
)
def test_every_shipped_fragment_is_named_in_a_group(command: str, file: str) -> None:
    stem = file.removesuffix(".yaml")
    groups = [g for g in GROUPS if stem in locate.known_fragments(g)]
    assert groups, f"{file} lies in no group"
    if command == "pretrain":
        for group in groups:
            schema, run = (Probe, "probe") if group == "protocol" else (Pretrain, "pretrain")
            recipe = "as20k" if group == "protocol" else "as2m"
            compose(schema, run, [f"recipe={recipe}", f"{group}={stem}"])


def test_clips_may_have_one_frame_more_than_is_kept() -> None:
    """120 s are 12,001 frames where a task counts 12,000."""
    words = ["recipe=toy", "frontend.frames=12000"]
    assert compose(Pretrain, "pretrain", [*words, "data.clip_seconds=120"]).frontend.frames == 12000
    with pytest.raises(UserError, match="makes 12002 frames"):
        compose(Pretrain, "pretrain", [*words, "data.clip_seconds=120.01"])


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_esc50_pads_as_the_papers_supervised_tasks(command: str) -> None:
    assert compose(SCHEMAS[command], command, ["recipe=esc50"]).pad == "clip"


def test_as2m_is_the_paper_s_base_configuration() -> None:
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


def test_precedence_schema_fragment_recipe_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("use: [model/S, hardware/cpu]\nmodel: {depth: 3}\noptim: {lr: 0.1}\n")
    c = compose(Pretrain, "pretrain", [f"recipe={recipe}", "optim.lr=0.2"])
    assert c.model.mlp_ratio == 4.0  # schema
    assert c.model.width == 384  # fragment
    assert c.model.depth == 3  # recipe over fragment
    assert c.optim.lr == 0.2  # command line over recipe
    assert c.recipe == "mine"


def test_a_fragment_on_the_command_line_replaces_the_recipe_s() -> None:
    c = compose(Pretrain, "pretrain", ["recipe=as2m", "model=L", "hardware=cpu"])
    assert (c.model.width, c.model.depth) == (1024, 24)
    assert c.hardware.precision == "32-true"


def test_all_problems_are_named_at_once_with_suggestions() -> None:
    words = ["recipe=toy", "optim.lrr=1", "train.steps=many", "model.pos_layout=polar", "sed=1"]
    with pytest.raises(UserError) as caught:
        compose(Pretrain, "pretrain", words)
    text = str(caught.value)
    assert "unknown key 'optim.lrr' (command line); did you mean 'optim.lr'?" in text
    assert "'train.steps=many' (command line) has the wrong type" in text
    assert "model.pos_layout=polar" in text
    assert "unknown key 'sed' (command line); did you mean 'seed'?" in text


def test_bad_values_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        compose(
            Pretrain,
            "pretrain",
            [
                "recipe=toy",
                "objective.mask.ratio=1.5",
                "data.batch=0",
                "model.width=100",
                "model.heads=3",
            ],
        )
    text = str(caught.value)
    assert "objective.mask.ratio=1.5" in text
    assert "data.batch=0" in text
    assert "model.width=100 is not a multiple of model.heads=3" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given"),
        (["toy"], "Did you mean recipe=toy"),
        (["recipe=tooy"], r"unknown recipe 'tooy'.*Did you mean 'toy'.*Known: as2m"),
        (["recipe=missing.yaml"], "missing.yaml does not exist"),
        (["recipe=toy", "seed=1", "seed=2"], "given twice"),
        (["recipe=toy", "model=XXL"], r"unknown fragment 'model/XXL'.*model/B"),
        (["recipe=toy", "optim=3"], "is a section"),
        (["recipe=toy", "data.root=[1"], "cannot read the value"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(Pretrain, "pretrain", words)


def test_recipe_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").write_text("use: [model/S]\n")
    monkeypatch.setenv("BAT_RECIPES", str(tmp_path))
    assert compose(Pretrain, "pretrain", ["recipe=mine"]).model.width == 384
    assert "mine" in locate.known_recipes("pretrain")
    monkeypatch.setenv("BAT_RECIPES", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="is not a folder"):
        locate.known_recipes("pretrain")


def test_off_is_off_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    words = ["recipe=toy", "log.wandb=off"]
    assert compose(Pretrain, "pretrain", words).log.wandb == "off"


@pytest.mark.parametrize("command", SCHEMAS)
def test_written_configuration_reads_back_the_same(command: str, tmp_path: Path) -> None:
    config = compose(SCHEMAS[command], command, ["recipe=toy"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_dict(from_yaml(SCHEMAS[command], tmp_path / "config.yaml")) == to_dict(config)


def test_an_installed_wheel_finds_the_copies_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hatchling puts recipes and configs into ``bat/_shipped``; there is no checkout beside."""
    import shutil

    checkout = Path(locate.__file__).parents[2]
    package = tmp_path / "site-packages" / "bat"
    for kind in ("recipes", "configs"):
        shutil.copytree(checkout / kind, package / "_shipped" / kind)
    monkeypatch.setattr(locate, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert locate.find_recipe("toy", "pretrain").is_relative_to(package)
    assert compose(Pretrain, "pretrain", ["recipe=as2m", "model=S"]).model.width == 384


@pytest.mark.parametrize(
    ("word", "shards"),
    [
        ("data.shards=a", ["a"]),
        ("data.shards=s-{00..11}.tar", ["s-{00..11}.tar"]),
        ("data.shards=[a, https://host/b]", ["a", "https://host/b"]),
        ("data.shards=null", []),
    ],
)
def test_one_of_a_list_needs_no_brackets(word: str, shards: list[str]) -> None:
    assert compose(Pretrain, "pretrain", ["recipe=as2m", word]).data.shards == shards


def test_settings_of_the_stream_that_do_not_fit() -> None:
    words = ["recipe=as2m", "data.shards=[a, b]", "data.mix=[1]", "data.balance=class"]
    with pytest.raises(UserError) as caught:
        compose(Pretrain, "pretrain", [*words, "data.window=0", "data.min_seconds=-1"])
    text = str(caught.value)
    assert "data.mix=[1.0] has 1 weights for 2 data.shards" in text
    assert "data.balance=class needs data.epoch_clips" in text
    assert "data.window=0 must be at least 1" in text
    assert "data.min_seconds=-1.0 must not be negative" in text
    with pytest.raises(UserError, match=r"data\.mix and data\.epoch_clips exclude"):
        compose(
            Pretrain,
            "pretrain",
            ["recipe=as2m", "data.shards=[a, b]", "data.mix=[1, 2]", "data.epoch_clips=5"],
        )


@pytest.mark.parametrize("word", ["data.epoch_clips=10", "data.shuffle=window", "data.window=3"])
def test_a_probe_refuses_the_order_of_a_stream(word: str) -> None:
    with pytest.raises(UserError, match=r"is for bat-pretrain and bat-finetune"):
        compose(Probe, "probe", ["recipe=toy", word])


@pytest.mark.parametrize("word", ["data.mix=[1]", "data.labels=drop"])
@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_what_is_held_out_is_no_setting_of_the_stream(command: str, word: str) -> None:
    with pytest.raises(UserError, match=r"is for bat-pretrain: leave it away"):
        compose(SCHEMAS[command], command, ["recipe=toy", word])


def test_as2m_fine_tuning_is_balanced_as_in_the_paper() -> None:
    """docs/method.md 5."""
    c = compose(Finetune, "finetune", ["recipe=as2m"])
    assert (c.data.balance, c.data.epoch_clips, c.data.batch) == ("class", 200_000, 96)
    assert (c.train.steps, c.optim.warmup_steps, c.optim.lr) == (200_000, 20_000, 5e-5)
    assert (c.optim.layer_decay, c.augment.mixup_p, c.drop_path) == (0.75, 0.9, 0.1)
    assert (c.data.clip_seconds, c.frames, c.pad_offset) == (10.23, 1024, "random")


def test_environment_variables_cannot_get_into_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    words = ["task=${oc.env:SECRET}", "data.shards=[a,'${oc.env:SECRET}']"]
    with pytest.raises(UserError) as caught:
        compose(Pretrain, "pretrain", ["recipe=toy", *words])
    assert str(caught.value).count("outside the configuration") == 2
    assert "hunter2" not in str(caught.value)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("use: [model/tiny]\ndata: {root: '/data/${oc.env:SECRET}'}\n")
    with pytest.raises(UserError, match=r"'data.root=.*outside the configuration"):
        compose(Pretrain, "pretrain", [f"recipe={recipe}"])


def test_a_protocol_of_the_command_line_is_the_last_word_but_for_single_values() -> None:
    given = compose(Probe, "probe", ["recipe=esc50"])
    assert (given.protocol.name, given.protocol.selection, given.seeds) == ("bat", "none", 1)
    assert (given.train.steps, given.train.epochs, given.data.batch) == (4_000, 0, 48)
    unmute = compose(Probe, "probe", ["recipe=esc50", "protocol=unmute", "protocol.sobol=8"])
    assert (unmute.protocol.name, unmute.protocol.selection, unmute.seeds) == (
        "unmute", "validation", 5)  # fmt: skip
    assert (unmute.train.epochs, unmute.data.batch, unmute.protocol.sobol) == (30, 128, 8)
    assert (unmute.protocol.lrs, unmute.protocol.prototype_lrs, unmute.protocol.weight_decays) == (
        [1e-4, 7e-3], [2e-3, 8e-2], [1e-5, 5e-4])  # fmt: skip
    head = unmute.head
    assert (head.per_class, head.norm, head.dropout) == ("task", False, 0)
    assert (unmute.protocol.search, unmute.optim.warmup_steps) == ("first", 0)
    back = compose(Probe, "probe", ["recipe=esc10", "protocol=bat"])
    assert (back.optim.lr, back.head.prototypes, back.protocol.lrs) == (1e-3, 10_000, [])
    assert (back.optim.betas, back.optim.min_lr) == ([0.9, 0.999], 1e-6)
    with pytest.raises(UserError, match=r"protocol\.selection=none: nothing is chosen"):
        compose(Probe, "probe", ["recipe=esc50", "protocol.lrs=[1e-3,1e-2]"])


@pytest.mark.parametrize("protocol", ["bat", "unmute", "validated"])
@pytest.mark.parametrize("recipe", ["toy", "esc10", "esc50", "as20k", "own"])
def test_every_probing_recipe_takes_every_protocol(recipe: str, protocol: str) -> None:
    assert compose(Probe, "probe", [f"recipe={recipe}", f"protocol={protocol}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=esc10", "optim.lr=1e-4"], "optim.lr=0.0001 with protocol.lrs"),
        (["recipe=own", "train.steps=500"], "train.steps=500 with train.epochs=30"),
        (["recipe=esc10", "protocol.weight_decays=[0.1,0.3]"], "optim.weight_decay=0.2 with proto"),
        (["recipe=esc10", "optim.min_lr=1e-2"], r"optim.min_lr=0.01 is above \[0.004\]"),
        (["recipe=esc50", "optim.min_lr=1e-2"], "optim.min_lr=0.01 is above optim.lr=0.001"),
        (
            ["recipe=esc50", "protocol.fraction=0.3"],
            "protocol.fraction=0.3 with protocol.selection",
        ),
        (
            ["recipe=esc50", "protocol.search=first"],
            "protocol.search=first with protocol.selection",
        ),
        (["recipe=esc50", "head.per_class=all"], "head.per_class=all must be a number, task"),
    ],
)
def test_a_value_that_another_overrides_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(Probe, "probe", words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["spec_repeats=0"],
            "augment.spec_repeats=0 must be at least 1; SpecAug is switched off by",
        ),
        (["spec_freq=1"], "augment.spec_freq=1 masks nothing"),
        (["spec_time=1"], "augment.spec_time=1 masks nothing"),
        (["spec_freq=0", "spec_time=0", "spec_repeats=2"], "augment.spec_repeats=2 with"),
        (["mixup_alpha=0.4"], "augment.mixup_alpha=0.4 with augment.mixup_p=0"),
    ],
)
def test_augment__settings_that_switch_one_another_off_are_refused(words, said) -> None:
    with pytest.raises(UserError, match=said):
        compose(Finetune, "finetune", ["recipe=esc50", *(f"augment.{w}" for w in words)])
    off = ["augment.spec_freq=0", "augment.spec_time=0"]
    assert compose(Finetune, "finetune", ["recipe=esc50", *off]).augment.spec_repeats == 1
    one = ["augment.mixup_p=0.5", "augment.mixup_alpha=0.4", "augment.spec_freq=0"]
    assert compose(Finetune, "finetune", ["recipe=esc50", *one]).augment.mixup_alpha == 0.4


def test_protocol_unmute__plain_clips_on_as20k() -> None:
    """No roll, no random place, no LayerNorm or dropout that is not published."""
    c = compose(Probe, "probe", ["recipe=as20k", "protocol=unmute"])
    assert (c.data.roll, c.pad_offset, c.data.batch, c.seeds) == (False, "start", 128, 5)
    assert (c.head.norm, c.head.vqt_norm, c.head.dropout) == (False, None, 0)
    assert compose(Probe, "probe", ["recipe=as20k"]).head.vqt_norm is False


def test_optim__a_warm_up_longer_than_the_run_is_said() -> None:
    note = "optim.warmup_steps=400 are more than train.steps=300"
    optim = compose(Probe, "probe", ["recipe=esc50"]).optim
    assert [note in said for said in optim.notes(300)] == [True]
    assert optim.notes(400) == []


@pytest.mark.parametrize("command", ["probe", "finetune"])
@pytest.mark.parametrize("name", sorted(locate.known_recipes("probe")))
def test_recipe__its_rate_is_reached(command: str, name: str) -> None:
    c = compose(SCHEMAS[command], command, [f"recipe={name}"])
    assert c.optim.notes(c.train.steps) == [] or getattr(c.train, "epochs", 0)
