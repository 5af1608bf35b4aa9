"""``bat-export hf``: what transformers loads equals bat's encoder, padding and chunks included."""

import ast
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import bat
from bat import weights
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.eval.heads import load_head, save_head
from bat.interfaces import export
from bat.interfaces.hf import FILES
from bat.probes.base import build_probe
from bat.types import Grid

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", minversion="4.57")

SMALL = {"width": 48, "depth": 2, "heads": 2, "grid": Grid(16, 8)}  # chunks of 2.56 s
LABELS = ["ant", "bee", "cat"]
KINDS = {
    "bat": lambda: BAT(**SMALL),
    "pre": lambda: BAT(**SMALL, norm_order="pre", pre_norm=False, layer_scale=0.5),
    "grid": lambda: BAT(**SMALL, gate=False, pos_layout="grid", frontend={"pad": "waveform"}),
    "clip": lambda: BAT(**SMALL, frontend={"pad": "clip", "clip_seconds": 1.5}),
    "eat": lambda: EAT(**SMALL),
    "beats": lambda: EAT(
        **SMALL, frontend={"kind": "beats", "statistics": "esc50", "pad": "waveform"}
    ),
}
LENGTHS = [4800, 16_000, 80_000]
FIELDS = {
    *("input_shape", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("mlp_ratio", "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob", "pre_norm"),
    *("drop_path_rate", "layer_norm_eps", "layer_norm_first", "init_scale_values", "use_gate"),
    *("pos_trainable", "chunk_time_patches", "sample_rate", "n_fft", "hop_length", "n_mels"),
    *("f_min", "top_db", "feature_normalization"),
}
"""Settings of the paper's hub folder."""


def fold(folder, encoder, *, head=None, target="class", frames=None, level="clip"):
    """A fold as a fine-tuning leaves it; without ``head`` as a pre-training does."""
    meta = {"steps": 7, "training": {"recipe": "toy-recipe", "frames": frames}}
    meta |= {"labels": LABELS, "target": target} if head else {}
    name = "eat" if isinstance(encoder, EAT) else "bat"
    state = {"student": encoder.state_dict()}
    weights.export(
        folder / "export", backbone=name, encoder=encoder.config(), weights=state, meta=meta
    )
    if head:
        shape = {"classes": 3, "width": 48, "depth": 2, "has_cls": True, "level": level}
        probe = build_probe(head, **shape, prototypes=5)
        save_head(folder / "head", probe, name=head, head={"prototypes": 5}, meta=meta)
    return folder


def made(tmp_path, kind="bat", **settings):
    """Returns a fold and its export."""
    torch.manual_seed(0)
    source = fold(tmp_path / "fold", KINDS[kind](), **settings)
    return source, export("hf", str(source), tmp_path / f"out-{kind}")


def load(auto, folder):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)


