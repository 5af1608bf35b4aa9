"""Fine-tuning: the step, its groups and augmentations, folds that resume."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from bat import load_encoder
from bat.config.compose import compose
from bat.config.schema import Finetune
from bat.data.index import open_index
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.fit import predict
from bat.eval.heads import load_head
from bat.eval.prepare import prepare
from bat.nn.losses import LOSSES
from bat.probes.base import build_probe
from bat.train import fitting, folds
from bat.train.finetune import finetune
from bat.train.supervised import Supervised
from bat.types import Grid, WaveBatch
from bat.weights import export
from tests.toy import make_toy_shards


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


def test_groups_hold_every_parameter_once_scaled_by_layer(config, encoder):
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
def test_each_augmentation_acts_and_repeats(config, encoder, words):
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
def test_clips_of_their_own_length_train_as_each_alone(config, encoder, mixed):
    """Without ``frames`` no clip sees its padding; a mixed clip is as long as the longer."""
    module = _module(config(*QUIET, f"augment.mixup_p={mixed}", "drop_path=0"), encoder)
    module.frames = None
    module.eval()
    batch = _batch()
    batch.lengths = torch.tensor([32000, 4000, 9000, 16000])  # 13, 2, 4, 7 time patches
    x, targets, patches = module.augmented(batch, torch.Generator().manual_seed(0))
    assert patches.tolist() == ([13, 4, 4, 13] if mixed else [13, 2, 4, 7])
    assert targets.shape == (4, 5)
    logits = module.head(module.encoded(x, patches))
    for row, own in enumerate(patches.tolist()):
        alone = module.head(module.backbone.features(x[row : row + 1, :, : 16 * own]))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)
        if not mixed:
            wave = batch.waves[row, : batch.lengths[row]]
            alone = module.head(module.backbone(wave))
            torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)


def test_drop_path_is_set_linearly(config, encoder):
    module = _module(config("drop_path=0.3"), encoder)
    rates = [float(b.drop_path.rate) for b in module.backbone.blocks]
    assert rates == pytest.approx([0, 0.3])


def _losses(out) -> list[float]:
    lines = (out / "fold-1" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_finetune__drop_path_and_dropout_act_in_a_fit(config, tmp_path):
    """From the same start, with the same clips and no augmentation: only they can differ."""
    plain = ["folds=[1]", "train.log_every=1", "augment.noise_p=0", "augment.spec_freq=0",
             "augment.spec_time=0", "drop_path=0", "head.dropout=0"]  # fmt: skip

    def losses(name: str, *words: str) -> list[float]:
        return _losses(finetune(config(*plain, *words, f"out={tmp_path}/{name}")))

    without = losses("without")
    assert losses("again") == without
    assert losses("drop-path", "drop_path=0.9")[0] != without[0]
    assert losses("dropout", "head.dropout=0.9")[0] != without[0]


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


def test_predict__leaves_modes_as_they_were(config, encoder):
    module = _module(config("head.dropout=0.5"), encoder)
    features = module.backbone.eval().features(torch.rand(2, 1, 208, 128))
    batches = [(features, torch.eye(5)[:2])]
    for training in (True, False):
        module.head.train(training)
        first, _ = predict({"head": module.head}, iter(batches))
        second, _ = predict({"head": module.head}, iter(batches))
        assert torch.equal(first["head"], second["head"])  # no dropout
        assert all(m.training == training for m in module.head.modules())


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


def test_killed_and_continued_equals_uninterrupted(config, tmp_path, monkeypatch):
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


def test_training_learns_the_clips(config, tmp_path):
    words = ["train.steps=20", "optim.lr=0.01", "optim.warmup_steps=3", "augment.noise_p=0",
             "augment.spec_freq=0", "folds=[1]", "drop_path=0", "head.dropout=0"]  # fmt: skip
    out = finetune(config(*words))
    rows = [json.loads(line) for line in (out / "fold-1/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


def test_other_settings_in_the_same_folder_are_refused(config):
    finetune(config("train.steps=1", "folds=[1]"))
    with pytest.raises(UserError, match="run with other settings"):
        finetune(config("train.steps=2", "folds=[1]"))


QUICK = ("train.steps=1", "folds=[1]")


def test_only_the_first_process_writes_the_summary(config, tmp_path, monkeypatch, capsys):
    out = finetune(config(*QUICK))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "plots")
    capsys.readouterr()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    finetune(config(*QUICK))
    assert capsys.readouterr().out == ""
    assert not (out / "summary.json").exists()
    assert not (out / "plots").exists()


def test_a_finished_fold_of_something_else_is_not_taken(config, tmp_path):
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


def test_held_out_clips_that_cannot_be_read_are_counted(config, tmp_path, capfd):
    root = make_toy_shards(tmp_path / "toy", seconds=2.0)
    index = open_index(root)
    bad = int(index.clips_in_fold(1)[0])
    with index.paths[index.shard[bad]].open("r+b") as file:
        file.seek(int(index.offset[bad]))
        file.write(b"\0" * int(index.size[bad]))
    words = (*QUICK, f"data.shards={root}")
    with pytest.raises(UserError, match=r"1 of 5 clips unreadable .*max_bad=0\.05"):
        finetune(config(*words))
    out = finetune(config(*words, "data.max_bad=0.5"))
    result = json.loads((out / "fold-1/result.json").read_text())
    assert result["held_out_bad"]["seen"] == 5
    assert list(result["held_out_bad"]["keys"]) == [index.key(bad)]
    assert json.loads((out / "summary.json").read_text())["held_out_bad"]["1"]["seen"] == 5
    assert "judging: 1 of 5 clips unreadable (1 corrupt)" in capfd.readouterr().err


def test_short_clips_are_placed_at_random_in_training(config, tmp_path):
    words = ("pad=waveform", "pad_offset=random", "data.clip_seconds=2.05", "data.roll=false")
    ready = prepare(config(*words))
    run = folds.Folds(ready, tmp_path)
    batch = next(iter(run.data(ready.rounds[0]).train_dataloader()))
    assert batch.lengths.tolist() == [32_800] * 5  # the whole window is signal
    starts = [int(wave.nonzero()[0]) for wave in batch.waves]
    assert len(set(starts)) > 2
    assert max(starts) <= 800


def test_what_a_head_adds_to_the_loss_is_in_the_step(config, encoder):
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
