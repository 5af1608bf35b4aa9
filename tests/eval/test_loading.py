"""Loads the encoder of a command, and finds the data of its run."""

from pathlib import Path

import pytest
import torch

from bat.config.compose import to_yaml
from bat.config.probing import Head, Protocol
from bat.config.schema import Finetune, Hardware, Pretrain, Probe
from bat.config.sections import Data
from bat.encoders.audiomae import AudioMAE
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT, NAMES, PREFIX
from bat.errors import UserError
from bat.eval.encoder_list import checkpoint_name
from bat.eval.loading import autocast_for, data_of_run, device_for, load_for, weights_digest
from bat.eval.prepare import check_frames, kaldi_line
from bat.tasks.base import load_task
from bat.types import Grid
from bat.weights import export
from tests.encoders.tiny import tiny


@pytest.fixture
def run(tmp_path) -> Path:
    model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8), gate=False)
    state = model.state_dict()
    folder = tmp_path / "pretrain-x"
    both = {"student": state, "teacher": {k: v + 1 for k, v in state.items()}}
    export(folder / "export", backbone="bat", encoder=model.config(), weights=both, meta={})
    config = Pretrain(task="toy", data=Data(root="some/where"))
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def _load(checkpoint, **words):
    return load_for(Probe(checkpoint=str(checkpoint), task="toy", **words), load_task("toy"))


def test_load_for__run_export_and_teacher(run):
    a, frames = _load(run)
    assert frames == 208
    assert not a.training
    b, _ = _load(run / "export")
    assert torch.equal(a.cls_token, b.cls_token)
    teacher, _ = _load(run, weights="teacher")
    assert torch.equal(teacher.cls_token, a.cls_token + 1)


def test_load_for__random_baseline_of_a_run(run):
    trained, _ = _load(run)
    control, _ = _load(f"random:{run}")
    assert {n: p.shape for n, p in control.state_dict().items()} == {
        n: p.shape for n, p in trained.state_dict().items()
    }
    assert not torch.equal(control.cls_token, trained.cls_token)
    assert torch.equal(control.cls_token, _load(f"random:{run}")[0].cls_token)
    assert not torch.equal(control.cls_token, _load(f"random:{run}", seed=1)[0].cls_token)


def test_load_for__random_baseline_of_a_fragment():
    tiny, _ = _load("random")
    assert (tiny.width, tiny.depth, tiny.heads) == (192, 6, 3)
    assert tiny.grid == Grid(13, 8)
    assert _load("random:S")[0].width == 384
    with pytest.raises(UserError, match=r"neither a run, a model fragment \(B, L, S, tiny\)"):
        _load("random:XL")


def test_load_for__missing_checkpoint_and_bad_frames(run):
    with pytest.raises(UserError, match="no checkpoint given"):
        load_for(Probe(), load_task("toy"))
    with pytest.raises(UserError, match="does not exist"):
        _load("nowhere")
    with pytest.raises(UserError, match="frames=100 is not a multiple"):
        check_frames(_load(run)[0], frames=100, clip_seconds=0.5)


def test_load_for__padding(run):
    assert _load(run)[0].frontend.pad == "spectrogram"
    trained, padded = _load(run)[0], _load(run, pad="waveform")[0]
    assert padded.frontend.pad == "waveform"
    assert padded.config()["frontend"]["pad"] == "waveform"  # so its exports say it too
    assert torch.equal(padded.pos_embed, trained.pos_embed)
    assert not padded.training
    assert _load(run, pad="waveform", pad_offset="random")[1] == 208
    clip = _load(run, pad="clip", pad_offset="random", data=Data(clip_seconds=2.0))[0]
    assert (clip.frontend.pad, clip.frontend.clip_samples) == ("clip", 32000)
    state = clip.state_dict()
    export(run / "clip", backbone="bat", encoder=clip.config(), weights={"student": state}, meta={})
    assert _load(run / "clip", data=Data(clip_seconds=2.0))[0].frontend.clip_samples == 32000
    assert _load(run / "clip", data=Data(clip_seconds=1.0))[0].frontend.clip_samples == 16000
    assert _load(run / "clip", pad="spectrogram")[0].frontend.clip_samples == 0
    with pytest.raises(UserError, match=r"pad_offset=random .* say pad=clip"):
        _load(run, pad_offset="random")


