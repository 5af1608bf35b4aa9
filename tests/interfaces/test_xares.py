"""The X-ARES interface by its written contract (a class found and built by name alone)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.interfaces import export, suites, xares
from tests.interfaces.suite_encoders import (
    CLOSE,
    KINDS,
    SECONDS,
    batch,
    clip,
    encoder,
    import_file,
    saved,
)


def built(kind: str, folder: Path) -> xares.Frames:
    class Built(xares.Frames):
        checkpoint = saved(kind, folder)

    return Built()


@pytest.mark.parametrize("kind", KINDS)
def test_xares__attributes_and_shapes(kind: str, tmp_path: Path) -> None:
    made, own = built(kind, tmp_path), encoder(kind)
    assert made.sampling_rate == own.sample_rate
    assert made.hop_size_in_ms == pytest.approx(1000 * own.hop_seconds)
    waves = 0.1 * torch.randn(2, 50000)  # what X-ARES checks an encoder with
    T = -(-50000 // round(own.hop_seconds * own.sample_rate))
    assert made(waves).shape == (2, T, made.output_dim)
    assert made(waves[0]).shape == (1, T, made.output_dim)
    assert made(waves[0]).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_xares__a_clip_is_what_it_is_alone(kind: str, tmp_path: Path) -> None:
    made = built(kind, tmp_path)
    clips = [clip(s, made.sampling_rate) for s in SECONDS]
    together = made(batch(clips))
    longer = made(batch(clips, samples=6 * made.sampling_rate))
    for row, wave in enumerate(clips):
        (alone,) = made(wave)
        torch.testing.assert_close(together[row, : len(alone)], alone, **CLOSE)
        torch.testing.assert_close(longer[row, : len(alone)], alone, **CLOSE)
        assert not together[row, len(alone) :].any()


def test_xares__a_whole_number_of_hops_has_no_empty_last_step(tmp_path: Path) -> None:
    made = built("bat", tmp_path)
    assert [made(clip(s)).shape[1] for s in (0.16, 0.1601, 0.32, 10)] == [1, 2, 2, 63]


def test_xares__ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, most = built("odd", tmp_path), []
    whole = made.encoder.forward

    def forward(waves: torch.Tensor, lengths: torch.Tensor) -> object:
        most.append(waves.numel() / 8000)
        return whole(waves, lengths)

    monkeypatch.setattr(made.encoder, "forward", forward)
    wave = clip(600, 8000)
    found = made(wave)
    assert found.shape == (1, 4800, 16)
    assert max(most) <= suites.BATCH_SECONDS
    torch.testing.assert_close(found[:, :480], made(wave[: 60 * 8000]), **CLOSE)


def test_xares__bad_audio_is_named(tmp_path: Path) -> None:
    made, good = built("steps", tmp_path), clip(0.1)
    cases = {
        "(1, 2, 1600)": good.expand(1, 2, -1),
        "row 0 holds NaN": good * torch.nan,
        "row 0 has no samples": good[:0],
        "torch.int16": (1000 * good).short(),
    }
    for said, audio in cases.items():
        with pytest.raises(UserError) as error:
            made(audio)
        assert said in str(error.value)


def test_export__writes_one_class_named_after_the_checkpoint(tmp_path: Path) -> None:
    (file,) = export("xares", saved("bat", tmp_path / "Run-7"), tmp_path / "out").iterdir()
    module = import_file(file)
    (name,) = (name for name in dir(module) if name.endswith("Encoder"))
    assert name.startswith("Run7")
    digest = name.removeprefix("Run7").removesuffix("Encoder")
    assert file.name == f"run_7_{digest.lower()}.py"
    made = getattr(module, name)()
    assert not made.training
    torch.testing.assert_close(made(clip(0.5)), built("bat", tmp_path / "b")(clip(0.5)), **CLOSE)
