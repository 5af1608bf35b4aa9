"""A pre-training run: what it leaves, that it resumes bit for bit, its switches, its refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bat
from bat.audio.encode import encode
from bat.config.compose import compose
from bat.config.schema import Log, Pretrain
from bat.errors import UserError
from bat.io import read_jsonl
from bat.seeding import derive_seed
from bat.train import run_pretrain
from bat.train.checkpointing import last_checkpoint
from bat.train.online import OnlineProbe
from bat.train.pretrain import Pretraining, build_objective
from bat.train.pretrain_data import open_stream
from bat.train.run_pretrain import pretrain
from bat.train.trainer import OneWandbRun
from tests.toy import make_toy_shards
from tests.train.runs import CutError, assert_same_run, metrics, run_and_cut, weights


def test_pretrain__leaves_exactly_these_files(small, tmp_path: Path) -> None:
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
        "plots/monitors.png",
        "plots/probe_curve.png",
        "summary.json",
        "train.log",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["bad_clips"]["seen"] == 30
    assert [r["step"] for r in summary["online"]] == [0, 3, 6]
    cost = summary["checkpoints"]
    assert cost["written"] == 3
    assert cost["mb"] > 1
    assert 0 < cost["longest_stall_seconds"] <= cost["stall_seconds"] < 60
    rows = metrics(out)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 4, 6]
    encoder = bat.load_encoder(out)
    assert (encoder.width, encoder.depth, encoder.grid.time) == (48, 2, 13)
    assert encoder(torch.zeros(1, 32000)).patches.shape == (2, 1, 13, 8, 48)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        # before the second checkpoint, within an accumulation, dropout at work
        (5, ["train.accumulate=2", "data.batch=2", "model.drop_path=0.3"]),
        (5, ["data.workers=1", "online.every=2", "online.steps=2", "online.batch=4"]),
        (1, ["online.every=3", "online.steps=2"]),  # before the first checkpoint: it begins anew
    ],
)
def test_pretrain__interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, words: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(small(*words, out=whole))
    run_and_cut(monkeypatch, small(*words, out=parts), at=cut)
    assert not (parts / "export").exists()
    pretrain(small(*words, out=parts))
    assert_same_run(whole, parts)


def test_pretrain__damaged_newest_checkpoint_is_passed_over(
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


def test_pretrain__modes_are_right_at_every_step_whatever_was_evaluated_before(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online probes and the check for collapse run after each step."""
    original, seen = Pretraining.training_step, []

    def step(self, batch, batch_idx):
        parts = self.objective
        seen.append([{m.training for m in p.modules()} for p in (parts.student, parts.teacher)])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", step)
    words = ["online.every=1", "online.steps=1", "health.collapse_every=1", "train.steps=2"]
    pretrain(small(*words, "model.drop_path=0.5", out=tmp_path / "run"))
    assert seen == [[{True}, {False}]] * 2


def test_pretrain__weights_that_are_not_finite_are_never_saved(
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


@pytest.mark.parametrize("words", [[], ["train.accumulate=2", "data.batch=2"]], ids=["1", "2"])
def test_teacher__follows_once_after_each_step(small, tmp_path: Path, words: list[str]) -> None:
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


def test_switches__decoders_have_the_heads_of_the_paper(small, tmp_path: Path) -> None:
    for kind, heads, hidden in (("vit12h", 12, 192), ("vit6h", 6, 96)):
        config = small(f"objective.decoder={kind}", out=tmp_path / "run")
        block = build_objective(config).student.decoder.blocks[0]
        assert (block.attn.heads, block.mlp.fc1.out_features) == (heads, hidden)


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
        ["model.drop_path=0.9"],
        ["seed=1"],
        ["frontend.pad=waveform", "data.clip_seconds=1.5"],
    ],
    ids="+".join,
)
def test_switches__each_is_one_setting_and_changes_the_loss(small, tmp_path, words) -> None:
    common = words[1:]  # both need it

    def loss(*words: str) -> float:
        config = small(*words, out=tmp_path / "run")
        torch.manual_seed(derive_seed(config.seed, "init"))
        module = Pretraining(config)
        return module.training_step(open_stream(config).data.first_batch(), 0).item()

    found = loss(*words)
    assert found == found
    assert found != loss(*common)


def test_settings__clipping_and_bfloat16_act(small, tmp_path: Path) -> None:
    pretrain(small("train.steps=2", out=tmp_path / "a"))
    pretrain(small("train.steps=2", "optim.clip_norm=0.001", out=tmp_path / "b"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[n], b[n]) for n in a)
    words = ["hardware.precision=bf16-mixed", "train.steps=1", "data.batch=1"]
    pretrain(small(*words, out=tmp_path / "half"))
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float32}
    assert metrics(tmp_path / "half")[-1]["loss"] < 5


def test_pretrain__other_settings_or_a_strange_folder_are_refused(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small("train.steps=2", out=out))
    with pytest.raises(UserError) as caught:
        pretrain(small("train.steps=2", "optim.lr=0.1", out=out))
    assert "- optim.lr: 0.001" in str(caught.value)
    assert "+ optim.lr: 0.1" in str(caught.value)
    with pytest.raises(UserError, match=r"hardware\.precision"):
        pretrain(small("train.steps=2", "hardware.precision=bf16-mixed", out=out))
    pretrain(small("train.steps=2", "train.log_every=1", out=out))  # a safe one
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="holds other things than a run"):
        pretrain(small(out=tmp_path))
    with pytest.raises(UserError, match=r"no data given.*data\.shards=DIR"):
        pretrain(compose(Pretrain, "pretrain", ["recipe=as2m"]))


