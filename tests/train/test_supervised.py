"""Fine-tuning: the step, its groups and augmentations, folds that resume."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from bat import load_encoder
from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.index import open_index
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.heads import load_head
from bat.eval.prepare import prepare
from bat.eval.probe import probe
from bat.nn import block
from bat.nn.losses import LOSSES
from bat.probes.base import build_probe
from bat.train import fitting
from bat.train.finetune import Folds, finetune
from bat.train.supervised import Supervised
from bat.types import Grid, WaveBatch
from bat.weights import export
from tests.toy import make_toy_shards
from tests.train.runs import damage


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An export of a very narrow encoder with random weights."""
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))
    state = model.state_dict()
    return export(
        tmp_path_factory.mktemp("run") / "export",
        backbone="bat", encoder=model.config(), weights={"student": state}, meta={},
    )  # fmt: skip


@pytest.fixture
def config(encoder, tmp_path, tmp_path_factory):
    def build(*words: str) -> Finetune:
        cache = tmp_path_factory.getbasetemp() / "shards"
        own = ["recipe=toy", f"checkpoint={encoder}", f"data.cache={cache}", f"out={tmp_path}/run",
               "train.steps=4", "train.save_every=2", "train.log_every=2", "optim.warmup_steps=1",
               "log.progress=false"]  # fmt: skip
        merged = dict(w.split("=", 1) for w in [*own, *words])
        return compose(Finetune, "finetune", [f"{k}={v}" for k, v in merged.items()])

    return build


def _module(config: Finetune, encoder) -> Supervised:
    backbone = load_encoder(encoder)
    torch.manual_seed(0)
    head = build_probe("linear", classes=5, width=16, depth=2, has_cls=True)
    return Supervised(config, backbone=backbone, head=head, loss=LOSSES["ce"], frames=208, fold="1")


def _batch(clips: int = 4) -> WaveBatch:
    g = torch.Generator().manual_seed(0)
    return WaveBatch(
        waves=torch.randn(clips, 32000, generator=g) * 0.1,
        lengths=torch.full((clips,), 32000),
        targets=torch.eye(5)[:clips],
        keys=[str(i) for i in range(clips)],
        positions=torch.arange(clips),
        skipped=[],
    )


def test_optimizer__groups_hold_every_parameter_once_scaled_by_layer(config, encoder):
    module = _module(config("optim.layer_decay=0.5"), encoder)
    groups = module.configure_optimizers().param_groups
    named = {n: g for g in groups for n in g["param_names"]}
    assert set(named) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert named["head.fc.weight"]["scale"] == 1
    assert named["backbone.blocks.1.attn.qkv.weight"]["scale"] == 0.5
    assert named["backbone.blocks.0.attn.qkv.weight"]["scale"] == 0.25
    assert named["backbone.patch_embed.proj.weight"]["scale"] == 0.125
    assert named["backbone.cls_token"]["weight_decay"] == 0
    assert named["head.fc.weight"]["weight_decay"] == 0.05
    assert groups[0]["scale"] == 1  # its rate is the one logged


@pytest.mark.parametrize(
    "words",
    [
        ["augment.mixup_p=1", "augment.noise_p=0", "augment.spec_freq=0", "augment.spec_time=0"],
        ["augment.mixup_p=0", "augment.noise_p=1", "augment.spec_freq=0", "augment.spec_time=0"],
        ["augment.mixup_p=0", "augment.noise_p=0", "augment.spec_freq=64", "augment.spec_time=0"],
        ["augment.mixup_p=0", "augment.noise_p=0", "augment.spec_freq=0", "augment.spec_time=99"],
        ["augment.mixup_p=0", "augment.noise_p=0", "augment.spec_freq=0", "augment.spec_time=0",
         "augment.time_roll=true"],
    ],
)  # fmt: skip
def test_augmentation__each_acts_and_repeats(config, encoder, words):
    def augmented(*own: str, seed: int = 0):
        module = _module(config(*own), encoder)
        x, targets, patches = module.augmented(_batch(), torch.Generator().manual_seed(seed))
        assert patches is None  # a fixed number of frames
        return x, targets

    off = [f"{w.split('=')[0]}=0" for w in words]
    plain, targets = augmented(*off)
    acted, mixed = augmented(*words)
    assert plain.shape == acted.shape == (4, 1, 208, 128)
    assert not torch.equal(plain, acted)
    assert torch.equal(targets, mixed) == ("mixup_p=1" not in words[0])
    again = augmented(*words)
    assert torch.equal(acted, again[0])
    assert not torch.equal(acted, augmented(*words, seed=1)[0])


