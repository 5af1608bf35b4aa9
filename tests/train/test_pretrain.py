"""A pre-training run: what it leaves, that it resumes bit for bit, its switches, its refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bat
from bat.config.compose import compose
from bat.config.schema import Log, Pretrain
from bat.errors import UserError
from bat.io import read_jsonl
from bat.seeding import derive_seed
from bat.train import run_pretrain
from bat.train.checkpointing import AtomicCheckpointIO, last_checkpoint
from bat.train.pretrain import Pretraining, build_objective
from bat.train.run_pretrain import pretrain
from bat.train.trainer import OneWandbRun
from tests.toy import make_toy_shards


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


def metrics(out: Path) -> list[dict]:
    """Rows without what the clock decides."""
    rows = read_jsonl(out / "metrics.jsonl")
    clock = ("clips_per_second", "loader_wait")
    return [{k: v for k, v in r.items() if k not in clock} for r in rows]


def assert_same_run(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert set(left) == set(right)
    different = [n for n in left if not torch.equal(left[n], right[n])]
    assert not different, different
    assert metrics(a) == metrics(b)


class CutError(Exception):
    """Stands for whatever ends a process."""


def run_and_cut(monkeypatch: pytest.MonkeyPatch, config: Pretrain, at: int) -> None:
    original = Pretraining.training_step

    def step(self, batch, batch_idx):
        if batch_idx == at:
            raise CutError
        return original(self, batch, batch_idx)

    with monkeypatch.context() as m:
        m.setattr(Pretraining, "training_step", step)
        with pytest.raises(CutError):
            pretrain(config)


def test_a_run_leaves_exactly_these_files(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small("online.every=3", "online.steps=2", out=out))
    found = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert found == [
        "checkpoints/last.ckpt",
        "checkpoints/step-00000004.ckpt",
        "checkpoints/step-00000006.ckpt",
        "config.yaml",
        "export/config.json",
        "export/model.safetensors",
        "metrics.jsonl",
        "plots/curves.png",
        "plots/layer_gate.png",
        "plots/masks.png",
        "plots/probe_curve.png",
        "summary.json",
        "train.log",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["bad_clips"]["seen"] == 30
    assert [r["step"] for r in summary["online"]] == [0, 3, 6]
    rows = metrics(out)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 4, 6]
    encoder = bat.load_encoder(out)
    assert (encoder.width, encoder.depth, encoder.grid.time) == (48, 2, 13)
    assert encoder(torch.zeros(1, 32000)).patches.shape == (2, 1, 13, 8, 48)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (3, ["model.drop_path=0.3"]),  # before the second checkpoint, dropout at work
        (9, ["train.accumulate=2", "data.batch=2"]),  # within an accumulation
        (5, ["data.workers=1", "online.every=2", "online.steps=2", "online.batch=4"]),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, words: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(small(*words, out=whole))
    run_and_cut(monkeypatch, small(*words, out=parts), at=cut)
    assert not (parts / "export").exists()
    pretrain(small(*words, out=parts))
    assert_same_run(whole, parts)


def test_pretrain__modes_are_right_at_every_step_whatever_was_evaluated_before(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online probes and the look for collapse after each step. Drop path acts in the student."""
    original, seen = Pretraining.training_step, []

    def step(self, batch, batch_idx):
        parts = self.objective
        seen.append([{m.training for m in p.modules()} for p in (parts.student, parts.teacher)])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", step)
    words = ["online.every=1", "online.steps=1", "health.collapse_every=1", "train.steps=2"]
    out = tmp_path / "run"
    pretrain(small(*words, "model.drop_path=0.5", out=out))
    assert seen == [[{True}, {False}]] * 2
    pretrain(small(*words, "model.drop_path=0", out=tmp_path / "other"))
    first, other = (metrics(o) for o in (out, tmp_path / "other"))
    assert [r["loss"] for r in first if "loss" in r] != [r["loss"] for r in other if "loss" in r]


