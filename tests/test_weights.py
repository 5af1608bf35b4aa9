"""Every kind of weight file: read strictly, same features; exports; refusals."""

import argparse
import collections
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import bat
from bat import weights as checkpoint
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT, NAMES, PREFIX
from bat.errors import UserError
from bat.types import Grid
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
    with pytest.raises(UserError, match=r"no encoder that is known.*fc\.weight"):
        bat.load_encoder(tmp_path / "w.pt")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"version": 1' + "0" * 5_000 + "}"])
def test_a_config_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    write_export(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is missing or not JSON"):
        bat.load_encoder(tmp_path)


def eat(seed: int = 0) -> EAT:
    torch.manual_seed(seed)
    model = EAT(width=64, depth=2, heads=1, grid=Grid(64, 8)).eval()
    with torch.no_grad():  # a table that no formula gives: it must be the file's
        model.pos_embed += torch.randn_like(model.pos_embed)
    return model


def fairseq_names(model: EAT, rows: int = 512) -> dict[str, Any]:
    """The encoder as fairseq names it, its position table ``rows`` long."""
    theirs = {own: PREFIX + name for name, own in NAMES.items()}
    state = {theirs.get(n, n): t for n, t in model.state_dict().items()}
    table = PREFIX + "fixed_positional_encoder.positions"
    state[table] = torch.cat([state[table], torch.randn(1, rows - 512, 64)], dim=1)
    return state


def pretraining_file(path: Path, rows: int = 512, **others: Any) -> tuple[EAT, EAT]:
    """A pre-training file of EAT's or SSLAM's as fairseq writes it; its student and its teacher."""
    student, teacher = eat(0), eat(1)
    state: dict[str, Any] = collections.OrderedDict(fairseq_names(student, rows))
    for name in ("decoder.blocks.0.0", "decoder.proj"):
        state |= {f"{PREFIX}{name}.weight": torch.ones(3, 3), f"{PREFIX}{name}.bias": torch.ones(3)}
    state |= others
    state["_ema"] = fairseq_names(teacher, rows)
    held = {
        "cfg": {"model": argparse.Namespace(lr=np.float64(1)), "seen": {1, 2}},
        "args": argparse.Namespace(depth=12, out=Path("x")),
        "model": state,
        "criterion": collections.OrderedDict(),
        "optimizer_history": [{"num_updates": 7, "lr": np.float32(0.1)}],
        "task_state": collections.defaultdict(list, {"a": [1]}),
        "extra_state": {"metrics": [(0, np.ones(3))]},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": []},
    }
    torch.save(held, path)
    return student, teacher


def same_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("rows", [512, 6144])
def test_a_pretraining_file_of_fairseq_gives_student_and_teacher(tmp_path: Path, rows: int) -> None:
    others = {name: torch.ones(2) for name in ("center", "recon_proj.weight", "cls_proj.bias")}
    others["shared_decoder.blocks.0.0.weight"] = torch.ones(2)
    student, teacher = pretraining_file(tmp_path / "EAT.pt", rows, **others)
    found = bat.load_encoder(tmp_path / "EAT.pt")
    assert isinstance(found, EAT)
    assert same_weights(found, student)
    assert same_weights(bat.load_encoder(tmp_path / "EAT.pt", weights="teacher"), teacher)


def test_an_eat_file_with_parts_that_this_encoder_lacks_is_refused(tmp_path: Path) -> None:
    for name in ("alibi_scale", "context_encoder.blocks.0.norm1.weight"):
        pretraining_file(tmp_path / "EAT.pt", **{PREFIX + name: torch.ones(2)})
        with pytest.raises(UserError, match=f"unexpected: .*{name}"):
            bat.load_encoder(tmp_path / "EAT.pt")


@pytest.mark.parametrize("below", ["", "model."])  # where the classifier lies
def test_a_fine_tuned_file_of_fairseq(
    tmp_path: Path, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"model.{n}": t for n, t in fairseq_names(eat()).items()}
    for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"):
        state[below + name] = torch.ones(3)
    torch.save({"args": argparse.Namespace(), "model": state}, tmp_path / "w.pt")
    assert same_weights(bat.load_encoder(tmp_path / "w.pt"), eat())
    assert "took 'model.' off all" in caplog.text
    assert f"set aside, no part of the encoder: {below}fc_norm.weight" in caplog.text
    with pytest.raises(UserError, match="no teacher"):
        bat.load_encoder(tmp_path / "w.pt", weights="teacher")


def eat_hub(folder: Path, **config: Any) -> None:
    names = {own: name.replace("context_encoder.norm", "pre_norm") for name, own in NAMES.items()}
    state = {f"model.{names.get(n, n)}": t for n, t in eat().state_dict().items()}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config = {"model_type": "eat", "model_variant": "pretrain", "num_heads": 2, **config}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_hub_folder_of_eat(tmp_path: Path) -> None:
    eat_hub(tmp_path)
    found = bat.load_encoder(tmp_path)
    assert isinstance(found, EAT)
    assert same_weights(found, eat())
    assert found.heads == 2  # its config's, not width / 64
    eat_hub(tmp_path, layer_norm_first=True)
    with pytest.raises(UserError, match=r"another encoder .* layer_norm_first=True \(here False\)"):
        bat.load_encoder(tmp_path)
    eat_hub(tmp_path, num_heads="many")
    with pytest.raises(UserError, match="heads='many': a whole number"):
        bat.load_encoder(tmp_path)


HUB = {
    **{"model_type": "bat", "input_shape": [64, 128], "patch_size": [16, 16], "hidden_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4, "qkv_bias": True},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0},
    **{"layer_norm_eps": 1e-6, "pre_norm": True, "layer_norm_first": False},
    **{"init_scale_values": None, "use_gate": True, "pos_trainable": False},
    **{"chunk_time_patches": 64, "sample_rate": 16000, "n_fft": 1024, "hop_length": 160},
    **{"n_mels": 128, "f_min": 0, "top_db": 80},
    "feature_normalization": "per_sample_minmax_after_db",
}


def bat_hub(folder: Path, **config: Any) -> Path:
    if not (folder / "model.safetensors").exists():
        safetensors.torch.save_file(tiny(0).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**HUB, **config}))
    return folder


