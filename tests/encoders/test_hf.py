"""Encoders of transformers: against the models themselves, from folders with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bat
from bat import weights as files
from bat.encoders.hf import HF
from bat.errors import UserError
from tests.encoders.test_batch_independence import check
from tests.encoders.tiny import HF_KINDS, tiny_hf

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

SAMPLES = 19_920  # 62 x 320 + 80 samples: of waves, all are used
WAVE = 0.1 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_hf(kind, tmp_path_factory.mktemp(kind)) for kind in HF_KINDS}


def hidden(folder: Path, wave: Tensor) -> Tensor:
    """(L + 1, N, D) of transformers' own classes for one clip."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "speech_encoder", model)
    model = model.get_encoder() if hasattr(model, "decoder") else model
    if hasattr(model, "adapter"):
        model.adapter = None  # its output would be the last hidden state
    front = transformers.AutoFeatureExtractor.from_pretrained(folder)
    given = front(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return torch.cat(model(**given, output_hidden_states=True).hidden_states)


def same(found: Any, wanted: Any) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_whisper__a_clip_that_ends_with_its_last_token(folders: dict[str, Path]) -> None:
    """Two frames behind its last token still hear it."""
    encoder, wave = bat.load_encoder(f"hf:{folders['whisper']}"), WAVE[: 60 * 320]
    with torch.no_grad():
        found = encoder(wave).patches[:, 0, :, 0]
    torch.testing.assert_close(found, hidden(folders["whisper"], wave)[1:, :60], atol=1e-5, rtol=0)


HOPS = {"ast": 0.1, "sew": 0.04, "s2t": 0.04, "moonshine": 0.024, "parakeet": 0.08}


@pytest.mark.parametrize("kind", HF_KINDS)
def test_features__are_the_models_own_hidden_states(folders: dict[str, Path], kind: str) -> None:
    encoder: Any = bat.load_encoder(f"hf:{folders[kind]}")
    assert (encoder.sample_rate, encoder.width, encoder.depth) == (16000, 32, 2)
    assert encoder.hop_seconds == HOPS.get(kind, 0.02)
    wave = WAVE if encoder.fixed else WAVE[: encoder.field + 13 * encoder.hop]  # all are used
    with torch.no_grad():
        found = encoder(wave)
    wanted = hidden(folders[kind], wave)[1:]  # (L, N, D)
    T = found.patches.shape[2]
    if kind == "ast":  # 123 complete frames; 20 x 12 patches, the frequencies one after another
        assert (T, encoder.has_cls) == (12, True)
        torch.testing.assert_close(found.cls[:, 0], wanted[:, :2].mean(1))
        wanted = wanted[:, 2:].unflatten(1, (12, 20)).transpose(1, 2)[:, :T]  # (L, T, F, D)
    else:
        assert (T, encoder.has_cls) == ({"whisper": 63}.get(kind, 14), False)
        wanted = wanted[:, :T, None]
    torch.testing.assert_close(found.patches[:, 0], wanted, atol=1e-5, rtol=1e-5)


HALF = ("ast", "whisper", "wav2vec2", "s2t")
"""In bfloat16: one of each way to give a clip to its model."""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((k, "float32") for k in HF_KINDS), *((k, "bfloat16") for k in HALF)],
)
def test_clips__alone_and_in_a_padded_batch_are_equal(
    folders: dict[str, Path], kind: str, dtype: str
) -> None:
    check(bat.load_encoder(f"hf:{folders[kind]}"), dtype)


