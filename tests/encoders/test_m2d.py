"""M2D's encoder against a slow version of the published description."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import bat
from bat.encoders.m2d import M2D
from bat.errors import UserError
from tests.encoders.vits import clip, doubles, made
from tests.reference import vit


def spectrogram(wave: torch.Tensor, frames: int, *, rate: int = 16000) -> torch.Tensor:
    """(S,) -> (frames, 80), frame by frame; transformers makes the mel bank."""
    size, hop = rate // 40, rate // 100
    mel_filter_bank = pytest.importorskip("transformers.audio_utils").mel_filter_bank
    bank = mel_filter_bank(
        size // 2 + 1, 80, 50.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    padded = np.pad(wave.double().numpy(), size // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(size) / size)
    out = np.zeros((frames, 80))
    for t in range(1 + len(wave) // hop):
        power = np.abs(np.fft.rfft(padded[t * hop : t * hop + size] * window)) ** 2
        out[t] = (np.log(power @ bank + 1.1920929e-7) + 7.1) / 4.2
    return torch.from_numpy(out)


@pytest.mark.parametrize(("rate", "seconds"), [(16000, 0.3), (32000, 0.5)])
def test_m2d__equals_the_slow_version(rate: int, seconds: float) -> None:
    encoder, wave = made("m2d", sample_rate=rate), clip(seconds, rate=rate)
    T = math.ceil((1 + 100 * seconds) / 16)
    x = spectrogram(wave, 16 * T, rate=rate)
    # near the floor of the logarithm the float32 bank's last bit is 1e-3
    torch.testing.assert_close(encoder.inputs(wave)[0, 0].double(), x, atol=2e-3, rtol=0)
    state = doubles(encoder)
    weight, places = state["patch_embed.proj.weight"][:, 0], []  # (D, mels, frames)
    tokens = [state["cls_token"][0, 0]]
    for f in range(5):
        for t in range(T):  # frequency-major, as published
            patch = x[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].T
            token = (weight * patch).sum((1, 2)) + state["patch_embed.proj.bias"]
            tokens.append(token + torch.tensor(vit.code(48, t, f)))
            places.append((t, f))
    with torch.no_grad():
        found = encoder(wave)
    assert found.cls is None
    assert found.patches.shape == (2, 1, T, 5, 48)
    wanted = vit.blocks(torch.stack(tokens), state, heads=2, depth=2)
    for block, tokens in enumerate(wanted):
        for (t, f), token in zip(places, tokens[1:], strict=True):
            own = found.patches[block, 0, t, f].double()
            torch.testing.assert_close(own, token, atol=2e-3, rtol=1e-3)


def test_m2d__the_table_is_frequency_major() -> None:
    code = made("m2d").pos_embed[0]
    assert not code[0].any()
    for t, f in ((0, 0), (3, 0), (0, 4), (2, 3)):
        wanted = torch.tensor(vit.code(48, t, f))
        torch.testing.assert_close(code[1 + 4 * f + t], wanted, atol=1e-6, rtol=0)


def test_m2d__published_shape() -> None:
    with torch.device("meta"):
        state = M2D().state_dict()
    assert len(state) == 150  # and norm_stats, which is a setting here
    assert sum(t.numel() for t in state.values()) + 2 == 85_400_834
    assert state["pos_embed"].shape == (1, 191, 768)


def test_m2d__long_clips_are_chunks_from_position_0() -> None:
    encoder, wave = made("m2d"), clip(1.0)  # 101 frames: 7 time patches, chunks of 4
    x = encoder.inputs(wave)
    with torch.no_grad():
        found = encoder.features(x).patches
        parts = [encoder.features(part).patches for part in (x[:, :, :64], x[:, :, 64:])]
    assert encoder.max_patches == 4
    torch.testing.assert_close(found, torch.cat(parts, dim=2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("patch", "grid"), [((16, 16), (62, 5)), ((16, 4), (50, 5)), ((80, 2), (304, 1))]
)
def test_m2d__sizes_are_read_from_the_tensors(
    patch: tuple[int, int], grid: tuple[int, int], tmp_path: Path
) -> None:
    encoder = made("m2d", patch=patch, grid=grid, norm_stats=(-6.5, 5.25))
    state = {**encoder.state_dict(), "norm_stats": torch.tensor([-6.5, 5.25])}
    found = M2D.from_file(state, settings={}, path=tmp_path / "x.pth", heads=2)
    assert found.config() == encoder.config()
    wave = clip(0.4)
    with torch.no_grad():
        assert torch.equal(found.eval()(wave).patches, encoder(wave).patches)
    assert encoder.hop_seconds == patch[1] / 100


def test_m2d__files_as_published(tmp_path: Path) -> None:
    encoder = made("m2d")
    own, D = encoder.state_dict(), torch.zeros(4, 48)
    stats = {"norm_stats": torch.tensor([-5.5, 3.5])}
    beside = {f"{n}.weight": D for n in ("decoder_embed", "target_norm", "offline_predictor")}
    beside |= {"target_blocks.0.norm1.weight": D[0], "mask_token": D, "text_proj.weight": D}
    evar = {f"module.ar.runtime.backbone.{n}": t for n, t in {**own, **stats}.items()}
    evar |= {"module.head.norm.running_mean": D[0], "module.head.mlp.mlp.0.weight": D}
    files = {
        "m2d_vit_base-80x608p16x16-2/encoder.pth": ({**own, **stats}, [-5.5, 3.5], 16000),
        "m2d_vit_base-80x608p16x16p32k-2/full.pth": (
            {"model": {**own, **stats, **beside}},
            [-5.5, 3.5],
            32000,
        ),
        "full_of_2022.pth": ({"model": {**own, **beside}}, [-7.1, 4.2], 16000),
        "evar.pth": (evar, [-5.5, 3.5], 16000),
        "backbone.pth": (
            {f"backbone.{n}": t for n, t in {**own, **stats}.items()},
            [-5.5, 3.5],
            16000,
        ),
    }
    for name, (held, wanted, rate) in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(held, tmp_path / name)
        found = bat.load_encoder(tmp_path / name, heads=2)
        assert type(found) is M2D, name
        config = found.config()
        assert (config["norm_stats"], config["sample_rate"]) == (wanted, rate)
        assert all(torch.equal(own[n], t) for n, t in found.state_dict().items())
    torch.save(own, tmp_path / "of_2022.pth")
    with pytest.raises(UserError, match=r"m2d:.*of_2022\.pth"):
        bat.load_encoder(tmp_path / "of_2022.pth", heads=2)
    assert type(bat.load_encoder(f"m2d:{tmp_path / 'of_2022.pth'}", heads=2)) is M2D
    torch.save({**own, **stats, "clap.weight": D}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"unexpected: clap\.weight"):
        bat.load_encoder(tmp_path / "other.pth", heads=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": (16, 16.0)}, "patch="),
        ({"norm_stats": (1.0, 0.0)}, "std=0"),
        ({"grid": (4, 4)}, "80 mel bins"),
        ({"frontend": {"n_mels": 3}}, "n_mels.*pad and clip_seconds"),
        ({"sample_rate": 16}, "sample_rate=16"),
    ],
)
def test_m2d__bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made("m2d", **settings)
