"""Every kind of weight file: read strictly, same features; exports; refusals."""

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bat
from bat import weights as checkpoint
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT, NAMES, PREFIX
from bat.encoders.strict import load_strictly
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
def test_golden_files__give_the_expected_features(
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


def test_golden_files__say_or_ask_for_what_is_not_in_them(golden: Path) -> None:
    assert bat.load_encoder(golden / "checkpoint_official_tiny.pt").heads == 4
    with pytest.raises(UserError, match=r"width 32 is not a multiple of 64.*heads=4"):
        bat.load_encoder(golden / "checkpoint_bat_flat_tiny.pt")
    for file in ("checkpoint_eat_tiny.pt", "checkpoint_bat_flat_tiny.pt"):
        with pytest.raises(UserError, match="no teacher"):
            bat.load_encoder(golden / file, weights="teacher", heads=4)


def tiny(seed: int = 0) -> BAT:
    torch.manual_seed(seed)
    return BAT(width=64, depth=2, heads=2, grid=Grid(4, 8)).eval()


def same_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def write_export(folder: Path) -> dict[str, BAT]:
    models = {"student": tiny(0), "teacher": tiny(1)}
    checkpoint.export(
        folder,
        backbone="bat",
        encoder=models["student"].config(),
        weights={who: model.state_dict() for who, model in models.items()},
        meta={"steps": 7},
    )
    return models


def load_changed(folder: Path, config: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return bat.load_encoder(folder)


def test_export__two_files_with_the_papers_names_load_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    models = write_export(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    names = set(checkpoint.read_tensors(folder / "model.safetensors"))
    assert names == {f"{who}.encoder.{n}" for who in models for n in tiny().state_dict()}
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"], config["steps"]) == ("bat-export", 1, 7)
    for who, model in models.items():
        for path in (tmp_path, folder):  # a run folder, and the export itself
            found = bat.load_encoder(path, weights=who)
            assert found.config() == model.config()
            assert same_weights(found, model)


def test_bare_encoder__is_read_and_has_width_over_64_heads(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    found = bat.load_encoder(tmp_path / "model.safetensors", heads=2)
    x = torch.rand(1, 1, 64, 128)
    assert torch.equal(found.features(x).patches, tiny().features(x).patches)
    torch.save(tiny().state_dict(), tmp_path / "w.pt")
    assert bat.load_encoder(tmp_path / "w.pt").heads == 1


def test_names__missing_and_unexpected_ones_are_listed(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["blocks.1.attn.gate.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        bat.load_encoder(tmp_path / "w.pt")
    assert "missing: blocks.1.attn.gate.bias (64,)" in str(caught.value)
    assert "unexpected: blocks.1.attn.extra (1,)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "does not exist"),
        ("notes.txt", b"hello", "unknown kind of weight file"),
        ("broken.pt", b"hello", "cannot be read"),
        ("broken.safetensors", b"hello", "not a readable safetensors"),
    ],
)
def test_files__unreadable_ones_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        bat.load_encoder(tmp_path / name)


def test_files__without_weights_or_encoder_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        bat.load_encoder(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has not finished"):
        bat.load_encoder(tmp_path)
    (tmp_path / "heads").mkdir()
    with pytest.raises(UserError, match=r"is a probe run.*config\.yaml"):
        bat.load_encoder(tmp_path)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"no encoder that is known.*fc\.weight"):
        bat.load_encoder(tmp_path / "w.pt")


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
        "optimizer_history": [{"num_updates": 7, "lr": np.float32(0.1)}],
        "task_state": collections.defaultdict(list, {"a": [1]}),
        "extra_state": {"metrics": [(0, np.ones(3))]},
    }
    torch.save(held, path)
    return student, teacher


@pytest.mark.parametrize("rows", [512, 6144])
def test_fairseq__a_pretraining_file_gives_student_and_teacher(tmp_path: Path, rows: int) -> None:
    others = {name: torch.ones(2) for name in ("center", "recon_proj.weight", "cls_proj.bias")}
    others["shared_decoder.blocks.0.0.weight"] = torch.ones(2)
    student, teacher = pretraining_file(tmp_path / "EAT.pt", rows, **others)
    found = bat.load_encoder(tmp_path / "EAT.pt")
    assert isinstance(found, EAT)
    assert same_weights(found, student)
    assert same_weights(bat.load_encoder(tmp_path / "EAT.pt", weights="teacher"), teacher)


def test_fairseq__parts_that_this_encoder_lacks_are_refused(tmp_path: Path) -> None:
    for name in ("alibi_scale", "context_encoder.blocks.0.norm1.weight"):
        pretraining_file(tmp_path / "EAT.pt", **{PREFIX + name: torch.ones(2)})
        with pytest.raises(UserError, match=f"unexpected: .*{name}"):
            bat.load_encoder(tmp_path / "EAT.pt")


@pytest.mark.parametrize("below", ["", "model."])  # where the classifier lies
def test_fairseq__of_a_fine_tuned_file_the_classifier_is_set_aside(
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


def test_hub_folder__of_eat(tmp_path: Path) -> None:
    names = {own: name.replace("context_encoder.norm", "pre_norm") for name, own in NAMES.items()}
    state = {f"model.{names.get(n, n)}": t for n, t in eat().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "eat", "model_variant": "pretrain", "num_heads": 2}
    found = load_changed(tmp_path, config)
    assert isinstance(found, EAT)
    assert same_weights(found, eat())
    assert found.heads == 2  # its config's, not width / 64
    with pytest.raises(UserError, match=r"another encoder .* layer_norm_first=True \(here False\)"):
        load_changed(tmp_path, {**config, "layer_norm_first": True})
    with pytest.raises(UserError, match="heads='many': a whole number"):
        load_changed(tmp_path, {**config, "num_heads": "many"})


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


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_hub_folder__of_the_paper(hub: Path) -> None:
    found = load_changed(hub, HUB)
    assert same_weights(found, tiny())
    assert (found.heads, found.grid) == (2, Grid(4, 8))
    x = torch.rand(1, 1, 64, 128)
    assert torch.equal(found.features(x).patches, tiny().features(x).patches)
    longer = load_changed(hub, {**HUB, "input_shape": [1024, 128], "chunk_time_patches": 4})
    assert longer.grid == Grid(4, 8)
    other = load_changed(hub, {**HUB, "drop_path_rate": 0.1, "hop_length": 80})
    assert other.config()["drop_path"] == 0.1
    assert other.frontend.hop_length == 80


OTHER = {"model_type": "vit", "qkv_bias": False, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-5}
OTHER |= {"attention_probs_dropout_prob": 0.1, "pos_trainable": True, "f_min": 20, "top_db": 120}
OTHER |= {"feature_normalization": "none", "input_shape": [64, 100], "patch_size": [16, 8]}
OTHER |= {"num_hidden_layers": 3, "use_gate": False, "pre_norm": False, "num_attention_heads": 0}


@pytest.mark.parametrize("name", HUB)
def test_hub_folder__of_another_encoder_is_refused(hub: Path, name: str) -> None:
    for value in [OTHER.get(name, "x"), "x", -1, [], {}, float("nan"), [1 << 60, 128]]:
        with pytest.raises(UserError) as caught:
            load_changed(hub, {**HUB, name: value})
        assert len(str(caught.value)) < 4000
    if name in ("input_shape", "patch_size", "hidden_size"):
        with pytest.raises(UserError, match=f"does not say {name}"):
            load_changed(hub, {k: v for k, v in HUB.items() if k != name})


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module._orig_mod.model.encoder."])
def test_prefix__of_all_names_is_taken_off_and_said(
    tmp_path: Path, prefix: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {prefix + n: t for n, t in tiny().state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":  # as Lightning saves it
        torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [{"state": {}}]}, path)
    else:
        save_file(state, path)
    assert same_weights(bat.load_encoder(path), tiny())
    assert f"took '{prefix}' off all {len(state)} names" in caplog.text


def sharded(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Writes two shards and their index as hubs have them; returns the index's map."""
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        save_file({n: t for n, t in state.items() if places[n] == file}, folder / file)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["hub", "export", "alone"])
def test_shards__are_one_file(tmp_path: Path, kind: str) -> None:
    state = tiny().state_dict()
    if kind == "hub":
        (tmp_path / "config.json").write_text(json.dumps(HUB))
    elif kind == "export":
        write_export(tmp_path)
        state = checkpoint.read_tensors(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
    sharded(tmp_path, {n: t.clone() for n, t in state.items()})
    assert same_weights(bat.load_encoder(tmp_path), tiny())
    assert checkpoint.is_export(tmp_path) == (kind == "export")


def test_shards__that_are_absent_elsewhere_or_others_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    state = tiny().state_dict()
    places = sharded(folder, state)
    save_file(state, tmp_path / "out.safetensors")
    for file in ("../out.safetensors", str(tmp_path / "out.safetensors"), "x.safetensors", 3, None):
        write_index(folder, {**places, "cls_token": file})
        with pytest.raises(UserError, match=r"index\.json: cls_token lies in .*no file beside it"):
            bat.load_encoder(folder)
    for change in ({"x": places["cls_token"]}, {"cls_token": "model-00002-of-00002.safetensors"}):
        write_index(folder, {**places, **change})
        with pytest.raises(UserError, match=f"disagree about .*{next(iter(change))}"):
            bat.load_encoder(folder)
    for odd in ({}, [], None, 3):
        write_index(folder, odd)
        with pytest.raises(UserError, match="no weight_map"):
            bat.load_encoder(folder)


def test_prefix__of_a_wrapped_student_and_teacher(tmp_path: Path) -> None:
    models = {"student": tiny(0), "teacher": tiny(1)}
    for outer, inner in (("module._orig_mod.", ""), ("", "_orig_mod.")):  # as a whole, or each
        state = {
            f"{outer}{who}.encoder.{inner}{name}": tensor
            for who, model in models.items()
            for name, tensor in model.state_dict().items()
        }
        torch.save(state, tmp_path / "w.pt")
        for who, model in models.items():
            assert same_weights(bat.load_encoder(tmp_path / "w.pt", weights=who), model)


def test_encoder__which_of_several_is_asked_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    torch.save({"args": {"num_heads": 2, "x": 1}, "state_dict": tiny().state_dict()}, path)
    asked = []

    def matches(names: Any, settings: Any) -> bool:
        asked.append((set(names), dict(settings)))
        return True

    monkeypatch.setattr(EAT, "matches", matches)
    with pytest.raises(UserError, match=rf"bat or eat.*bat:{path} or eat:{path}"):
        bat.load_encoder(path)
    assert asked[0] == (set(tiny().state_dict()), {"num_heads": 2, "x": 1})
    assert type(bat.load_encoder(f"bat:{path}")) is BAT
    assert type(bat.load_encoder(f"eat:{path}")) is EAT


def test_encoder__by_name_reads_a_file_that_no_encoder_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BAT, "matches", lambda names, settings: False)
    path = tmp_path / "w.pt"
    torch.save({"epoch": 3, "state_dict": tiny().state_dict(), "lr": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"no encoder that is known.*bat, .*ENCODER:PATH"):
        bat.load_encoder(path)
    torch.save({"module." + n: t for n, t in tiny().state_dict().items()}, path)
    assert same_weights(bat.load_encoder(f"bat:{path}"), tiny())


def test_encoder__among_other_weights_or_several_is_refused_and_its_place_named(
    tmp_path: Path,
) -> None:
    state = tiny().state_dict()
    net = {f"net.{n}": t for n, t in state.items()}
    for held, said in (
        ({"state_dict": {**net, "head.w": torch.ones(2)}}, r"under 'net\.', beside head\.w"),
        ({**net, **{f"b.{n}": t for n, t in state.items()}}, r"under 'net\.' or 'b\.'"),
        ({"model": state, "model_ema": state}, "several encoders, 'model', 'model_ema'"),
    ):
        torch.save(held, tmp_path / "w.pt")
        with pytest.raises(UserError, match=said):
            bat.load_encoder(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda t: t.long(), r"type: blocks\.1\.norm1\.weight is torch\.int64, not floating"),
        (lambda t: t * 1j, r"type: blocks\.1\.norm1\.weight is torch\.complex64, not floating"),
        (lambda t: t * float("nan"), r"NaN or infinity in blocks\.1\.norm1\.weight"),
        (lambda t: t.double() * 1e300, r"NaN or infinity in blocks\.1\.norm1\.weight"),
    ],
)
def test_values__that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, value: Any, said: str
) -> None:
    state = tiny().state_dict()
    state["blocks.1.norm1.weight"] = value(state["blocks.1.norm1.weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        bat.load_encoder(tmp_path / "w.pt")


def test_values__whole_numbers_that_a_model_counts_with_are_loaded() -> None:
    model = torch.nn.BatchNorm1d(2)
    load_strictly(model, {**model.state_dict(), "num_batches_tracked": torch.tensor(3)}, "it")
    assert model.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values__of_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    for make in (tiny, eat):  # from names of other projects too
        state = make().state_dict() if make is tiny else fairseq_names(eat())
        torch.save({"model": {n: t.to(dtype) for n, t in state.items()}}, tmp_path / "w.pt")
        for name, tensor in bat.load_encoder(tmp_path / "w.pt").state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, make().state_dict()[name].to(dtype).float()), name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((f"blocks.{n}.norm1.weight", (64,)) for n in (99999999999, 10**6, 3, "x", "-1")),
        *(("cls_token", shape) for shape in ((), (64,), (1, 1, 0), (1, 1, 65))),
        *(("pos_embed", shape) for shape in ((512,), (1, 31, 64))),
        *(("patch_embed.proj.weight", shape) for shape in ((64,), (64, 1, 0, 0), (64, 1, 99, 99))),
        *(("blocks.0.mlp.fc1.weight", shape) for shape in ((), (64 * 65, 64))),
    ],
)
def test_shapes__that_cannot_be_are_refused_before_anything_is_built(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    torch.save({**tiny().state_dict(), name: torch.ones(shape)}, tmp_path / "w.pt")
    with pytest.raises(UserError):
        bat.load_encoder(tmp_path / "w.pt")


CONFIG: dict[str, Any] = tiny().config()
FRONTEND = {
    **{"kind": "bat", "sample_rate": 16000, "n_fft": 1024, "hop_length": 160},
    **{"n_mels": 128, "pad": "spectrogram", "statistics": "audioset"},
}
WRONG = [None, "x", "", -1, 0, 0.5, 1 << 30, 10**300, -(10**300)]
WRONG += [float("nan"), float("inf"), [], {}, [1, 2], {"a": 1}, True]
GOOD: dict[str, list[Any]] = {
    **{"drop_path": [0, 0.5], "layer_scale": [None], "frontend": [None, {}]},
    **{"gate": [True], "pre_norm": [True], "heads": [None]},
}
"""Of ``WRONG``, what these settings may be."""


@pytest.mark.parametrize("name", [*CONFIG, *(f"frontend.{n}" for n in FRONTEND)])
def test_config__every_setting_has_a_type_and_a_range(name: str) -> None:
    state, inner = tiny().state_dict(), name.removeprefix("frontend.")
    for value in WRONG:
        config = {**CONFIG, "frontend": dict(FRONTEND)}
        owner = config if inner == name else config["frontend"]
        owner[inner] = value
        if any(type(value) is type(good) and value == good for good in GOOD.get(name, [])):
            continue
        with pytest.raises(UserError) as caught:
            BAT.from_weights(state, config=config, heads=None)
        assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("name", ["format", "version", "backbone", "encoder"])
def test_config__every_field_has_a_type(tmp_path: Path, name: str) -> None:
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in WRONG:
        with pytest.raises(UserError) as caught:
            load_changed(tmp_path, {**config, name: value})
        assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, r"missing: blocks\.2"),
        ({"dpeth": 2}, "dpeth: not known .*depth"),
        ({"frontend": {"hop": 2}}, "frontend: hop: not known .*hop_length"),
        ({"frontend": {"n_mels": 64}}, "n_mels=64 of the front end, 128 mel bins of the patch"),
        ({"grid": [4]}, "grid must be two numbers"),
        ({"heads": 3}, "width=64: a multiple of heads=3"),
        ({"frontend": {"kind": "eat", "n_fft": 512}}, "windows of 25 ms"),
        ({"frontend": {"statistics": "hsn"}}, "front end 'bat' uses none"),
        *(({name: None}, f"{name} not given") for name in ("width", "depth", "grid", "patch")),
    ],
)
def test_config__unknown_absent_and_unfit_settings_are_named(
    change: dict[str, Any], said: str
) -> None:
    config = {k: v for k, v in {**CONFIG, **change}.items() if change.get(k, v) is not None}
    with pytest.raises(UserError, match=said):
        BAT.from_weights(tiny().state_dict(), config=config, heads=None)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"version": 1' + "0" * 5_000 + "}"])
def test_config__no_json_or_a_huge_one_is_named(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is missing or not JSON"):
        bat.load_encoder(tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_JSON", 0)
    with pytest.raises(UserError, match="larger than 0 bytes"):
        bat.load_encoder(tmp_path)
