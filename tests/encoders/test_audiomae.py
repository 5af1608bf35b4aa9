"""AudioMAE's encoder against a slow version of the published description."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchaudio

import bat
from bat.encoders.audiomae import AudioMAE
from bat.errors import UserError
from tests.encoders.vits import clip, doubles, made
from tests.reference import vit

MEAN, STD = -4.2677393, 4.5689974


def spectrogram(wave: torch.Tensor, frames: int) -> torch.Tensor:
    """(S,) -> (frames, 128): zero frames are appended before standardising."""
    fbank = torchaudio.compliance.kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
    )
    return (F.pad(fbank, (0, 0, 0, frames - len(fbank))) - MEAN) / (2 * STD)


@pytest.mark.parametrize(("seconds", "frames"), [(0.3, 32), (0.5, 96)])
def test_audiomae__equals_the_slow_version(seconds: float, frames: int) -> None:
    """At the clip's own length (28 frames in 2 time patches), and padded to a fixed number."""
    encoder, wave = made("audiomae"), clip(seconds)
    x = spectrogram(wave, frames)
    fixed = None if frames == 32 else frames
    torch.testing.assert_close(encoder.inputs(wave, frames=fixed)[0, 0], x, atol=1e-4, rtol=0)
    state, tokens = doubles(encoder), []
    tokens.append(state["cls_token"][0, 0])
    weight = state["patch_embed.proj.weight"][:, 0]
    for i in range(frames // 16 * 8):
        t, f = i // 8, i % 8
        patch = x[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].double()
        token = (weight * patch).sum((1, 2)) + state["patch_embed.proj.bias"]
        # the table of 6 x 8 patches is frequency-major and added to time-major tokens
        tokens.append(token + torch.tensor(vit.code(48, i % 6, i // 6)))
    wanted = vit.blocks(torch.stack(tokens), state, heads=2, depth=2)
    with torch.no_grad():
        found = encoder(wave) if fixed is None else encoder(wave, frames=fixed)
    assert found.patches.shape == (2, 1, frames // 16, 8, 48)
    for block, tokens in enumerate(wanted):
        torch.testing.assert_close(found.cls[block, 0].double(), tokens[0], atol=1e-4, rtol=1e-4)
        patches = found.patches[block, 0].flatten(0, 1).double()
        torch.testing.assert_close(patches, tokens[1:], atol=1e-4, rtol=1e-4)


def test_audiomae__equals_timm() -> None:
    """timm's ViT with our names loads the weights strictly and gives the last block's tokens."""
    encoder = made("audiomae")
    other = timm.models.VisionTransformer(
        img_size=(96, 128), in_chans=1, embed_dim=48, depth=2, num_heads=2, num_classes=0
    ).eval()
    other.load_state_dict(encoder.state_dict())
    x = encoder.inputs(clip(0.95))
    with torch.no_grad():
        wanted, found = other.forward_features(x), encoder.features(x)
    torch.testing.assert_close(found.cls[-1], wanted[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.patches[-1].flatten(1, 2), wanted[:, 1:], atol=1e-4, rtol=0)


def test_audiomae__published_shape() -> None:
    with torch.device("meta"):
        state = AudioMAE().state_dict()
    assert len(state) == 150
    assert sum(t.numel() for t in state.values()) == 85_648_128
    assert state["pos_embed"].shape == (1, 513, 768)


def test_audiomae__long_clips_are_chunks() -> None:
    encoder, wave = made("audiomae"), clip(1.5)  # 148 frames: 10 time patches, chunks of 6
    x = encoder.inputs(wave)
    with torch.no_grad():
        found = encoder.features(x)
        parts = [encoder.features(part) for part in (x[:, :, :96], x[:, :, 96:])]
    joined = torch.cat([part.patches for part in parts], dim=2)
    torch.testing.assert_close(found.patches, joined, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.cls, (parts[0].cls + parts[1].cls) / 2, atol=1e-5, rtol=0)


def test_audiomae__files_are_read_strictly(tmp_path: Path) -> None:
    encoder, path = made("audiomae"), tmp_path / "file.pth"
    state = encoder.state_dict()

    def load(**changed: torch.Tensor | None) -> AudioMAE:
        held = {n.replace("__", "."): t for n, t in {**state, **changed}.items() if t is not None}
        return AudioMAE.from_file(held, settings={}, path=path, heads=2)

    def features(model: AudioMAE) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(clip(0.3)).patches

    D = torch.zeros(8, 48)
    training = {"decoder_embed__weight": D, "mask_token": D, "decoder_blocks__0__attn__tau": D}
    assert torch.equal(features(load(**training)), features(encoder))
    plain = dict.fromkeys(("norm.weight", "norm.bias"))
    head = {"fc_norm__weight": D[0], "fc_norm__bias": D[0], "head__weight": D}
    tuned = load(**plain, **head)
    assert tuned.config()["norm"] is False
    assert torch.equal(features(tuned)[0], features(encoder)[0])
    assert (features(tuned)[1] - features(encoder)[1]).abs().max() > 0.1
    moved = load(pos_embed=state["pos_embed"] + 1)  # the file's table is what counts
    assert (features(moved) - features(encoder)).abs().max() > 0.1
    for wrong, message in (
        ({"other__weight": D}, r"unexpected: other\.weight"),
        ({"blocks.1.attn.proj.bias": None}, r"missing: blocks\.1\.attn\.proj\.bias"),
        ({"blocks.1.mlp.fc2.bias": D}, r"shape: blocks\.1\.mlp\.fc2\.bias"),
        ({"pos_embed": state["pos_embed"][:, :21]}, rf"pos_embed has 21 rows.*m2d:{path}"),
        ({"blocks.0.norm1.weight": torch.ones(8192)}, r"shape: blocks\.0\.norm1\.bias"),
    ):
        with pytest.raises(UserError, match=message):
            load(**wrong)


@pytest.mark.parametrize("wrapped", [dict, lambda s: {"model": s, "epoch": 3}])
def test_audiomae__is_found_by_its_names(wrapped, tmp_path: Path) -> None:
    encoder, path = made("audiomae"), tmp_path / "file.pth"
    torch.save(wrapped(encoder.state_dict()), path)
    found = bat.load_encoder(path, heads=2)
    assert type(found) is AudioMAE
    assert found.config() == {**encoder.config(), "mlp_ratio": 4.0}
