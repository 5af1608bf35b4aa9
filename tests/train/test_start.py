"""``init=``: a run that starts from weights: its first loss, its records, its refusals."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bat
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.run_folder import check_first
from bat.seeding import derive_seed
from bat.train.pretrain import Pretraining, build_encoder
from bat.train.pretrain_data import open_stream
from bat.train.run_pretrain import pretrain
from bat.train.start import start_from
from bat.types import Grid
from bat.weights import export
from tests.train.runs import metrics, run_and_cut

TINY = ["model.width=32", "model.depth=2", "model.heads=4", "model.mlp_ratio=4"]
DECODER = ["objective.decoder_width=48", "train.steps=1", "train.log_every=1"]


def encoder_of(config, seed: int) -> BAT:
    torch.manual_seed(seed)
    encoder = build_encoder(config)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return encoder


def saved(folder: Path, config, *, teacher: bool) -> tuple[Path, BAT, BAT]:
    student, other = encoder_of(config, 1), encoder_of(config, 2)
    states = {"student": student.state_dict()}
    states |= {"teacher": other.state_dict()} if teacher else {}
    export(folder, backbone="bat", encoder=student.config(), weights=states, meta={})
    return folder, student, other if teacher else student


def first_loss(config, student, teacher) -> float:
    """Loss of step 1 with these weights put in by hand."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    module = Pretraining(config)
    module.objective.student.encoder.load_state_dict(student.state_dict())
    module.objective.teacher.encoder.load_state_dict(teacher.state_dict())
    batch = open_stream(config).data.first_batch()
    torch.manual_seed(derive_seed(config.seed, "step", 0, 0))
    return module.objective(batch)["loss"].item()


def started(config) -> tuple[Pretraining, dict]:
    """A fresh module whose encoders start from ``config.init``, and the facts."""
    module = Pretraining(config)
    return module, start_from(config, module.objective)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("bat").propagate = True
    caplog.set_level(logging.INFO, "bat")
    return caplog


@pytest.mark.parametrize("teacher", [True, False])
def test_init__first_loss_is_that_of_the_weights_put_in_by_hand(
    small, tmp_path: Path, teacher: bool
) -> None:
    plain = small("train.steps=1", "train.log_every=1", out=tmp_path / "plain")
    file, student, other = saved(tmp_path / "export", plain, teacher=teacher)
    config = small("train.steps=1", "train.log_every=1", f"init={file}", out=tmp_path / "run")
    pretrain(config)
    (row,) = [r for r in metrics(tmp_path / "run") if "loss" in r]
    by_hand = first_loss(plain, student, other)
    assert row["loss"] == pytest.approx(by_hand, abs=1e-6)
    assert first_loss(plain, student, student if teacher else encoder_of(plain, 2)) != by_hand
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    meta = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert summary["init"] == meta["init"]
    assert summary["init"]["checkpoint"] == meta["training"]["init"] == str(file)
    assert summary["init"]["teacher"] == ("of the file" if teacher else "a copy of the student")