@pytest.fixture
def eat_file(tmp_path) -> Path:
    """A weight file as EAT and SSLAM publish them."""
    names = {own: PREFIX + theirs for theirs, own in NAMES.items()}
    state = EAT(width=64, depth=1, heads=1, grid=Grid(64, 8)).state_dict()
    torch.save({"model": {names.get(k, k): v for k, v in state.items()}}, tmp_path / "EAT.pt")
    return tmp_path / "EAT.pt"


def test_load_for__statistics_of_a_foreign_file_are_the_tasks(eat_file, run):
    def front(task, checkpoint=eat_file, **words):
        config = Probe(checkpoint=str(checkpoint), task=task, **words)
        return load_for(config, load_task(task))[0].frontend

    assert front("esc10").statistics == front("esc50").statistics == "esc50"
    assert front("esc10").mean == -6.85408831
    assert front("audioset").statistics == front("folder").statistics == "audioset"
    assert front("esc10", f"random:{eat_file}").statistics == "esc50"
    assert front("esc10", statistics="hsn").mean == -8.55048120
    own = front("esc10", statistics="audioset-eat", pad="fbank")  # EAT's and SSLAM's own
    assert (own.mean, own.std) == (-4.268, 4.569)
    assert own(torch.zeros(1, 400), 2)[0, 0, 1, 0] == pytest.approx(4.268 / (2 * 4.569))
    other = AudioMAE(width=64, depth=1, heads=1, grid=Grid(2, 8)).state_dict()
    torch.save(other, eat_file.parent / "audiomae.pth")  # trained with one pair, not the task's
    assert front("esc10", eat_file.parent / "audiomae.pth").statistics == "audioset-ast"
    with pytest.raises(UserError, match="statistics='birds': none known"):
        front("esc10", statistics="birds")
    with pytest.raises(UserError, match=r"statistics=esc50: .*\(LogMel\) uses none"):
        front("esc10", run, statistics="esc50")


def test_load_for__statistics_of_an_export_are_its_own(eat_file):
    tuned, _ = load_for(Probe(checkpoint=str(eat_file), task="esc10"), load_task("esc10"))
    folder = eat_file.parent / "export"
    export(
        folder,
        backbone="eat",
        encoder=tuned.config(),
        weights={"student": tuned.state_dict()},
        meta={},
    )
    again, _ = load_for(Probe(checkpoint=str(folder), task="folder"), load_task("folder"))
    assert again.frontend.statistics == "esc50"
    assert kaldi_line(again.frontend) == (
        "front end: Kaldi filter bank (eat), statistics=esc50: mean -6.8541, deviation 5.3977"
    )


def test_check_frames__longer_clips_are_refused(run):
    backbone, frames = _load(run)
    check_frames(backbone, frames=frames, clip_seconds=2.0)
    with pytest.raises(UserError, match=r"clip_seconds=2\.5 makes 251 frames.*say frames=256"):
        check_frames(backbone, frames=frames, clip_seconds=2.5)
    check_frames(backbone, frames=1024, clip_seconds=10.23)
    check_frames(backbone, frames=12_000, clip_seconds=120)  # 12,001: one is cut off
    with pytest.raises(UserError, match=r"makes 12002 frames"):
        check_frames(backbone, frames=12_000, clip_seconds=120.01)


def test_weights_digest__differs_by_weights_and_settings(run):
    first, digest = _load(run)[0], weights_digest(_load(run)[0])
    assert weights_digest(first) == digest
    assert weights_digest(_load(run, pad="waveform")[0]) != digest
    with torch.no_grad():
        first.cls_token[0, 0, 0] += 1
    assert weights_digest(first) != digest