def test_features__of_other_kinds_are_refused_with_the_reason(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "patch_embeds_hidden_size": 8, "depths": [1, 1], "spec_size": 64}
    sizes |= {"num_attention_heads": [2, 2], "num_mel_bins": 32, "num_hidden_layers": 2}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    config = transformers.ClapConfig(text_config=text, audio_config=sizes)
    transformers.ClapModel(config).save_pretrained(tmp_path)
    transformers.ClapFeatureExtractor(feature_size=32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'clap' with ClapFeatureExtractor.*as of two"):
        bat.load_encoder(f"hf:{tmp_path}")
    codec = transformers.EncodecModel(transformers.EncodecConfig(num_filters=4, hidden_size=16))
    codec.save_pretrained(tmp_path)
    transformers.EncodecFeatureExtractor(sampling_rate=16000).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'encodec' with Encodec.* cannot be read"):
        bat.load_encoder(f"hf:{tmp_path}")


def test_ast__axes_are_time_and_frequency(folders: dict[str, Path]) -> None:
    encoder: Any = bat.load_encoder(f"hf:{folders['ast']}")
    x = torch.randn(1, 208, 128)
    with torch.no_grad():
        plain = encoder.net.embeddings(x)[:, 2:]
        x[:, 30:36, 60:66] += 1  # frames 30 to 35, bins 60 to 65
        changed = encoder.net.embeddings(x)[:, 2:] - plain
    moved = changed[0].abs().amax(-1).unflatten(0, (12, 20)).T > 1e-6  # (T, F)
    assert moved.any(1).nonzero().flatten().tolist() == [2, 3]  # patch t has frames 10 t to +15
    assert moved.any(0).nonzero().flatten().tolist() == [5, 6]


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_long_clips__are_cut_into_chunks(folders: dict[str, Path], kind: str) -> None:
    encoder: Any = bat.load_encoder(f"hf:{folders[kind]}")
    wave = 0.1 * torch.randn(80_000)
    step = encoder.max_patches * encoder.hop
    parts = wave.split(step)
    assert len(parts) == 3
    with torch.no_grad():
        whole, alone = encoder(wave), [encoder(part) for part in parts]
    patches = torch.cat([one.patches for one in alone], dim=2)
    torch.testing.assert_close(whole.patches, patches, atol=1e-5, rtol=1e-5)
    if encoder.has_cls:
        mean = torch.stack([one.cls for one in alone]).mean(0)
        torch.testing.assert_close(whole.cls, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ast", "wav2vec2", "data2vec", "parakeet"])
def test_export__and_an_untrained_one_of_the_same_shape(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    encoder: Any = bat.load_encoder(f"hf:{folders[kind]}")
    layers = {encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert {0, 1, 2} <= layers <= {0, 1, 2, 3}
    state = {"student": encoder.state_dict()}
    files.export(tmp_path, backbone="hf", encoder=encoder.config(), weights=state, meta={})
    for name in (tmp_path, f"hf:{tmp_path}"):
        found: Any = bat.load_encoder(name)
        assert same(found, encoder)
        assert torch.equal(found(WAVE).patches, encoder(WAVE).patches)
    again = HF(**encoder.config())
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert not same(again, encoder)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("wav2vec2", "ForCTC", "lm_head.weight"),
        ("ast", "ForAudioClassification", "classifier.dense.weight"),
        ("whisper", "ForConditionalGeneration", ""),
    ],
)
def test_heads__beside_the_encoder_are_set_aside(
    tmp_path: Path, kind: str, task: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_hf(kind, tmp_path, task=task)
    encoder = bat.load_encoder(f"hf:{folder}")
    assert head in caplog.text
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, name).from_pretrained(folder).base_model
    theirs = theirs.get_encoder() if kind == "whisper" else theirs
    wanted = {n: t for n, t in theirs.state_dict().items() if n != "masked_spec_embed"}
    assert len(wanted) == len(encoder.state_dict())
    assert all(torch.equal(encoder.state_dict()[f"net.{n}"], t) for n, t in wanted.items())


def test_weights__that_are_absent_or_of_another_shape_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "w"
    shutil.copytree(folders["wav2vec2"], folder)
    state = load_file(folder / "model.safetensors")
    name = "encoder.layers.1.feed_forward.output_dense.bias"
    rest = {n: t for n, t in state.items() if n not in (name, "masked_spec_embed")}
    for change, said in (({}, name), ({name: torch.ones(5)}, "output_dense")):
        save_file({**rest, **change}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            bat.load_encoder(f"hf:{folder}")
    half = {n: t.half() for n, t in state.items() if n != "masked_spec_embed"}  # as published
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    found = bat.load_encoder(f"hf:{folder}")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{folder} cannot be read"):
        bat.load_encoder(f"hf:{folder}")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=f"{folder} cannot be read"):
        bat.load_encoder(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        bat.load_encoder(f"hf:{folder}")


def test_kind__that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, intermediate_size=16, image_size=16)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'vit'.*add_an_encoder"):
        bat.load_encoder(f"hf:{tmp_path}")


def test_waveform__bad_ones_are_refused(folders: dict[str, Path]) -> None:
    encoder = bat.load_encoder(f"hf:{folders['wav2vec2']}")
    for bad in (torch.zeros(1, 2, 100), torch.zeros(1, 100, dtype=torch.int64)):
        with pytest.raises(UserError, match="waveform of shape"):
            encoder(bad)
    with pytest.raises(UserError, match="frames"):
        encoder(torch.zeros(1, 100), frames=16)


def test_name__nothing_is_fetched_for_a_path_and_offline_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^nobody/nothing is no folder here, and the hub cannot"):
        bat.load_encoder("hf:nobody/nothing")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)  # not even asked
    for name in (f"{tmp_path}/absent", "./absent"):
        with pytest.raises(UserError, match=f"hf:{name} does not exist"):
            bat.load_encoder(f"hf:{name}")


def test_package__absent_is_one_line(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'bat-audio\[hf\]'"):
        bat.load_encoder(f"hf:{folders['ast']}")


CODE = """
from transformers import Wav2Vec2Config, Wav2Vec2Model
open({trace!r}, "a").write("ran")

class MyConfig(Wav2Vec2Config):
    model_type = "mine"

class MyModel(Wav2Vec2Model):
    config_class = MyConfig
"""


def test_remote_code__runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, trace, out = tmp_path / "mine", tmp_path / "trace", tmp_path / "export"
    tiny_hf("wav2vec2", folder)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "my_model.MyConfig", "AutoModel": "my_model.MyModel"}
    config |= {"model_type": "mine", "auto_map": places, "architectures": ["MyModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "my_model.py").write_text(CODE.format(trace=str(trace)))
    with pytest.raises(UserError, match="trust_remote_code=true"):
        bat.load_encoder(f"hf:{folder}")
    assert not trace.exists()
    encoder: Any = bat.load_encoder(f"hf:{folder}", trust_remote_code=True)
    assert type(encoder.net).__name__ == "MyModel"
    assert encoder(WAVE).patches.shape == (2, 1, 62, 1, 32)
    state = {"student": encoder.state_dict()}
    files.export(out, backbone="hf", encoder=encoder.config(), weights=state, meta={})
    trace.unlink()
    with pytest.raises(UserError, match="trust_remote_code=true"):  # though the export says true
        bat.load_encoder(out)
    assert not trace.exists()
    assert same(bat.load_encoder(out, trust_remote_code=True), encoder)