def test_the_papers_hub_folder(tmp_path: Path) -> None:
    found = bat.load_encoder(bat_hub(tmp_path))
    assert same_weights(found, tiny(0))
    assert (found.heads, found.grid) == (2, Grid(4, 8))
    x = torch.rand(1, 1, 64, 128)
    assert torch.equal(found.features(x).patches, tiny(0).features(x).patches)
    longer = bat.load_encoder(bat_hub(tmp_path, input_shape=[1024, 128], chunk_time_patches=4))
    assert longer.grid == Grid(4, 8)
    rated = bat.load_encoder(bat_hub(tmp_path, drop_path_rate=0.1, hop_length=80))
    assert rated.config()["drop_path"] == 0.1
    assert rated.frontend.hop_length == 80


OTHER = {"model_type": "vit", "qkv_bias": False, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-5}
OTHER |= {"attention_probs_dropout_prob": 0.1, "pos_trainable": True, "f_min": 20, "top_db": 120}
OTHER |= {"feature_normalization": "none", "input_shape": [64, 100], "patch_size": [16, 8]}
OTHER |= {"num_hidden_layers": 3, "use_gate": False, "pre_norm": False, "num_attention_heads": 0}


@pytest.mark.parametrize("name", HUB)
def test_a_hub_folder_of_another_encoder_is_refused(tmp_path: Path, name: str) -> None:
    for value in [OTHER.get(name, "x"), "x", -1, [], {}, float("nan"), 10**300, [1 << 60, 128]]:
        with pytest.raises(UserError) as caught:
            bat.load_encoder(bat_hub(tmp_path, **{name: value}))
        assert len(str(caught.value)) < 4000
    if name in ("input_shape", "patch_size", "hidden_size"):
        config = {k: v for k, v in HUB.items() if k != name}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"does not say {name}"):
            bat.load_encoder(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "encoder.", "backbone.", "module._orig_mod.model.encoder."],
)
def test_a_prefix_of_all_names_is_taken_off_and_said(
    tmp_path: Path, prefix: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {prefix + n: t for n, t in tiny(0).state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":  # as Lightning saves it
        torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [{"state": {}}]}, path)
    else:
        safetensors.torch.save_file(state, path)
    assert same_weights(bat.load_encoder(path), tiny(0))
    assert f"took '{prefix}' off all {len(state)} names" in caplog.text


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapped_student_and_teacher(tmp_path: Path, wrapper: str) -> None:
    both = {f"{wrapper}student.encoder.{n}": t for n, t in tiny(0).state_dict().items()}
    both |= {f"{wrapper}teacher.encoder.{n}": t for n, t in tiny(1).state_dict().items()}
    torch.save(both, tmp_path / "w.pt")
    assert same_weights(bat.load_encoder(tmp_path / "w.pt"), tiny(0))
    assert same_weights(bat.load_encoder(tmp_path / "w.pt", weights="teacher"), tiny(1))
    inner = {
        f"student.encoder.{wrapper}{n}": t for n, t in tiny(0).state_dict().items()
    }  # compiled by itself
    torch.save(inner, tmp_path / "w.pt")
    assert same_weights(bat.load_encoder(tmp_path / "w.pt"), tiny(0))