def test_init__sharded_folder_has_both_encoders(small, tmp_path: Path) -> None:
    config = small(out=tmp_path)
    file, student, other = saved(tmp_path / "export", config, teacher=True)
    tensors = load_file(file / "model.safetensors")
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == part}, file / part)
    (file / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (file / "model.safetensors").unlink()
    module, facts = started(small(f"init={file}", out=tmp_path / "run"))
    assert facts["teacher"] == "of the file"
    encoders = module.objective.encoders()
    for who, want in (("student", student), ("teacher", other)):
        assert torch.equal(encoders[who].cls_token, want.cls_token), who


def test_init__resumed_run_does_not_read_the_file_again(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "export"
    saved(file, small(out=tmp_path / "x"), teacher=True)
    config = small(f"init={file}", "train.steps=3", "train.save_every=1", out=tmp_path / "run")
    run_and_cut(monkeypatch, config, at=2)
    shutil.rmtree(file)
    check_first(config)
    pretrain(config)
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["init"]
    assert facts["checkpoint"] == str(file)
    with pytest.raises(UserError, match=f"init={file}"):
        check_first(small(f"init={file}", out=tmp_path / "new"))


def test_init__training_checkpoint_of_an_own_run_has_both_encoders(small, tmp_path: Path) -> None:
    config = small(out=tmp_path)
    objective = Pretraining(config).objective
    objective.teacher.encoder.cls_token.data += 1
    state = {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    module, facts = started(small(f"init={tmp_path / 'last.ckpt'}", "seed=1", out=tmp_path))
    assert facts["teacher"] == "of the file"
    for who, encoder in module.objective.encoders().items():
        for name, tensor in objective.encoders()[who].state_dict().items():
            assert torch.equal(encoder.state_dict()[name], tensor), (who, name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 96, "heads": 4}, ["model.width=96", "model.heads=4"]),
        ({"depth": 3, "gate": False}, ["model.depth=3", "model.gate=false"]),
        ({"mlp_ratio": 2.0, "norm_order": "pre"}, ["model.mlp_ratio=2", "model.norm_order=pre"]),
        ({"pre_norm": False}, ["pre_norm=False"]),
    ],
)
def test_init__another_shape_is_refused_with_the_settings_that_fit(
    small, tmp_path: Path, changes: dict, named: list[str]
) -> None:
    settings = {"width": 48, "depth": 2, "heads": 2, "grid": Grid(13, 8), **changes}
    other = BAT(**settings)
    file = export(tmp_path / "export", backbone="bat", encoder=other.config(),
                  weights={"student": other.state_dict()}, meta={})  # fmt: skip
    with pytest.raises(UserError) as caught:
        started(small(f"init={file}", out=tmp_path / "run"))
    assert all(name in str(caught.value) for name in [*named, str(file)])
    assert "model.patch" not in str(caught.value)
    if "pre_norm" not in changes:
        words = [name for name in str(caught.value).split() if name.startswith("model.")]
        started(small(f"init={file}", *words, *DECODER, out=tmp_path / "fits"))


def test_init__another_grid_keeps_all_but_the_position_code(small, tmp_path: Path, said) -> None:
    other = BAT(width=48, depth=2, heads=2, grid=Grid(32, 8))
    file = export(tmp_path / "export", backbone="bat", encoder=other.config(),
                  weights={"student": other.state_dict()}, meta={})  # fmt: skip
    config = small(f"init={file}", out=tmp_path / "run")
    module, facts = started(config)
    for part in ("32 x 8 patches", "13 x 8"):
        assert part in said.text
        assert part in facts["position_code"]
    for encoder in module.objective.encoders().values():
        assert torch.equal(encoder.pos_embed, build_encoder(config).pos_embed)
        assert torch.equal(encoder.cls_token, other.cls_token)


@pytest.mark.parametrize("name", ["eat", "official", "bat_flat"])
def test_init__starts_from_the_files_of_others(
    small, golden: Path, tmp_path: Path, said, name: str
) -> None:
    file = golden / f"checkpoint_{name}_tiny.pt"
    words = [*TINY, *DECODER, f"init={file}"]
    words += ["model.gate=false", "model.pos_layout=eat", "frontend.kind=eat"] * (name == "eat")
    module, facts = started(small(*words, out=tmp_path))
    assert "frontend" not in facts
    for who, ours in module.objective.encoders().items():
        held = "teacher" if (who, name) == ("teacher", "official") else "student"
        theirs = bat.load_encoder(file, weights=held, heads=4)
        for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), (who, n)
    if name == "eat":
        with pytest.raises(UserError, match=r"model\.gate=false"):
            started(small(*TINY, *DECODER, f"init={file}", out=tmp_path))
        words.remove("frontend.kind=eat")
        assert "frontend" in started(small(*words, out=tmp_path))[1]
        assert "KaldiFbank in the file, LogMel here" in said.text


def test_compose__checkpoint_for_pretraining_names_init(small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init="):
        small("checkpoint=runs/x", out=tmp_path)
    assert small("init=runs/x", out=tmp_path).init == "runs/x"