def clips(lengths=LENGTHS):
    waves = [0.1 * torch.randn(n) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    return [w.numpy() for w in waves], padded, torch.tensor(lengths)


def encode(folder, waves):
    extractor, model = load("AutoFeatureExtractor", folder), load("AutoModel", folder).eval()
    inputs = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return inputs, model(**inputs, output_hidden_states=True)


@pytest.mark.parametrize("kind", KINDS)
def test_hf__features_and_weights_equal_bats(tmp_path, kind):
    source, out = made(tmp_path, kind)
    waves, padded, lengths = clips()
    encoder = bat.load_encoder(source)
    with torch.no_grad():
        want, spectrogram = encoder(padded, lengths), encoder.inputs(padded, lengths)
    inputs, got = encode(out, waves)
    torch.testing.assert_close(inputs["input_values"], spectrogram, rtol=0, atol=1e-5)
    assert inputs["attention_mask"].sum(1).tolist() == want.valid.tolist()
    assert isinstance(got.hidden_states, tuple)
    for state, cls, patches in zip(got.hidden_states, want.cls, want.patches, strict=True):
        torch.testing.assert_close(state[:, 0], cls, rtol=0, atol=1e-5)
        torch.testing.assert_close(state[:, 1:], patches.flatten(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, want.cls[-1], rtol=0, atol=1e-5)
    tokens = want.patches[-1].permute(0, 3, 1, 2)
    torch.testing.assert_close(got.patch_tokens, tokens, rtol=0, atol=1e-5)
    state = load("AutoModel", out).state_dict()
    assert set(state) == set(encoder.state_dict())
    assert all(torch.equal(state[n], t) for n, t in encoder.state_dict().items())


def test_hf__a_clip_does_not_depend_on_its_batch(tmp_path):
    _, out = made(tmp_path)
    waves, _, _ = clips()
    inputs, together = encode(out, waves)
    for row, wave in enumerate(waves):
        alone = encode(out, wave)[1].last_hidden_state[0]
        torch.testing.assert_close(
            together.last_hidden_state[row, : len(alone)], alone, rtol=0, atol=1e-5
        )
    more = torch.nn.functional.pad(inputs["input_values"], (0, 0, 0, 320), value=9.0)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 20))
    with torch.no_grad():
        again = load("AutoModel", out).eval()(more, mask).last_hidden_state
    count = together.last_hidden_state.shape[1]
    torch.testing.assert_close(again[:, :count], together.last_hidden_state, rtol=0, atol=1e-5)
    assert not again[:, count:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_hf__is_read_back_by_load_encoder(tmp_path, kind):
    source, out = made(tmp_path, kind)
    encoder, again = bat.load_encoder(source), bat.load_encoder(out)
    config = encoder.config()
    assert again.config() == config | {"frontend": config["frontend"] or {}}
    waves = clips()[1:]
    with torch.no_grad():
        assert torch.equal(encoder(*waves).patches, again(*waves).patches)


@pytest.mark.parametrize("kind", ["bat", "eat"])
def test_hf__saved_twice_gives_the_same_bytes(tmp_path, kind):
    _, out = made(tmp_path, kind)
    load("AutoModel", out).save_pretrained(tmp_path / "first")
    load("AutoFeatureExtractor", out).save_pretrained(tmp_path / "first")
    load("AutoModel", tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (tmp_path / n / "model.safetensors" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    wave = clips()[0][2]
    ours, theirs = (encode(f, wave)[1].last_hidden_state for f in (out, tmp_path / "first"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("target", "frames"), [("class", None), ("tags", 208)])
def test_hf__fine_tuned_model_classifies(tmp_path, target, frames):
    source, out = made(tmp_path, head="linear", target=target, frames=frames)
    waves, padded, lengths = clips()
    head = load_head(source / "head")[0]
    with torch.no_grad():
        features = bat.load_encoder(source)(padded, lengths, frames=frames)
        logits = head(features)
    inputs = load("AutoFeatureExtractor", out)(waves, sampling_rate=16_000, return_tensors="pt")
    model = load("AutoModelForAudioClassification", out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-5)
    assert model.config.id2label == dict(enumerate(LABELS))
    wanted = logits.softmax(-1) if target == "class" else logits.sigmoid()
    many = {"function_to_apply": "sigmoid"} if target == "tags" else {}  # 4.57's is softmax always
    classify = transformers.pipeline(
        "audio-classification", str(out), trust_remote_code=True, **many
    )
    for row, wave in zip(wanted, waves, strict=True):
        found = {one["label"]: one["score"] for one in classify(wave, top_k=None)}
        assert [found[n] for n in LABELS] == pytest.approx(row.tolist(), abs=1e-5)
    inputs, encoded = encode(out, waves)  # the encoder alone, from the same folder
    torch.testing.assert_close(encoded.pooler_output, features.cls[-1], rtol=0, atol=1e-5)
    again = bat.load_encoder(out).state_dict()
    assert all(torch.equal(t, again[n]) for n, t in bat.load_encoder(source).state_dict().items())


def test_hf__an_encoder_alone_starts_a_classifier(tmp_path):
    _, out = made(tmp_path, "pre")
    config = load("AutoConfig", out)
    config.num_labels = 4
    model = transformers.AutoModelForAudioClassification.from_pretrained(
        out, config=config, trust_remote_code=True
    )
    kept = load("AutoModel", out).state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in model.encoder.state_dict().items())
    assert all(p.isfinite().all() for p in model.parameters())
    inputs = load("AutoFeatureExtractor", out)(clips()[0], sampling_rate=16_000)
    given = {name: torch.as_tensor(value) for name, value in inputs.items()}
    found = model(**given, labels=torch.tensor([0, 3, 1]))
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    fresh = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert torch.equal(fresh.pos_embed, kept["pos_embed"])
    assert not torch.equal(fresh.cls_token, kept["cls_token"])


def test_hf__folder_says_what_it_is(tmp_path):
    _, out = made(tmp_path, head="linear")
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("configuration_bat.py", "feature_extraction_bat.py", "modeling_bat.py"),
    }
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "bat"
    assert set(config) >= FIELDS
    assert (config["input_shape"], config["chunk_time_patches"]) == ([256, 128], 16)
    card = (out / "README.md").read_text()
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    for said in ("toy-recipe", "steps: 7", digest, "Licence", "To fill in"):
        assert said in card


def test_hf_files__import_nothing_of_bat():
    for file in FILES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "bat" for a in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] != "bat"


@pytest.mark.parametrize(
    ("head", "level", "target"),
    [("cgp", "clip", "class"), ("linear", "frame", "events"), ("lcgp", "clip", "tags")],
)
def test_hf__other_heads_are_refused_by_name(tmp_path, head, level, target):
    with pytest.raises(UserError, match=rf"{head}.*level={level}.*target={target}"):
        made(tmp_path, head=head, level=level, target=target)
    assert not (tmp_path / "out-bat").exists()


def test_hf__other_encoders_are_refused_by_name(tmp_path, monkeypatch):
    class Other(BAT):
        """An encoder that computes something else."""

    torch.manual_seed(0)
    source = fold(tmp_path / "fold", KINDS["bat"]())
    monkeypatch.setattr(bat, "load_encoder", lambda path: Other(**SMALL))
    with pytest.raises(UserError, match=r"Other.*bat and eat"):
        export("hf", str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (np.zeros((2, 3, 9), np.float32), r"\(2, 3, 9\)"),
        ([np.zeros(9, np.float32), np.zeros((9, 2), np.float32)], r"clip 1.*\(9, 2\)"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([0, 1000], np.int16), "int16"),
        (np.zeros(0, np.float32), r"\(0,\)"),
    ],
)
def test_extractor__bad_audio_is_named(tmp_path, given, named):
    _, out = made(tmp_path)
    extractor = load("AutoFeatureExtractor", out)
    with pytest.raises(ValueError, match=named):
        extractor(given, sampling_rate=16_000)
    with pytest.raises(ValueError, match="16000"):
        extractor(np.zeros(9, np.float32), sampling_rate=44_100)


def test_model__bad_shapes_are_named(tmp_path):
    _, out = made(tmp_path)
    model = load("AutoModel", out)
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 64\).*128"):
        model(torch.zeros(2, 1, 32, 64))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        model(torch.zeros(2, 1, 32, 128), attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="input_values"):
        model()


def test_model__frames_are_filled_up_to_whole_patches(tmp_path):
    _, out = made(tmp_path)
    model, x = load("AutoModel", out).eval(), torch.rand(1, 1, 40, 128)
    whole = torch.nn.functional.pad(x, (0, 0, 0, 8))
    with torch.no_grad():
        assert torch.equal(model(x).pooler_output, model(input_features=whole).pooler_output)
        first, pooled, *_ = model(x, return_dict=False)
    assert (first.shape, pooled.shape) == ((1, 25, 48), (1, 48))


def test_export__repository_files_are_the_folders(tmp_path):
    _, out = made(tmp_path)
    for file in Path(FILES).glob("*_bat.py"):
        assert (out / file.name).read_bytes() == file.read_bytes()