def remedy(message: str) -> str:
    """The line of Python in ``message``."""
    found = re.search(r"torch\.save\(.*'encoder\.pt'\)", message)
    assert found, message
    return found[0]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_encoder_among_other_weights_is_refused_with_a_remedy_that_works(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"net.{n}": t for n, t in tiny(0).state_dict().items()}
    state["projector.weight"] = torch.ones(2)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"under 'net\.', beside projector\.weight") as caught:
        bat.load_encoder(path)
    monkeypatch.chdir(tmp_path)
    exec(remedy(str(caught.value)), {"torch": torch, "safetensors": safetensors})
    assert same_weights(bat.load_encoder("encoder.pt"), tiny(0))


def test_several_encoders_are_refused_with_a_remedy_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(
        {"model": tiny(0).state_dict(), "model_ema": tiny(1).state_dict()}, tmp_path / "w.pt"
    )
    with pytest.raises(UserError, match="several encoders, 'model', 'model_ema'") as caught:
        bat.load_encoder(tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    exec(remedy(str(caught.value)), {"torch": torch})
    assert same_weights(bat.load_encoder("encoder.pt"), tiny(0))
    two = {f"a.{n}": t for n, t in tiny(0).state_dict().items()}
    two |= {f"b.{n}": t for n, t in tiny(1).state_dict().items()}
    torch.save(two, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"under 'a\.' or 'b\.'\. Save the one you mean"):
        bat.load_encoder(tmp_path / "w.pt")


def test_golden_beats_file_is_named(golden: Path) -> None:
    with pytest.raises(UserError, match="a BEATs encoder, which this bat does not read"):
        bat.load_encoder(golden / "checkpoint_beats_tiny.pt")


def test_golden_training_file_says_its_heads(golden: Path) -> None:
    assert bat.load_encoder(golden / "checkpoint_official_tiny.pt").heads == 4


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda t: t.long(), r"type: blocks\.1\.norm1\.weight is torch\.int64, not floating"),
        (lambda t: t.bool(), r"type: blocks\.1\.norm1\.weight is torch\.bool, not floating"),
        (lambda t: t * 1j, r"type: blocks\.1\.norm1\.weight is torch\.complex64, not floating"),
        (lambda t: t * float("nan"), r"NaN or infinity in blocks\.1\.norm1\.weight"),
        (lambda t: t.double() * 1e300, r"NaN or infinity in blocks\.1\.norm1\.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, value: Any, said: str
) -> None:
    state = tiny(0).state_dict()
    state["blocks.1.norm1.weight"] = value(state["blocks.1.norm1.weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        bat.load_encoder(tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({n: t.to(dtype) for n, t in tiny(0).state_dict().items()}, tmp_path / "w.pt")
    found = bat.load_encoder(tmp_path / "w.pt").cls_token
    assert found.dtype == torch.float32
    assert torch.equal(found, tiny(0).cls_token.to(dtype).float())


def replaced(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**tiny(0).state_dict(), name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        *((f"blocks.{n}.norm1.weight", torch.ones(64)) for n in (99999999999, 10**6, 3, "x", "-1")),
        *(("cls_token", t) for t in (torch.ones(()), torch.ones(64), torch.ones(1, 1, 0))),
        ("cls_token", torch.ones(1, 1, 65)),
        ("pos_embed", torch.ones(512)),
        ("pos_embed", torch.ones(1, 31, 64)),
        ("patch_embed.proj.weight", torch.ones(64, 1, 0, 0)),
        ("patch_embed.proj.weight", torch.ones(64, 1, 129, 129)),
        ("patch_embed.proj.weight", torch.ones(64)),
        ("blocks.0.mlp.fc1.weight", torch.ones(())),
        ("blocks.0.mlp.fc1.weight", torch.ones(64 * 65, 64)),
    ],
)
def test_shapes_that_cannot_be_are_refused_before_anything_is_built(
    tmp_path: Path, name: str, tensor: Tensor
) -> None:
    torch.save(replaced(name, tensor), tmp_path / "w.pt")
    with pytest.raises(UserError):
        bat.load_encoder(tmp_path / "w.pt")


ENCODER: dict[str, Any] = {
    **BAT(width=64, depth=2, heads=2, grid=Grid(4, 8)).config(),
    "frontend": {
        **{"kind": "bat", "sample_rate": 16000, "n_fft": 1024, "hop_length": 160},
        **{"n_mels": 128, "pad": "spectrogram", "statistics": "audioset"},
    },
}
WRONG = [None, "x", "", -1, 0, 0.5, 2.0, 10**7, 1 << 30, 1 << 62, 10**300, -(10**300)]
WRONG += [float("nan"), float("inf"), [], {}, [1, 2], {"a": 1}, True, 5]
GOOD: dict[str, list[Any]] = {
    **{"drop_path": [0, 0.5], "layer_scale": [None], "frontend": [None, {}]},
    **{"gate": [True], "pre_norm": [True], "hop_length": [5], "frontend.n_fft": [2]},
    **{"frontend.hop_length": [5], "heads": [None]},
}
"""Of ``WRONG``, what these settings may be."""


@pytest.mark.parametrize("name", [*ENCODER, *(f"frontend.{n}" for n in ENCODER["frontend"])])
def test_every_setting_of_an_export_has_a_type_and_a_range(tmp_path: Path, name: str) -> None:
    write_export(tmp_path)
    text = (tmp_path / "config.json").read_text()
    place, _, last = name.rpartition(".")
    for value in WRONG:
        config = json.loads(text)
        config["encoder"] = json.loads(json.dumps(ENCODER))
        (config["encoder"]["frontend"] if place else config["encoder"])[last] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        if any(type(value) is type(good) and value == good for good in GOOD.get(name, [])):
            bat.load_encoder(tmp_path)
            continue
        with pytest.raises(UserError) as caught:
            bat.load_encoder(tmp_path)
        assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("name", ["format", "version", "backbone", "encoder"])
def test_every_field_of_an_export_is_held_to_its_type(tmp_path: Path, name: str) -> None:
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in WRONG:
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError) as caught:
            bat.load_encoder(tmp_path)
        assert len(str(caught.value)) < 4000


