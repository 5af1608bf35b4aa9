"""Every weight file of SPEC section 7: read strictly, same features; exports; refusals."""

import json
import os
from pathlib import Path

import pytest
import torch

import bat
from bat import checkpoint
from bat.backbones.bat import BAT
from bat.backbones.eat import EAT
from bat.shapes import Grid, UserError
from tests.golden_files import Golden

CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize(
    ("file", "weights", "expected"),
    [
        ("checkpoint_official_tiny.pt", "student", "student_encoder"),
        ("checkpoint_official_tiny.pt", "teacher", "ema_encoder"),
        ("checkpoint_bat_state_dict_tiny.pt", "student", "student_encoder"),
        ("checkpoint_bat_state_dict_tiny.pt", "teacher", "ema_encoder"),
        ("checkpoint_bat_flat_tiny.pt", "student", "student_encoder"),
        ("checkpoint_eat_tiny.pt", "student", "eat"),
    ],
)
def test_golden_files_give_the_expected_features(
    golden: Path, file: str, weights: str, expected: str
) -> None:
    data = Golden(golden / "checkpoint_expected.npz")
    encoder = bat.load_encoder(golden / file, weights=weights, heads=4)
    assert isinstance(encoder, EAT) == (expected == "eat")
    assert not encoder.training
    with torch.no_grad():
        features = encoder.features(data["x"])
    torch.testing.assert_close(features.cls, data[f"{expected}/cls_tokens"], **CLOSE)
    patches = data[f"{expected}/patch_tokens"].permute(0, 1, 3, 4, 2)  # to (L, B, T, F, D)
    torch.testing.assert_close(features.patches, patches, **CLOSE)


def test_golden_file_without_heads_asks_for_them(golden: Path) -> None:
    with pytest.raises(UserError, match=r"width 32 is not a multiple of 64.*heads=4"):
        bat.load_encoder(golden / "checkpoint_bat_flat_tiny.pt")


def test_golden_file_with_one_encoder_has_no_teacher(golden: Path) -> None:
    for file in ("checkpoint_eat_tiny.pt", "checkpoint_bat_flat_tiny.pt"):
        with pytest.raises(UserError, match="no teacher"):
            bat.load_encoder(golden / file, weights="teacher", heads=4)


def tiny(seed: int) -> BAT:
    torch.manual_seed(seed)
    return BAT(width=64, depth=2, heads=2, grid=Grid(4, 8)).eval()


def write_export(folder: Path) -> tuple[BAT, BAT]:
    student, teacher = tiny(0), tiny(1)
    checkpoint.export(
        folder,
        backbone="bat",
        encoder=student.config(),
        weights={"student": student.state_dict(), "teacher": teacher.state_dict()},
        meta={"steps": 7},
    )
    return student, teacher


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export_and_load_are_bit_exact(tmp_path: Path, weights: str) -> None:
    student, teacher = write_export(tmp_path / "export")
    wanted = student if weights == "student" else teacher
    for path in (tmp_path, tmp_path / "export"):  # a run folder, and the export itself
        encoder = bat.load_encoder(path, weights=weights)
        assert encoder.config() == wanted.config()
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], tensor), name


def test_export_holds_exactly_two_files_and_the_papers_names(tmp_path: Path) -> None:
    write_export(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    names = set(checkpoint.read_tensors(tmp_path / "model.safetensors"))
    expected = {f"{w}.encoder.{n}" for w in ("student", "teacher") for n in tiny(0).state_dict()}
    assert names == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["version"], config["steps"]) == ("bat-export", 1, 7)


def test_bare_safetensors_encoder_loads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    student = tiny(0)
    save_file(student.state_dict(), tmp_path / "model.safetensors")
    encoder = bat.load_encoder(tmp_path / "model.safetensors", heads=2)
    x = torch.rand(1, 1, 64, 128)
    assert torch.equal(encoder.features(x).patches, student.features(x).patches)


def test_heads_default_to_width_over_64(tmp_path: Path) -> None:
    torch.save(tiny(0).state_dict(), tmp_path / "w.pt")
    assert bat.load_encoder(tmp_path / "w.pt").heads == 1


def test_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    state = tiny(0).state_dict()
    del state["blocks.1.attn.gate.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        bat.load_encoder(tmp_path / "w.pt")
    assert "missing: blocks.1.attn.gate.bias (64,)" in str(caught.value)
    assert "unexpected: blocks.1.attn.extra (1,)" in str(caught.value)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing: blocks\.2"):
        bat.load_encoder(tmp_path)


def test_steps_of_a_training_file_are_a_number_or_not_told(tmp_path: Path) -> None:
    state = tiny(0).state_dict()
    for steps, told in ((7, {"steps": 7}), ([[7]], {}), (None, {})):
        held = {"encoder": state, "ema_encoder": state, "optimized_steps": steps}
        torch.save(held, tmp_path / "w.pt")
        assert checkpoint.read_encoder(tmp_path / "w.pt").meta == told


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Malicious(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read without running code"):
        bat.load_encoder(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "does not exist"),
        ("notes.txt", b"hello", "unknown kind of weight file"),
        ("broken.pt", b"hello", "cannot be read"),
        ("broken.safetensors", b"hello", "not a readable safetensors"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        bat.load_encoder(tmp_path / name)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        bat.load_encoder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has not finished"):
        bat.load_encoder(tmp_path)


def test_a_file_that_is_no_encoder_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"no student encoder.*fc\.weight"):
        bat.load_encoder(tmp_path / "w.pt")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"version": 1' + "0" * 5_000 + "}"])
def test_a_config_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    write_export(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is missing or not JSON"):
        bat.load_encoder(tmp_path)
