"""AST against transformers', in both versions of its names, and by its rules for other lengths."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bat
from bat.encoders.ast import AST
from bat.errors import UserError
from tests.encoders.vits import clip, made

transformers = pytest.importorskip("transformers")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def theirs(frames: int = 1024) -> Any:
    """transformers' AST with a classifier, every weight random."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.ASTConfig(**shape, intermediate_size=96, max_length=frames)
    model = transformers.ASTForAudioClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("frames", [1024, 128])
def test_ast__equals_transformers(frames: int, tmp_path: Path) -> None:
    """From the folder that ``save_pretrained`` writes: input, tokens of all blocks, embedding."""
    model, wave = theirs(frames), clip(0.8)
    statistics = {} if frames == 1024 else {"mean": -6.845978, "std": 5.5654526}
    extractor = transformers.ASTFeatureExtractor(max_length=frames, **statistics)
    model.save_pretrained(tmp_path)
    encoder = bat.load_encoder(tmp_path)
    assert type(encoder) is AST
    assert (encoder.heads, encoder.norm.eps) == (3, 1e-12)
    x = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    torch.testing.assert_close(encoder.inputs(wave, frames=frames)[:, 0], x, atol=1e-4, rtol=0)
    with torch.no_grad():
        found = encoder.features(x[:, None])
        base = model.audio_spectrogram_transformer
        wanted = base(x, output_hidden_states=True)
    assert len(wanted.hidden_states) == 3
    blocks = [wanted.hidden_states[1], wanted.last_hidden_state]
    for block, tokens in enumerate(blocks):
        torch.testing.assert_close(found.cls[block], tokens[:, :2].mean(1), **CLOSE)
        by_frequency = tokens[:, 2:].unflatten(1, (12, -1))  # (B, F, T, D)
        torch.testing.assert_close(found.patches[block], by_frequency.transpose(1, 2), **CLOSE)
    torch.testing.assert_close(found.cls[-1], wanted.pooler_output, **CLOSE)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5's names -> version 4's, in which the published files are."""
    rules = (
        (r"\.layers\.", ".encoder.layer."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )
    for pattern, old in rules:
        state = {re.sub(pattern, old, name): tensor for name, tensor in state.items()}
    return state


def test_ast__names_of_version_4_and_of_the_original(tmp_path: Path) -> None:
    state = theirs().state_dict()
    new = AST.from_file(state, settings={}, path=tmp_path, heads=3)
    old = AST.from_file(old_names(state), settings={}, path=tmp_path, heads=3)
    head = {"module.v.head_dist.weight": torch.ones(3), "module.mlp_head.0.bias": torch.ones(3)}
    original = {f"module.v.{name}": t for name, t in new.state_dict().items()}
    torch.save({**original, **head}, tmp_path / "audioset.pth")
    loaded = bat.load_encoder(tmp_path / "audioset.pth", heads=3)
    assert loaded.norm.eps == 1e-6
    for name, tensor in new.state_dict().items():
        assert torch.equal(old.state_dict()[name], tensor), name
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_ast__files_are_read_strictly(tmp_path: Path) -> None:
    state, key = (
        theirs().state_dict(),
        "audio_spectrogram_transformer.layers.1.attention.k_proj.bias",
    )
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"time_stride": 16}, r"time_stride=16 \(here 10\)"),
        ({"other.weight": torch.ones(1)}, {}, r"unexpected: other\.weight"),
        ({"cls_token": torch.ones(1, 1, 48)}, {}, "cls_token twice"),
        ({key: None}, {}, r"missing: blocks\.1\.attn\.qkv\.bias"),
        ({key: torch.ones(49)}, {}, r"shape: blocks\.1\.attn\.qkv\.bias is \(145,\)"),
    ]
    for changed, settings, message in cases:
        held = {n: t for n, t in {**state, **changed}.items() if t is not None}
        with pytest.raises(UserError, match=message):
            AST.from_file(held, settings=settings, path=tmp_path, heads=3)


def test_ast__published_shape() -> None:
    with torch.device("meta"):
        state = AST().state_dict()
    assert sum(t.numel() for t in state.values()) == 86_187_264
    assert state["pos_embed"].shape == (1, 1214, 768)


@pytest.mark.parametrize(("seconds", "t"), [(0.15, 1), (0.19, 2), (0.5, 5), (1.0, 10), (2.0, 20)])
def test_ast__positions_of_other_lengths(seconds: float, t: int) -> None:
    """Fewer than the table's 9 time patches: its middle columns; more: stretched bilinearly."""
    encoder = made("ast")
    assert encoder.time_patches(round(16000 * seconds)) == t
    assert encoder.time_patches(torch.tensor([round(16000 * seconds)])).tolist() == [t]
    x = encoder.inputs(clip(seconds))
    table = encoder.pos_embed[0, 2:].unflatten(0, (12, 9))
    with torch.no_grad():
        found = encoder.embed_patches(x) - encoder.patch_embed(x)  # (1, t, 12, D)
    for j in range(t):
        if t < 9:
            wanted = table[:, 4 - t // 2 + j]
        else:
            at = min(max((j + 0.5) * 9 / t - 0.5, 0), 8)
            low, part = int(at), at - int(at)
            wanted = (1 - part) * table[:, low] + part * table[:, min(low + 1, 8)]
        torch.testing.assert_close(found[0, j], wanted, atol=1e-5, rtol=0)
