"""The HEAR interface by its written contract (hearbenchmark.com/hear-api.html)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.interfaces import export, hear, suites
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


def model(kind: str = "bat") -> hear.HearModel:
    return hear.HearModel(encoder(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hear__shapes_types_and_times(kind: str) -> None:
    made = model(kind)
    assert made.sample_rate in (16000, 22050, 32000, 44100, 48000)
    audio = batch([clip(1.07, made.sample_rate), clip(1.07, made.sample_rate, 1)])
    scene = hear.get_scene_embeddings(audio, made)
    assert scene.shape == (2, made.scene_embedding_size)
    frames, ms = hear.get_timestamp_embeddings(audio, made)
    assert frames.shape == (*ms.shape, made.timestamp_embedding_size)
    assert {scene.dtype, frames.dtype, ms.dtype} == {torch.float32}
    gaps = ms.diff()
    assert gaps.max() <= 50
    assert gaps.max() - gaps.min() < 1e-2
    assert ms[:, 0].tolist() == [0, 0]
    assert bool((ms[:, -1] <= 1070).all() & (ms[:, -1] > 1020).all())
    assert frames.isfinite().all()
    assert (frames != 0).any(-1).all()


def test_hear__timestamps_by_hand() -> None:
    ms = hear.get_timestamp_embeddings(clip(0.3)[None], model("bat"))[1]
    assert ms.tolist() == [[0, 40, 80, 120, 160, 200, 240, 280]]  # four copies at 160 ms
    ms = hear.get_timestamp_embeddings(clip(0.1)[None], model("steps"))[1]
    assert ms.tolist() == [[0, 20, 40, 60, 80, 100]]  # one
    ms = hear.get_timestamp_embeddings(clip(0.25)[None], model("odd"))[1]
    assert ms[0].tolist() == pytest.approx([0, 125 / 3, 250 / 3, 125, 500 / 3, 625 / 3, 250])


@torch.no_grad()
def test_hear__an_embedding_is_that_of_the_sound_around_its_timestamp() -> None:
    """Copy by copy: the clip mirrored by 80 ms, from 0, 40, 80 and 120 ms on."""
    made, wave = model("bat"), clip(1.0)
    frames = hear.get_timestamp_embeddings(wave[None], made)[0][0]  # 26 timestamps
    mirrored = torch.cat([wave[:1280].flip(0), wave, wave[-1280:].flip(0)])
    for copy, steps in enumerate((7, 7, 6, 6)):
        start = 640 * copy
        own = suites.embed(made.encoder, [mirrored[start : start + 2560 * steps]])[0].frames[0]
        torch.testing.assert_close(frames[copy::4], own, **CLOSE)


def test_hear__an_impulse_is_found_where_it_is() -> None:
    made, wave = model("steps"), 1e-3 * clip(3.0)
    made.encoder.block = torch.nn.Identity()  # no attention: a step sees its own 20 ms
    quiet = hear.get_timestamp_embeddings(wave[None], made)[0][0]
    wave[int(1.234 * 16000)] = 1.0
    loud, ms = hear.get_timestamp_embeddings(wave[None], made)
    changed = ms[0][(loud[0] - quiet).abs().amax(-1) > 1e-4]
    assert changed.tolist() == [1240]  # 1230 .. 1250 ms


@torch.no_grad()
def test_hear__a_long_clip_has_whole_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made, lengths = model("odd"), []
    whole = made.encoder.forward

    def forward(waves: torch.Tensor, of_rows: torch.Tensor) -> object:
        lengths.extend(of_rows.tolist())
        return whole(waves, of_rows)

    monkeypatch.setattr(made.encoder, "forward", forward)
    _, ms = hear.get_timestamp_embeddings(clip(21.0, made.sample_rate)[None], made)
    assert ms.shape == (1, 505)
    assert len(lengths) == 3 * 3  # 21 s: three windows of 80 steps a copy
    assert max(lengths) - min(lengths) <= 1
    assert set(map(round, [n / 8000 for n in lengths])) == {10}


@pytest.mark.parametrize("kind", KINDS)
def test_hear__a_clip_is_what_it_is_alone(kind: str) -> None:
    made = model(kind)
    clips = [clip(s, made.sample_rate) for s in SECONDS]
    scenes = hear.get_scene_embeddings(batch(clips), made)
    frames, ms = hear.get_timestamp_embeddings(batch(clips), made)
    for row, wave in enumerate(clips):
        alone, times = hear.get_timestamp_embeddings(wave[None], made)
        T = times.shape[1]
        torch.testing.assert_close(
            scenes[row], hear.get_scene_embeddings(wave[None], made)[0], **CLOSE
        )
        torch.testing.assert_close(frames[row, :T], alone[0], **CLOSE)
        assert torch.equal(ms[row, :T], times[0])
        assert not frames[row, T:].any()


def test_hear__bad_audio_is_named() -> None:
    made, good = model("steps"), clip(0.1)
    bad = good.clone()
    bad[3] = torch.nan
    cases = {
        "(1, 2, 1600)": good.expand(1, 2, -1),
        "(1600,)": good,
        "row 1 holds NaN": torch.stack([good, bad]),
        "row 0 has no samples": good[None, :0],
        "torch.int16": (1000 * good[None]).short(),
    }
    for call in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        for said, audio in cases.items():
            with pytest.raises(UserError) as error:
                call(audio, made)
            assert said in str(error.value)


def test_export__writes_a_module(tmp_path: Path) -> None:
    checkpoint = saved("bat", tmp_path / "run")
    (file,) = export("hear", checkpoint, tmp_path / "out").iterdir()
    module = import_file(file)
    audio = clip(0.5)[None]
    wanted = hear.get_scene_embeddings(audio, model("bat"))
    for path in ((), ("",), (checkpoint,)):
        torch.testing.assert_close(
            module.get_scene_embeddings(audio, module.load_model(*path)), wanted
        )
    assert module.get_timestamp_embeddings(audio, module.load_model())[0].shape == (1, 13, 48)
