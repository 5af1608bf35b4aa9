"""encoder.embed: waveforms as users hold them, what is refused, and what an encoder prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import bat
from bat.encoders.bat import BAT
from bat.types import Grid

RATE = 16_000
X = np.random.default_rng(0).standard_normal((3, 8_000)).astype(np.float32) / 10


@pytest.fixture
def encoder() -> BAT:
    torch.manual_seed(0)
    return BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))


TAKEN: dict[str, Any] = {
    "one": (X[0], 1),
    "mono": (torch.from_numpy(X[:1]), 1),
    "batch": (X, 3),
    "torch": (torch.from_numpy(X), 3),
    "lengths": ([X[0], torch.from_numpy(X[1, :5_000]), X[2:, :100]], 3),
    "double": (X.astype(np.float64), 3),
    "two": (list(X[:2]), 2),
}


@pytest.mark.parametrize("case", TAKEN)
def test_embed__equals_each_clip_alone(case: str, encoder: BAT) -> None:
    clips, n = TAKEN[case]
    encoder.train()
    found = encoder.embed(clips, sample_rate=RATE)
    assert found.shape == (n, 16)
    assert encoder.training  # as it was
    encoder.eval()
    for clip, row in zip([clips] if n == 1 else clips, found, strict=True):
        with torch.no_grad():
            want = encoder(torch.as_tensor(clip).reshape(1, -1).float()).cls[-1, 0]
        np.testing.assert_allclose(row, want, atol=1e-5)


def test_embed__files_rates_and_bat_embed_agree(encoder: BAT, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", X[0], 8_000, subtype="FLOAT")
    found = encoder.embed(tmp_path / "a.wav")
    np.testing.assert_allclose(found, encoder.embed(X[0], sample_rate=8_000), atol=1e-4)
    np.testing.assert_array_equal(found, bat.embed(np.array([f"{tmp_path}/a.wav"]), encoder))
    assert np.abs(found - encoder.embed(X[0], sample_rate=RATE)).max() > 1e-3
    (frames,) = encoder.embed(X[0], sample_rate=RATE, level="frame", layer=1)
    assert frames.shape == (encoder.time_patches(8_000), 16)


REFUSED: dict[str, tuple[Any, int | None, str]] = {
    "rate": (X[0], None, "sample_rate.*16000"),
    "rate 0": (X[0], 0, "sample_rate=0"),
    "stereo": (X[:2], RATE, r"\(2, 8000\).*x\.mean\(0\).*list\(x\)"),
    "stereo torch": (torch.from_numpy(X[:2]), RATE, r"\(2, 8000\).*list\(x\)"),
    "channels last": (X[:2].T, RATE, r"\(8000, 2\).*x\.mean\(1\)"),
    "stereo clip": ([X[0], X[:2]], RATE, r"clip 1.*\(2, 8000\).*x\.mean\(0\)"),
    "batch of stereo": (X[:2][None], RATE, r"clip 0.*\(2, 8000\).*x\.mean\(0\)"),
    "nan": ([X[0], X[0] * np.nan], RATE, "clip 1.*NaN"),
    "int16": ((X[0] * 1000).astype(np.int16), RATE, "int16.*32768"),
    "unscaled": (X[0] * 32768, RATE, "peak"),
    "numbers": ([0.1, 0.2], RATE, "clip 0 is a float.*clip 1"),
    "mixed": ([X[0], "a.wav"], RATE, "clip 1 is a path"),
    "empty": ([X[0], X[0, :0]], RATE, "clip 1.*no samples"),
    "none": ([], RATE, "no clips"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_embed__refuses_what_it_would_guess(case: str, encoder: BAT) -> None:
    clips, rate, match = REFUSED[case]
    with pytest.raises(bat.UserError, match=match):
        encoder.embed(clips, sample_rate=rate)


def test_repr__says_shapes(encoder: BAT) -> None:
    n = sum(p.numel() for p in encoder.parameters())
    assert repr(encoder) == (
        f"BAT({n / 1e3:.1f} k parameters, 16 kHz, 2 blocks x 16, 6.25 frames/s, class token)"
    )
    said = repr(encoder(torch.zeros(2, 8_000), torch.tensor([8_000, 800])))
    assert "patches (L, B, T, F, D) = (2, 2, 4, 8, 16), cls (L, B, D) = (2, 2, 16)" in said
    assert "valid (B) = (2,)" in said
    assert "tensor(" not in said


def test_load_encoder__device_is_checked(encoder: BAT, tmp_path: Path) -> None:
    from bat.weights import export

    weights = {"student": encoder.state_dict()}
    export(tmp_path / "e", backbone="bat", encoder=encoder.config(), weights=weights, meta={})
    assert bat.load_encoder(tmp_path / "e", device="auto").embed(X, sample_rate=RATE).shape
    with pytest.raises(bat.UserError, match="device=tpu"):
        bat.load_encoder(tmp_path / "e", device="tpu")