def test_unknown_and_absent_settings_are_named(tmp_path: Path) -> None:
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"dpeth": 2}, "dpeth: not known .*depth"),
        ({"frontend": {"hop": 2}}, "frontend: hop: not known .*hop_length"),
        ({"frontend": {"n_mels": 64}}, "n_mels=64 of the front end, 128 mel bins of the patch"),
        ({"grid": [4]}, "grid must be two numbers"),
        ({"heads": 3}, "width=64: a multiple of heads=3"),
        ({"frontend": {"kind": "eat", "n_fft": 512}}, "windows of 25 ms"),
        ({"frontend": {"statistics": "hsn"}}, "front end 'bat' uses none"),
    ):
        encoder = {**config["encoder"], **change}
        (tmp_path / "config.json").write_text(json.dumps({**config, "encoder": encoder}))
        with pytest.raises(UserError, match=said):
            bat.load_encoder(tmp_path)
    for name in ("width", "depth", "grid", "patch"):
        encoder = {k: v for k, v in config["encoder"].items() if k != name}
        (tmp_path / "config.json").write_text(json.dumps({**config, "encoder": encoder}))
        with pytest.raises(UserError, match=f"{name} not given"):
            bat.load_encoder(tmp_path)


def test_a_huge_config_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_JSON", 100)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        bat.load_encoder(tmp_path)