@pytest.mark.parametrize(
    ("pad", "samples", "own"),
    [("spectrogram", 32_000, 201), ("waveform", 32_000, 208), ("clip", 8_000, 201)],
)
def test_time_roll__zero_frames_stay_at_the_end(config, encoder, pad, samples, own):
    """2 s are 201 frames; where the waveform is padded all 208 are the clip's, and where it is
    padded to 2 s, 201 of a shorter clip too."""
    module = _module(config("augment.time_roll=true", "augment.noise_p=0", "augment.spec_freq=0",
                            "augment.spec_time=0"), encoder)  # fmt: skip
    front = module.backbone.frontend
    front.pad, front.clip_samples = pad, 32_000 if pad == "clip" else 0
    batch = _batch()
    batch.lengths = torch.full_like(batch.lengths, samples)
    whole = module.backbone.inputs(batch.waves, batch.lengths, frames=208)
    rolled, *_ = module.augmented(batch, torch.Generator().manual_seed(1))
    shift = next(s for s in range(own) if rolled[0, :, :own].equal(whole[0, :, :own].roll(s, 1)))
    assert shift > 0
    assert rolled[:, :, :own].equal(whole[:, :, :own].roll(shift, 2))
    assert rolled[:, :, own:].equal(whole[:, :, own:])


QUIET = ["augment.noise_p=0", "augment.spec_freq=0", "augment.spec_time=0"]


@pytest.mark.parametrize("mixed", [0, 1])
def test_lengths__clips_train_as_each_alone(config, encoder, mixed):
    """Without ``frames`` no clip sees its padding; a mixed clip is as long as the longer."""
    module = _module(config(*QUIET, f"augment.mixup_p={mixed}", "drop_path=0"), encoder)
    module.frames = None
    module.eval()
    batch = _batch()
    batch.lengths = torch.tensor([32000, 4000, 9000, 16000])  # 13, 2, 4, 7 time patches
    x, targets, patches = module.augmented(batch, torch.Generator().manual_seed(0))
    assert patches.tolist() == ([13, 4, 4, 13] if mixed else [13, 2, 4, 7])
    assert targets.shape == (4, 5)
    features = module.backbone.features_alone(x, patches, total=13)
    logits = module.head(features)
    for row, own in enumerate(patches.tolist()):
        alone = module.head(module.backbone.features(x[row : row + 1, :, : 16 * own]))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)
        if not mixed:
            wave = batch.waves[row, : batch.lengths[row]]
            alone = module.head(module.backbone(wave))
            torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)


