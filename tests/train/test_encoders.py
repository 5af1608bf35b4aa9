"""Which encoder a command starts from, and whose data it takes."""

from pathlib import Path

import pytest
import torch

from bat.backbones.bat import BAT
from bat.checkpoint import export
from bat.config.compose import to_yaml
from bat.config.schema import Hardware, Pretrain, Probe
from bat.config.sections import Data
from bat.shapes import Grid, UserError
from bat.tasks.base import load_task
from bat.train.encoders import (
    autocast_for,
    checkpoint_name,
    data_of_run,
    device_for,
    load_for,
)


@pytest.fixture
def run(tmp_path) -> Path:
    model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8), gate=False)
    state = model.state_dict()
    folder = tmp_path / "pretrain-x"
    export(folder / "export", backbone="bat", encoder=model.config(), student=state,
           teacher={k: v + 1 for k, v in state.items()}, meta={})  # fmt: skip
    config = Pretrain(task="toy", data=Data(root="some/where"))
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def _load(checkpoint, **words):
    return load_for(Probe(checkpoint=str(checkpoint), task="toy", **words), load_task("toy"))


def test_run_export_and_teacher(run):
    a, frames = _load(run)
    assert frames == 208
    assert not a.training
    b, _ = _load(run / "export")
    assert torch.equal(a.cls_token, b.cls_token)
    teacher, _ = _load(run, weights="teacher")
    assert torch.equal(teacher.cls_token, a.cls_token + 1)


def test_random_control_has_the_shape_and_other_weights(run):
    trained, _ = _load(run)
    control, _ = _load(f"random:{run}")
    assert {n: p.shape for n, p in control.state_dict().items()} == {
        n: p.shape for n, p in trained.state_dict().items()
    }
    assert not torch.equal(control.cls_token, trained.cls_token)
    assert torch.equal(control.cls_token, _load(f"random:{run}")[0].cls_token)
    assert not torch.equal(control.cls_token, _load(f"random:{run}", seed=1)[0].cls_token)


def test_random_fragments_and_unknown_shapes():
    tiny, _ = _load("random")
    assert (tiny.width, tiny.depth, tiny.heads) == (192, 6, 3)
    assert tiny.grid == Grid(13, 8)
    assert _load("random:S")[0].width == 384
    with pytest.raises(UserError, match=r"neither a run nor a model fragment \(B, L, S, tiny\)"):
        _load("random:XL")


def test_missing_checkpoint_and_bad_frames(run):
    with pytest.raises(UserError, match="no checkpoint given"):
        load_for(Probe(), load_task("toy"))
    with pytest.raises(UserError, match="does not exist"):
        _load("nowhere")
    with pytest.raises(UserError, match="frames=100 is not a multiple"):
        _load(run, frames=100)


def test_padding_is_the_checkpoints_unless_said(run):
    assert _load(run)[0].frontend.pad == "spectrogram"
    assert _load(run, pad="waveform")[0].frontend.pad == "waveform"


def test_names_for_run_folders(run):
    def name(checkpoint):
        return checkpoint_name(Probe(checkpoint=str(checkpoint)))

    assert name(run) == name(run / "export") == "pretrain-x"
    assert name(f"{run}/export/model.safetensors") == "pretrain-x"
    assert name(f"random:{run}") == "random-pretrain-x"
    assert name("random") == "random"
    assert name("weights/BAT_base.pt") == "BAT_base"


def test_data_comes_from_the_checkpoints_run_of_the_same_task(run):
    def found(checkpoint, **words):
        return data_of_run(Probe(checkpoint=str(checkpoint), **words))

    for checkpoint in (run, run / "export", f"random:{run}"):
        data, note = found(checkpoint, task="toy")
        assert data.root == "some/where"
        assert note.startswith("data some/where, as ")
        assert note.endswith("pretrain-x/config.yaml says")
    assert found(run, task="esc10")[0].root is None
    data, note = found(run, task="toy", data=Data(shards="mine"))
    assert (data.shards, data.root, note) == ("mine", None, "")


def test_devices_and_precision():
    assert device_for(Hardware(accelerator="cpu")).type == "cpu"
    with pytest.raises(UserError, match=r"accelerator=tpu: auto, cpu or gpu"):
        device_for(Hardware(accelerator="tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            device_for(Hardware(accelerator="gpu"))
    assert autocast_for(Hardware(precision="32-true")) is None
    assert autocast_for(Hardware()) is torch.bfloat16