def test_checkpoint_name__runs_exports_and_files(run):
    def name(checkpoint):
        return checkpoint_name(Probe(checkpoint=str(checkpoint)))

    assert name(run) == name(run / "export") == "pretrain-x"
    assert name(f"{run}/export/model.safetensors") == "pretrain-x"
    assert name(f"random:{run}") == "random-pretrain-x"
    assert name("random") == "random"
    assert name("weights/BAT_base.pt") == "BAT_base"


def test_data_of_run__pretraining_of_the_same_task(run):
    def found(checkpoint, **words):
        return data_of_run(Probe(checkpoint=str(checkpoint), **words))

    for checkpoint in (run, run / "export", f"random:{run}"):
        data, note = found(checkpoint, task="toy")
        assert data.root == "some/where"
        assert note.startswith("data some/where, as ")
        assert note.endswith("pretrain-x/config.yaml says")
    assert found(run, task="esc10")[0].root is None
    data, note = found(run, task="toy", data=Data(shards=["mine"]))
    assert (data.shards, data.root, note) == (["mine"], None, "")


def test_data_of_run__finetuning(tmp_path):
    fold = tmp_path / "finetune-x" / "fold-1" / "export"
    fold.mkdir(parents=True)
    (fold / "model.safetensors").touch()
    config = Finetune(task="esc10", data=Data(shards=["its/shards"]))
    (tmp_path / "finetune-x/config.yaml").write_text(to_yaml(config))
    for checkpoint in (fold, fold / "model.safetensors"):
        data, note = data_of_run(Probe(checkpoint=str(checkpoint), task="esc10"))
        assert data.shards == ["its/shards"]
        assert note.endswith("finetune-x/config.yaml says")


@pytest.mark.parametrize("text", ["learning_rate: 3\n", "- a list\n", "a: [\n", "seed: x\n", ""])
def test_data_of_run__ignores_other_programs_files(run, text):
    (run / "export/config.yaml").write_text(text)
    assert data_of_run(Probe(checkpoint=f"{run}/export", task="toy"))[0].root == "some/where"
    (run / "config.yaml").write_text(text)
    assert data_of_run(Probe(checkpoint=f"{run}/export", task="toy"))[0].root is None


def test_device_for__unavailable_device_is_an_error():
    assert device_for(Hardware(accelerator="cpu")).type == "cpu"
    with pytest.raises(UserError, match=r"accelerator=tpu: auto, cpu or gpu"):
        device_for(Hardware(accelerator="tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            device_for(Hardware(accelerator="gpu"))
    assert autocast_for(Hardware(precision="32-true")) is None
    assert autocast_for(Hardware(precision="bf16-mixed")) is torch.bfloat16


CLS = {
    "default": ({}, False),
    "asked": ({"cls": "mean"}, True),
    "protocol": ({"protocol": Protocol(name="bat")}, True),
    "not": ({"protocol": Protocol(name="bat"), "cls": "none"}, False),
    "head": ({"protocol": Protocol(name="bat"), "head": Head(cls="patches")}, False),
}


@pytest.mark.parametrize("case", CLS)
def test_load_for__class_token_of_beats(tmp_path, case):
    words, has_cls = CLS[case]
    model = tiny("beats")
    state = {"student": model.state_dict()}
    export(tmp_path / "b", backbone="beats", encoder=model.config(), weights=state, meta={})
    encoder, _ = _load(tmp_path / "b", **words)
    assert encoder.has_cls == has_cls
    with torch.no_grad():
        cls, patches = encoder(torch.randn(2, 11 * 16000))[1::-1]
    if has_cls:  # the mean over chunks of 64 time patches, as published
        means = torch.stack([part.mean((2, 3)) for part in patches.split(64, dim=2)])
        torch.testing.assert_close(cls, means.mean(0))
    else:
        assert cls is None


def test_load_for__cls_of_another_encoder_is_refused(run):
    with pytest.raises(UserError, match="cls=mean: BAT"):
        _load(run, cls="mean")