class _Modes(Callback):
    """The modes of all modules of the LightningModule at the start of each micro-batch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        self.seen.append({name: m.training for name, m in pl_module.named_modules()})


def test_finetune__everything_trains_until_the_last_step(config, tmp_path, monkeypatch):
    build, modes = fitting.build_trainer, _Modes()

    def watched(**words):
        trainer = build(**words)
        trainer.callbacks.append(modes)
        return trainer

    monkeypatch.setattr(fitting, "build_trainer", watched)
    finetune(config())
    assert len(modes.seen) == 8  # two folds of four steps: the first was judged before the second
    assert all(all(seen.values()) for seen in modes.seen)


def test_step__drop_path_and_dropout_act(config, encoder):
    """From the same start with the same clips and no augmentation: only they can differ."""

    def loss(*words: str) -> float:
        words = (*QUIET, "augment.mixup_p=0", *words)
        module = _module(config(*words), encoder)
        module.head.train()
        return module.training_step(_batch(), 0).item()

    module = _module(config("drop_path=0.3"), encoder)
    assert [float(b.drop_path.rate) for b in module.backbone.blocks] == pytest.approx([0, 0.3])
    without = loss("drop_path=0")
    assert loss("drop_path=0") == without
    assert loss("drop_path=0.9") != without


class _KilledError(Exception):
    pass


class _Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.at:
            raise _KilledError


def _weights(out, fold: int) -> dict[str, torch.Tensor]:
    head, _ = load_head(out / f"fold-{fold}" / "head")
    encoder = load_encoder(out / f"fold-{fold}" / "export")
    return {**head.state_dict(), **encoder.state_dict()}


def test_finetune__killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    whole = finetune(config(f"out={tmp_path}/whole"))
    build, kills = fitting.build_trainer, []

    def dying(**words):
        trainer = build(**words)
        if words["name"].endswith("-2") and not kills:
            kills.append(True)
            trainer.callbacks.append(_Kill(at=3))
        return trainer

    monkeypatch.setattr(fitting, "build_trainer", dying)
    with pytest.raises(_KilledError):
        finetune(config(f"out={tmp_path}/parts"))
    done = (tmp_path / "parts/fold-1/result.json").stat().st_mtime_ns
    parts = finetune(config(f"out={tmp_path}/parts"))
    assert (parts / "fold-1/result.json").stat().st_mtime_ns == done  # read, not made again
    for fold in (1, 2):
        wanted, found = _weights(whole, fold), _weights(parts, fold)
        assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    a, b = (json.loads((o / "summary.json").read_text()) for o in (whole, parts))
    assert a["results"] == b["results"]
    assert a["how"] == (
        "weights after the last step, evaluated on the held-out clips; nothing was selected on them"
    )
    rows = [json.loads(line) for line in (parts / "fold-2/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 4]


QUICK = ("train.steps=1", "folds=[1]")


def test_finetune__only_the_first_process_writes_the_summary(config, tmp_path, monkeypatch, capsys):
    out = finetune(config(*QUICK))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "plots")
    capsys.readouterr()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    finetune(config(*QUICK))
    assert capsys.readouterr().out == ""
    assert not (out / "summary.json").exists()
    assert not (out / "plots").exists()


def test_finetune__finished_fold_of_something_else_is_refused(config, tmp_path):
    def encoder(seed: int) -> None:
        torch.manual_seed(seed)
        model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))
        export(tmp_path / "export", backbone="bat", encoder=model.config(),
               weights={"student": model.state_dict()}, meta={})  # fmt: skip

    words = (*QUICK, f"checkpoint={tmp_path}/export")
    encoder(1)
    out = finetune(config(*words))
    finetune(config(*words))
    encoder(2)
    said = "fold-1/result.json was made from other encoder .*: remove .*/fold-1 to train it again"
    with pytest.raises(UserError, match=said):
        finetune(config(*words))
    (out / "fold-1/result.json").rename(tmp_path / "result.json")
    with pytest.raises(UserError, match="unfinished fold 1 began with another encoder"):
        finetune(config(*words))
    encoder(1)
    result = json.loads((tmp_path / "result.json").read_text())
    result["made_from"]["data"] = "0"
    (out / "fold-1/result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="made from other data"):
        finetune(config(*words))
    (out / "fold-1/result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        finetune(config(*words))


def test_finetune__held_out_clips_that_cannot_be_read_are_counted(config, tmp_path, capfd):
    root = make_toy_shards(tmp_path / "toy", seconds=2.0)
    index = open_index(root)
    bad = int(index.clips_in_fold(1)[0])

    damage(root, bad)
    words = (*QUICK, f"data.shards={root}")
    with pytest.raises(UserError, match=r"1 of 5 clips unreadable .*max_bad=0\.05"):
        finetune(config(*words))
    out = finetune(config(*words, "data.max_bad=0.5"))
    result = json.loads((out / "fold-1/result.json").read_text())
    assert result["held_out_bad"]["seen"] == 5
    assert list(result["held_out_bad"]["keys"]) == [index.key(bad)]
    assert json.loads((out / "summary.json").read_text())["held_out_bad"]["1"]["seen"] == 5
    assert "evaluation: 1 of 5 clips unreadable (1 corrupt)" in capfd.readouterr().err
    damage(root, *range(len(index)))
    with pytest.raises(UserError, match=r"no clip of the first batch .*corrupt"):
        finetune(config(*words, f"out={tmp_path}/dry"), dry_run=True)


def test_pad_offset__short_clips_are_placed_at_random(config, tmp_path):
    words = ("pad=waveform", "pad_offset=random", "data.clip_seconds=2.05", "data.roll=false")
    ready = prepare(config(*words))
    run = Folds(ready, tmp_path)
    batch = next(iter(run.data(ready.splits[0]).train_dataloader()))
    assert batch.lengths.tolist() == [32_800] * 5  # the whole window is signal
    starts = [int(wave.nonzero()[0]) for wave in batch.waves]
    assert len(set(starts)) > 2
    assert max(starts) <= 800


def test_hardware__blocks_are_compiled_and_recomputed(config, tmp_path, monkeypatch):
    compiled, recomputed, real = [], [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compiled.append(f) or real(f, backend="eager")
    )
    checkpoint = block.checkpoint
    monkeypatch.setattr(
        block, "checkpoint", lambda *a, **k: recomputed.append(1) or checkpoint(*a, **k)
    )
    found = {}
    for word in ("seed=0", "hardware.compile=blocks", "hardware.activation_checkpointing=true"):
        compiled.clear()
        recomputed.clear()
        words = ("folds=[1]", "train.steps=2", "train.log_every=1", f"out={tmp_path}/{word}")
        out = finetune(config(*words, word))
        rows = (out / "fold-1/metrics.jsonl").read_text().splitlines()
        found[word] = [json.loads(row)["loss"] for row in rows]
        assert len(compiled) == (2 if "compile" in word else 0)  # two blocks
        assert len(recomputed) == (4 if "checkpointing" in word else 0)  # in two steps
    compiled.clear()
    words = [f"checkpoint={tmp_path}/seed=0/fold-1/export", "recipe=toy", "folds=[1]"]
    words += ["methods=[linear]", "train.steps=2", f"data.cache={tmp_path}/shards"]
    probe(compose(Probe, "probe", [*words, "hardware.compile=blocks", f"out={tmp_path}/probe"]))
    assert len(compiled) == 2
    plain, *others = found.values()
    assert len(plain) == 2
    assert all(losses == pytest.approx(plain, rel=1e-5) for losses in others)


def test_head__what_it_adds_to_the_loss_is_in_the_step(config, encoder):
    """The group lasso of h2t: heavier by its weight times its penalty, nothing else."""
    losses, penalty = [], 0.0
    for lasso in (0.0, 0.5):
        backbone = load_encoder(encoder)
        torch.manual_seed(0)
        head = build_probe("h2t", classes=5, width=16, depth=2, has_cls=True, lasso=lasso)
        module = Supervised(config("method=h2t"), backbone=backbone, head=head,
                            loss=LOSSES["ce"], frames=208, fold="1")  # fmt: skip
        losses.append(float(module.training_step(_batch(), 0).detach()))
        penalty = float(head.penalty().detach())
    assert losses[1] == pytest.approx(losses[0] + 0.5 * penalty, rel=1e-4)
    assert penalty > 0.1