def test_dry_run__writes_and_trains_nothing(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small(out=tmp_path / "run"), dry_run=True)
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert "10 clips (task toy; 5 classes: " in shown
    assert "dry run: nothing was trained" in shown


def test_as2m__builds_on_meta_and_starts_on_any_shards(tmp_path: Path) -> None:
    config = compose(Pretrain, "pretrain", ["recipe=as2m"])
    with torch.device("meta"):
        objective = build_objective(config)
    assert all(p.is_meta for p in objective.parameters())
    trainable = sum(p.numel() for p in objective.student.parameters())
    assert trainable == 139_395_840  # golden paper_config_param_counts
    assert objective.student.encoder.grid.tokens == 512
    shards = make_toy_shards(tmp_path / "toy")
    words = ["recipe=as2m", f"data.shards={shards}", f"out={tmp_path / 'run'}", "hardware=cpu"]
    words += ["model.width=48", "model.depth=1", "model.heads=2", "objective.decoder_depth=1"]
    words += ["data.batch=2", "data.global_batch=4", "data.workers=0", "objective.mask.views=2"]
    pretrain(compose(Pretrain, "pretrain", [*words, "train.steps=2"]))
    assert bat.load_encoder(tmp_path / "run").grid.tokens == 512


def test_online__several_labels_a_clip_are_scored_by_map_and_none_are_refused(
    small, tmp_path: Path
) -> None:
    names = ["a;b", "b", "a", "c;a", "b;c", "c"] * 2
    lines, bare = ["path,labels,fold"], ["path"]
    for i, label in enumerate(names):
        wave = torch.randn(16000, generator=torch.Generator().manual_seed(i)).numpy() * 0.1
        (tmp_path / f"{i}.flac").write_bytes(encode(wave, sample_rate=16000, codec="flac"))
        lines.append(f"{i}.flac,{label},{i // 6 + 1}")
        bare.append(f"{i}.flac")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    words = ["task=folder", f"data.root={tmp_path / 'mine.csv'}", "train.steps=2"]
    words += ["online.every=2", "online.steps=2"]
    pretrain(small(*words, out=tmp_path / "run"))
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["online"]
    assert [r["step"] for r in rows] == [0, 2]
    assert set(rows[0]) >= {"map", "map_std"}
    assert "accuracy" not in rows[0]
    (tmp_path / "bare.csv").write_text("\n".join(bare))
    words[1] = f"data.root={tmp_path / 'bare.csv'}"
    with pytest.raises(UserError, match="online probes need labelled clips"):
        pretrain(small(*words, out=tmp_path / "none"))


def test_online__probes_have_every_setting_of_their_head() -> None:
    config = compose(Pretrain, "pretrain", ["recipe=toy", "online.head.dropout=0.3"])
    online = SimpleNamespace(
        config=config, index=SimpleNamespace(classes=5), task=SimpleNamespace(per_class=20)
    )
    encoder = build_objective(config).encoders()["student"]
    built = OnlineProbe.build(online, "cgp", encoder=encoder)  # type: ignore[arg-type]
    assert built.dropout.p == 0.3
    assert len(built.prototypes) == config.online.head.prototypes


def test_wandb__offline_run_logs_a_step_once_over_all_starts(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra: bat-audio[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small("log.wandb=offline", "train.save_every=3", out=tmp_path / "with")
    run_and_cut(monkeypatch, config, 4)  # steps 1, 2 and 4 are logged, 3 is saved
    logged = spied_steps(monkeypatch)
    pretrain(config)
    assert set(logged) == {6}
    runs = [p.name for p in (tmp_path / "with" / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in runs}) == 1 <= len(runs)
    assert "anonymous" not in capsys.readouterr().err


def test_tensorboard__has_every_step_once_over_all_starts(small, tmp_path: Path, monkeypatch):
    pytest.importorskip("tensorboard", reason="an extra: bat-audio[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small("log.tensorboard=true", "train.save_every=3", out=tmp_path / "run")
    run_and_cut(monkeypatch, config, 4)  # steps 1, 2 and 4 are logged, 3 is saved
    pretrain(config)
    seen = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [event.step for event in seen.Scalars("loss")] == [row["step"] for row in rows]
    assert [event.value for event in seen.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows]
    )


def test_tensorboard__missing_says_what_to_install(small, tmp_path: Path, monkeypatch) -> None:
    def absent(*args, **words):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr("bat.train.trainer.TensorBoardLogger", absent)
    with pytest.raises(UserError, match=r"bat-audio\[tensorboard\]"):
        pretrain(small("log.tensorboard=true", out=tmp_path / "run"))


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


def test_wandb__a_fold_and_a_new_start_have_runs_of_their_own(tmp_path, monkeypatch) -> None:
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
    logged = spied_steps(monkeypatch)

    def start(name: str, *steps: int, resumed: bool = False) -> OneWandbRun:
        out = tmp_path / name
        (out / "wandb").mkdir(parents=True, exist_ok=True)
        run = OneWandbRun(Log(wandb="online"), out, name, resumed=resumed)
        for step in steps:
            run.log_metrics({"loss": 1.0}, step)
            run.log_metrics({"online/cgp/map": 0.5}, step)
        return run

    start("fold-1", 10, 20)
    start("fold-1", 10, 20, 30, resumed=True).finalize("success")
    assert logged == [10, 10, 20, 20, 30, 30]
    start("fold-2", 1)
    start("fold-1", 1)  # no checkpoint: nothing of the first run counts
    ids = [words["id"] for words in began]
    assert ids[0] == ids[1] == done[0]
    assert len(set(ids)) == 3


def test_pretrain__finished_run_has_nothing_to_do_and_refuses_other_data(
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
    assert summary["checkpoints"]["written"] == 3  # over both starts
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
    assert read_jsonl(out / "metrics.jsonl")
