"""The MTEB interface by its written contract; the package itself in tools/interfaces/mteb.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch

from bat.errors import UserError
from bat.interfaces import export, mteb
from tests.interfaces.suite_encoders import (
    CLOSE,
    KINDS,
    SECONDS,
    clip,
    encoder,
    import_file,
    saved,
)


def items(*clips: torch.Tensor, rate: int = 16000) -> list[dict[str, Any]]:
    return [{"array": wave.numpy(), "sampling_rate": rate} for wave in clips]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mteb__embeds_in_order_each_clip_as_it_is_alone(kind: str) -> None:
    model = encoder(kind)
    made, rate = mteb.Embedder(model), model.sample_rate
    clips = [clip(s, rate, seed) for seed in (0, 1) for s in SECONDS]
    loader = [{"audio": items(*clips[:4], rate=rate)}, {"audio": items(*clips[4:], rate=rate)}]
    found = made.encode(loader, task_metadata=None, hf_split="test", hf_subset="default")
    assert found.shape == (6, model.width)
    assert found.dtype == np.float32
    for row, wave in zip(found, clips, strict=True):
        features = model(wave)
        last = features.patches[-1, 0].mean((0, 1)) if features.cls is None else features.cls[-1, 0]
        torch.testing.assert_close(torch.from_numpy(row), last, **CLOSE)


@torch.no_grad()
def test_mteb__clips_of_another_rate_are_resampled() -> None:
    made, wave = mteb.Embedder(encoder("bat")), clip(1.0, 44100)
    found = made.encode([{"audio": items(wave, rate=44100)}])
    there = torch.from_numpy(soxr.resample(wave.numpy(), 44100, 16000))
    np.testing.assert_allclose(found, made.encode([{"audio": items(there)}]), atol=1e-5)
    double = [{"array": wave.double().numpy(), "sampling_rate": 44100}]
    np.testing.assert_allclose(found, made.encode([{"audio": double}]), atol=1e-5)


def test_mteb__no_batch_is_no_embedding() -> None:
    assert mteb.Embedder(encoder("steps")).encode([]).shape == (0, 16)


def test_mteb__bad_clips_are_named() -> None:
    made, good = mteb.Embedder(encoder("steps")), clip(0.1)
    cases = {
        "clip 1 has the shape (2, 1600)": good.expand(2, -1),
        "clip 1 has the shape (1, 1, 1600)": good.expand(1, 1, -1),
        "clip 1 holds NaN": good * torch.nan,
        "clip 1 has no samples": good[:0],
    }
    for said, wave in cases.items():
        with pytest.raises(UserError) as error:
            made.encode([{"audio": items(good)}, {"audio": items(wave, good)}])
        assert said in str(error.value)
    with pytest.raises(UserError, match="text"):
        made.encode([{"text": ["a dog barks"]}])


def test_export__needs_no_mteb_but_loading_does(tmp_path: Path) -> None:
    (file,) = export("mteb", saved("bat", tmp_path / "run"), tmp_path / "out").iterdir()
    module = import_file(file)
    assert file.stem == module.NAME
    if importlib.util.find_spec("mteb") is None:
        for call in (module.load_model, module.model_meta):
            with pytest.raises(UserError, match="pip install 'mteb"):
                call()
        return
    meta, model = module.model_meta(), module.load_model(device="cpu")
    assert meta.name == f"bat/{file.stem}"
    assert (meta.embed_dim, meta.modalities) == (48, ["audio"])
    assert model.encode([{"audio": items(clip(0.5))}]).shape == (1, 48)
