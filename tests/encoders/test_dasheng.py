"""Dasheng's encoder against its package (0.0.9) and torchaudio."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio

import bat
from bat.encoders.dasheng import Dasheng
from bat.errors import UserError
from tests.encoders.vits import clip, doubles, made
from tests.reference import vit

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def decibels(wave: torch.Tensor) -> torch.Tensor:
    """One clip (S,) -> (frames, 64) by torchaudio."""
    mel = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=512, win_length=512, hop_length=160, n_mels=64, f_min=0, f_max=8000
    )(wave)
    return torchaudio.transforms.AmplitudeToDB(top_db=120)(mel[None])[0].T


def test_dasheng__equals_the_package(tmp_path: Path) -> None:
    """The package's encoder with random weights, running statistics too, read from its own kind of
    file: waveform to tokens, in one chunk and in three, the last one shorter."""
    theirs = pytest.importorskip("dasheng.pretrained.pretrained")
    torch.manual_seed(0)
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 4, "target_length": 120}
    model = theirs.Dasheng(**shape).eval()
    for name, tensor in model.named_parameters():
        tensor.data.add_((0.2 if "bn" in name else 0.1) * torch.randn_like(tensor))
    model.init_bn[1].running_mean.normal_(-20, 10)
    model.init_bn[1].running_var.uniform_(20, 900)
    config = {**shape, "patch_size": (64, 4), "patch_stride": (64, 4)}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "tiny.pt")
    encoder = bat.load_encoder(tmp_path / "tiny.pt")
    assert type(encoder) is Dasheng
    assert encoder.heads == 4
    worst, blocks = 0.0, list[torch.Tensor]()
    for block in model.blocks:
        block.register_forward_hook(lambda *call: blocks.append(call[2]))
    for seconds in (0.3, 1.0, 2.9, 3.03):
        wave = clip(seconds)
        blocks.clear()
        with torch.no_grad():
            wanted, found = model(wave[None]), encoder(wave)
        assert found.patches.shape[2] == wanted.shape[1] == encoder.time_patches(len(wave))
        torch.testing.assert_close(found.patches[-1, :, :, 0], wanted, **CLOSE)
        for b in (0, 1):
            joined = torch.cat(blocks[b::3], dim=1)
            torch.testing.assert_close(found.patches[b, :, :, 0], joined, **CLOSE)
        worst = max(worst, (found.patches[-1, :, :, 0] - wanted).abs().max().item())
    print(f"largest difference from dasheng: {worst:.1e}")


def test_dasheng__equals_the_slow_version() -> None:
    encoder, wave = made("dasheng"), clip(0.3)
    norm = encoder.init_bn["1"]
    norm.running_mean.normal_(-20, 10)
    norm.running_var.uniform_(20, 900)
    x = decibels(wave)  # (31, 64): 7 tokens
    torch.testing.assert_close(encoder.inputs(wave)[0, 0], x[:28], atol=1e-3, rtol=0)
    state, tokens = doubles(encoder), []
    scale = state["init_bn.1.weight"] / (state["init_bn.1.running_var"] + 1e-5).sqrt()
    x = (x.double() - state["init_bn.1.running_mean"]) * scale + state["init_bn.1.bias"]
    for t in range(7):
        patch = x[4 * t : 4 * t + 4].T  # (64, 4)
        token = (state["patch_embed.proj.weight"][:, 0] * patch).sum((1, 2))
        token = token + state["patch_embed.proj.bias"] + state["freq_pos_embed"][0, :, 0, 0]
        tokens.append(token + state["time_pos_embed"][0, :, 0, t])
    wanted = vit.blocks(torch.stack(tokens), state, heads=2, depth=2)
    with torch.no_grad():
        found = encoder(wave)
        training = encoder.train()(wave)  # running statistics also then
    assert found.cls is None
    assert torch.equal(training.patches, found.patches)
    for block, tokens in enumerate(wanted):
        own = found.patches[block, 0, :, 0].double()
        torch.testing.assert_close(own, tokens, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (639, 1), (1120, 2), (16000, 25)])
def test_dasheng__tokens_of_a_clip(samples: int, tokens: int) -> None:
    encoder = made("dasheng")
    assert encoder.time_patches(samples) == tokens
    assert encoder.time_patches(torch.tensor([samples])).tolist() == [tokens]
    assert encoder.inputs(torch.ones(samples)).shape == (1, 1, 4 * tokens, 64)
    assert encoder.hop_seconds == 0.04
    with pytest.raises(UserError, match="frames=512"):
        encoder.inputs(torch.ones(samples), frames=512)


def test_dasheng__published_shape() -> None:
    with torch.device("meta"):
        model = Dasheng()
    assert sum(p.numel() for p in model.parameters()) == 85_447_808
    assert model.time_pos_embed.shape == (1, 768, 1, 252)


def test_dasheng__files_are_read_strictly(tmp_path: Path) -> None:
    encoder = made("dasheng")
    state = encoder.state_dict()
    hub = {f"encoder.{n}": t for n, t in state.items()}
    hub |= {"encoder.init_bn.1.num_batches_tracked": torch.tensor(7)}
    for head in ({}, {"outputlayer.0.weight": torch.ones(48)}):
        torch.save({**hub, **head}, tmp_path / "pytorch_model.bin")
        found = bat.load_encoder(tmp_path / "pytorch_model.bin", heads=2)
        assert found.config() == encoder.config()
        assert all(torch.equal(state[n], t) for n, t in found.state_dict().items())
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"encoder_kwargs": {"n_mels": 128}}, "n_mels=128"),
        ({}, {"patch_stride": (64, 2)}, "patch_stride"),
        ({"cls_token": torch.ones(1, 1, 48)}, {}, "unexpected: cls_token"),
        ({"init_bn.1.bias": None}, {}, r"missing: init_bn\.1\.bias"),
        ({"time_pos_embed": torch.ones(1, 48, 2, 30)}, {}, "shape: time_pos_embed"),
    ]
    for changed, settings, message in cases:
        held = {n: t for n, t in {**state, **changed}.items() if t is not None}
        with pytest.raises(UserError, match=message):
            Dasheng.from_file(held, settings=settings, path=tmp_path, heads=2)