def test_a_run_cut_before_its_first_checkpoint_begins_anew(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["online.every=3", "online.steps=2"]
    pretrain(small(*words, out=tmp_path / "whole"))
    run_and_cut(monkeypatch, small(*words, out=tmp_path / "parts"), at=1)
    assert read_jsonl(tmp_path / "parts" / "metrics.jsonl")
    pretrain(small(*words, out=tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_weights_that_are_not_finite_are_never_saved(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Pretraining.optimizer_step

    def step(self, epoch, batch_idx, *args):
        original(self, epoch, batch_idx, *args)
        if batch_idx == 2:
            with torch.no_grad():
                self.objective.student.encoder.cls_token[0, 0, 3] = torch.nan

    monkeypatch.setattr(Pretraining, "optimizer_step", step)
    words = "health.max_skipped=9"  # the losses that follow are skipped
    with pytest.raises(UserError, match=r"not finite after step 4 .*encoder.cls_token and 1 more"):
        pretrain(small(words, out=tmp_path / "run"))
    found = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["last.ckpt", "step-00000002.ckpt"]
    assert not (tmp_path / "run" / "export").exists()


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step-00000002.ckpt"
    target.parent.mkdir()
    (target.parent / ".step-00000002.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write checkpoint.*free some space"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(100_000)}, target)
    assert not list(target.parent.iterdir())


def test_online_probes_judge_several_labels_a_clip_by_map(small, tmp_path: Path) -> None:
    from bat.audio.decode import encode

    names = ["a;b", "b", "a", "c;a", "b;c", "c"] * 2
    lines = ["path,labels,fold"]
    for i, label in enumerate(names):
        wave = torch.randn(16000, generator=torch.Generator().manual_seed(i)).numpy() * 0.1
        (tmp_path / f"{i}.flac").write_bytes(encode(wave, sample_rate=16000, codec="flac"))
        lines.append(f"{i}.flac,{label},{i // 6 + 1}")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    words = ["task=folder", f"data.root={tmp_path / 'mine.csv'}", "train.steps=2"]
    pretrain(small(*words, "online.every=2", "online.steps=2", out=tmp_path / "run"))
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["online"]
    assert [r["step"] for r in rows] == [0, 2]
    assert set(rows[0]) >= {"map", "map_std"}
    assert "accuracy" not in rows[0]


@pytest.mark.parametrize(
    "words", [[], ["train.accumulate=2", "data.batch=2"]], ids=["", "accumulate"]
)
def test_the_teacher_follows_once_after_each_real_step(small, tmp_path: Path, words) -> None:
    config = small("train.steps=1", "objective.ema.start=0.75", *words, out=tmp_path / "run")
    torch.manual_seed(derive_seed(config.seed, "init"))
    start = build_objective(config).student.encoder.state_dict()
    pretrain(config)
    end = weights(tmp_path / "run")
    moved = 0
    for name, before in start.items():
        student, teacher = (end[f"{w}.encoder.{name}"] for w in ("student", "teacher"))
        torch.testing.assert_close(teacher, 0.75 * before + 0.25 * student, atol=1e-7, rtol=1e-6)
        moved += int(not torch.equal(student, before))
    assert moved > 20  # all but the position table


def test_switches_build_what_they_say(small, tmp_path: Path) -> None:
    def build(*words: str):
        return build_objective(small(*words, out=tmp_path / "run")).student

    assert not [n for n in build("model.gate=false").state_dict() if ".gate." in n]
    assert [n for n in build().decoder.state_dict() if ".gate." in n]
    assert type(build("objective.decoder=cnn").decoder).__name__ == "CNNDecoder"
    narrow = build("objective.decoder=vit6h").decoder.blocks[0]
    assert (narrow.attn.heads, narrow.mlp.fc1.out_features) == (6, 96)
    wide = build().decoder.blocks[0]
    assert (wide.attn.heads, wide.mlp.fc1.out_features) == (12, 192)
    padded = build("frontend.pad=clip", "data.clip_seconds=0.5").encoder.frontend
    assert (padded.pad, padded.clip_samples) == ("clip", 8000)
    for part in ("encoder", "decoder"):
        reference = getattr(build(), part).pos_embed
        grid = getattr(build("model.pos_layout=grid"), part).pos_embed
        assert not torch.equal(reference, grid)
        torch.testing.assert_close(reference.sum(1), grid.sum(1))  # the same rows, elsewhere


def test_another_seed_gives_another_run(small, tmp_path: Path) -> None:
    pretrain(small(out=tmp_path / "a"))
    pretrain(small("seed=1", out=tmp_path / "b"))
    assert metrics(tmp_path / "a")[-1]["loss"] != metrics(tmp_path / "b")[-1]["loss"]


def test_resuming_a_finished_run_changes_nothing(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small(out=out))
    before, rows = weights(out), metrics(out)
    summary = (out / "summary.json").read_text()
    pretrain(small(out=out))
    assert (out / "summary.json").read_text() == summary
    assert all(torch.equal(before[n], t) for n, t in weights(out).items())
    assert metrics(out) == rows


def test_a_damaged_newest_checkpoint_is_passed_over(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(small(out=whole))
    run_and_cut(monkeypatch, small(out=out), at=5)
    newest = out / "checkpoints" / "step-00000004.ckpt"
    data = newest.read_bytes()
    newest.unlink()
    newest.write_bytes(data[: len(data) // 2])
    assert last_checkpoint(out) == out / "checkpoints" / "step-00000002.ckpt"
    pretrain(small(out=out))
    assert_same_run(whole, out)


def test_continuing_with_other_settings_is_refused_with_the_difference(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pretrain(small("train.steps=2", out=out))
    with pytest.raises(UserError) as caught:
        pretrain(small("train.steps=2", "optim.lr=0.1", out=out))
    assert "- optim.lr: 0.001" in str(caught.value)
    assert "+ optim.lr: 0.1" in str(caught.value)
    with pytest.raises(UserError, match=r"hardware\.precision"):
        pretrain(small("train.steps=2", "hardware.precision=bf16-mixed", out=out))
    pretrain(small("train.steps=2", "train.log_every=1", out=out))  # a safe one


def test_a_folder_of_something_else_is_not_written_to(small, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="holds other things than a run"):
        pretrain(small(out=tmp_path))


def test_dry_run_writes_and_trains_nothing(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small(out=tmp_path / "run"), dry_run=True)
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert "10 clips (task toy; 5 classes: " in shown
    assert "dry run: nothing was trained" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["objective.target=mlp"],
        ["model.gate=false"],
        ["objective.decoder=cnn"],
        ["objective.decoder=vit6h"],
        ["model.pos_layout=grid"],
        ["objective.target_centering=batch"],
        ["objective.global_target=cls"],
        ["frontend.kind=eat"],
        ["model.norm_order=pre"],
        ["objective.decoder_width=24"],
        ["objective.mask.ratio=0.6"],
        ["optim.decay=matrices"],
        ["frontend.pad=waveform", "data.clip_seconds=1.5"],
    ],
    ids="+".join,
)
def test_every_ablation_switch_is_one_setting_and_acts(small, tmp_path: Path, words) -> None:
    common = ["train.steps=2", "train.log_every=1"]
    if len(words) > 1:
        common.append(words.pop())  # both runs need it
    pretrain(small(*common, out=tmp_path / "base"))
    pretrain(small(*common, *words, out=tmp_path / "other"))
    base, other = (
        [r for r in metrics(tmp_path / name) if "loss" in r] for name in ("base", "other")
    )
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in other)
    if words == ["optim.decay=matrices"]:  # the loss feels it a step later
        assert any(not torch.equal(t, weights(tmp_path / "base")[n])
                   for n, t in weights(tmp_path / "other").items())  # fmt: skip
    else:
        assert base[0]["loss"] != other[0]["loss"]


def test_gradient_clipping_acts(small, tmp_path: Path) -> None:
    pretrain(small("train.steps=3", out=tmp_path / "a"))
    pretrain(small("train.steps=3", "optim.clip_norm=0.001", out=tmp_path / "b"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[n], b[n]) for n in a)


def test_bf16_keeps_weights_and_losses_in_float32(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small("hardware.precision=bf16-mixed", "train.steps=2", out=out))
    assert {t.dtype for t in weights(out).values()} == {torch.float32}
    assert metrics(out)[-1]["loss"] < 5


def test_as2m_builds_on_meta_without_touching_memory() -> None:
    config = compose(Pretrain, "pretrain", ["recipe=as2m"])
    with torch.device("meta"):
        objective = build_objective(config)
    assert all(p.is_meta for p in objective.parameters())
    trainable = sum(p.numel() for p in objective.student.parameters())
    assert trainable == 139_395_840  # golden paper_config_param_counts
    assert objective.student.encoder.grid.tokens == 512


def test_as2m_starts_on_any_shard_set(tmp_path: Path) -> None:
    shards = make_toy_shards(tmp_path / "toy")
    words = ["recipe=as2m", f"data.shards={shards}", f"out={tmp_path / 'run'}", "hardware=cpu"]
    words += ["model.width=48", "model.depth=1", "model.heads=2", "objective.decoder_depth=1"]
    words += ["data.batch=2", "data.global_batch=4", "data.workers=0", "objective.mask.views=2"]
    words += ["train.steps=2"]
    pretrain(compose(Pretrain, "pretrain", words))
    assert bat.load_encoder(tmp_path / "run").grid.tokens == 512


def test_masks_hang_on_seed_and_position_alone(small, tmp_path: Path) -> None:
    def ids(positions: list[int], *words: str) -> torch.Tensor:
        module = Pretraining(small(*words, out=tmp_path / "run"))
        views = module.objective.draw_views(torch.tensor(positions)).keep_ids
        return views.view(len(positions), -1)  # (B, V n)

    both = ids([7, 8])
    assert torch.equal(both, ids([7, 8]))
    assert torch.equal(both.flip(0), ids([8, 7]))
    assert torch.equal(both[:1], ids([7]))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, ids([7, 8], "seed=1"))
    first, second = both[0].view(2, -1)  # two views of a clip
    assert not torch.equal(first, second)


def test_no_data_given_says_what_to_give() -> None:
    with pytest.raises(UserError, match=r"no data given.*data\.shards=DIR"):
        pretrain(compose(Pretrain, "pretrain", ["recipe=as2m"]))


def test_online_probes_need_labels_and_say_so(small, tmp_path: Path) -> None:
    from bat.audio.decode import encode

    audio = tmp_path / "audio"
    audio.mkdir()
    for i in range(4):
        wave = torch.randn(16000, generator=torch.Generator().manual_seed(i)).numpy() * 0.1
        (audio / f"{i}.flac").write_bytes(encode(wave, sample_rate=16000, codec="flac"))
    words = ["task=folder", f"data.root={audio}", "data.batch=2", "online.every=1"]
    with pytest.raises(UserError, match="online probes need labelled clips"):
        pretrain(small(*words, out=tmp_path / "run"))
    pretrain(small(*words[:-1], "train.steps=1", out=tmp_path / "unlabelled"))


def test_wandb_offline_writes_locally_and_nothing_by_default(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra: bat-audio[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pretrain(small("train.steps=1", out=tmp_path / "without"))
    assert not (tmp_path / "without" / "wandb").exists()
    config = small("log.wandb=offline", "train.save_every=3", out=tmp_path / "with")
    run_and_cut(monkeypatch, config, 4)  # steps 1, 2 and 4 are logged, 3 is saved
    logged = spied_steps(monkeypatch)
    pretrain(config)
    assert set(logged) == {6}
    runs = [p.name for p in (tmp_path / "with" / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in runs}) == 1 <= len(runs)
    assert "anonymous" not in capsys.readouterr().err


def spied_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which something is handed to Weights & Biases from now on."""
    from lightning.pytorch.loggers import WandbLogger

    steps: list[int] = []
    original = WandbLogger.log_metrics

    def log_metrics(self, metrics, step=None):
        steps.append(step)
        original(self, metrics, step)

    monkeypatch.setattr(WandbLogger, "log_metrics", log_metrics)
    return steps


def test_one_run_of_wandb_over_all_starts_whose_steps_only_grow(tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an extra: bat-audio[wandb]")
    began: list[dict] = []
    done: list[str] = []

    class Run:
        def __init__(self, **words):
            began.append(words)
            self.id = words["id"]

        def log(self, row):
            pass

        def finish(self, exit_code):
            done.append(self.id)

    monkeypatch.setattr(wandb, "init", Run)

    def start(name: str, *, resumed: bool) -> OneWandbRun:
        out = tmp_path / name
        (out / "wandb").mkdir(parents=True, exist_ok=True)
        return OneWandbRun(Log(wandb="online"), out, name, resumed=resumed)

    first = start("fold-1", resumed=False)
    logged = spied_steps(monkeypatch)
    first.log_metrics({"loss": 1.0}, 10)
    first.log_metrics({"loss": 1.0}, 20)
    again = start("fold-1", resumed=True)  # from a checkpoint of step 10
    again.log_metrics({"online/cgp/map": 0.5}, 10)
    again.log_metrics({"loss": 1.0}, 20)
    again.log_metrics({"online/cgp/map": 0.5}, 20)  # this one was not logged before
    again.log_metrics({"loss": 1.0}, 30)
    assert logged == [10, 20, 20, 30]
    again.finalize("success")
    other = start("fold-2", resumed=False)
    other.log_metrics({"loss": 1.0}, 1)
    anew = start("fold-1", resumed=False)  # no checkpoint: nothing of the first run counts
    anew.log_metrics({"loss": 1.0}, 1)
    ids = [words["id"] for words in began]
    assert ids[0] == ids[1] == done[0]
    assert len(set(ids)) == 3
    assert all("anonymous" not in words for words in began)


def test_a_summary_counts_all_starts_and_a_finished_run_has_nothing_to_do(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = small("train.save_every=2", out=(out := tmp_path / "run"))

    def cut(*args, **keywords):
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain, "export", cut)
        with pytest.raises(CutError):
            pretrain(config)
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    trained = saved["callbacks"]["Checkpoints"]["training_seconds"]
    pretrain(config)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoints"]["written"] == 3
    assert summary["checkpoints"]["mb"] > 0
    assert summary["seconds"] >= round(trained, 1) > 0
    assert summary["clips_per_second"] > 0
    assert summary["precision"] == "32-true"
    capsys.readouterr()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "train.log"}
    pretrain(config)
    assert capsys.readouterr().err.startswith("nothing to do")
    assert before == {p: p.read_bytes() for p in before}

    log = (out / "train.log").read_text()
    other = make_toy_shards(tmp_path / "toy", seed=1)
    with pytest.raises(UserError, match="was written with"):
        pretrain(small("train.save_every=2", f"data.shards={other}", out=out))
    assert before == {p: p.read_bytes() for p in before}
    assert (out / "train.log").read_text() == log
