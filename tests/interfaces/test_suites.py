"""Clips for evaluation suites: each as it is alone, long recordings in pieces, names of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bat
from bat.errors import UserError
from bat.interfaces import suites
from bat.types import Features
from bat.weights import export
from tests.interfaces.suite_encoders import CLOSE, KINDS, SECONDS, clip, encoder, saved


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embed__is_the_encoders_own_output(kind: str) -> None:
    model = encoder(kind)
    clips = [clip(s, model.sample_rate) for s in SECONDS]
    for one, made in zip(clips, suites.embed(model, clips, blocks=model.depth), strict=True):
        features = model(one)
        T = suites.steps_of(len(one), model)
        wanted = features.patches[:, 0].mean(2)[:, :T]  # (L, T, D)
        torch.testing.assert_close(made.frames, wanted, **CLOSE)
        last = features.patches[-1, 0].mean((0, 1)) if features.cls is None else features.cls[-1, 0]
        torch.testing.assert_close(made.clip, last, **CLOSE)


def test_steps_of__by_hand() -> None:
    model = encoder("bat")  # 2,560 samples a step
    assert [suites.steps_of(n, model) for n in (1, 2560, 2561, 5120, 16000)] == [1, 1, 2, 2, 7]


@torch.no_grad()
def test_embed__a_long_recording_is_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "PIECE_SECONDS", 1.0)
    model = encoder("steps")
    wave = clip(2.51)  # 126 steps of 320 samples: three pieces of 42
    (made,) = suites.embed(model, [wave])
    pieces = [wave[:13440], wave[13440:26880], wave[26880:]]
    alone = [model(piece).patches[0, 0, :, 0] for piece in pieces]  # (42, D) each
    torch.testing.assert_close(made.frames[0], torch.cat(alone), **CLOSE)
    torch.testing.assert_close(made.clip, torch.stack(alone).mean((0, 1)), **CLOSE)


@torch.no_grad()
def test_embed__no_call_holds_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes, and many clips at once: memory is bounded, whatever the number and length."""
    model, seconds = encoder("odd"), []  # 8 steps a second
    whole = model.forward

    def forward(waves: torch.Tensor, lengths: torch.Tensor) -> Features:
        seconds.append(waves.numel() / 8000)
        return whole(waves, lengths)

    monkeypatch.setattr(model, "forward", forward)
    (made,) = suites.embed(model, [clip(600, 8000)])
    assert made.frames.shape == (1, 4800, 16)
    assert made.frames.isfinite().all()
    assert seconds == [240, 240, 120]
    suites.embed(model, [clip(40 + i, 8000) for i in range(10)])
    assert seconds[3:] == [4 * 49, 5 * 45, 40]


def test_check_clips__all_problems_by_name() -> None:
    good = clip(0.1)
    bad = [good, good[:0], torch.zeros(2, 50), good.new_full((3,), torch.nan), torch.ones(9).int()]
    with pytest.raises(UserError) as error:
        suites.check_clips(bad)
    for part in ("clip 1 has no", r"(2, 50)", "clip 3 holds NaN", "clip 4 is torch.int32"):
        assert part in str(error.value)
    assert "clip 0" not in str(error.value)


def test_rows_of__zeros_behind_a_clip_are_padding() -> None:
    rows = suites.rows_of(torch.tensor([[0.0, 1, 0, 2], [0, 3, 0, 0], [0, 0, 0, 0]]))
    assert [row.tolist() for row in rows] == [[0, 1, 0, 2], [0, 3], [0]]


def test_load_named__changes_with_weights_and_place(tmp_path: Path) -> None:
    one = suites.load_named(saved("bat", tmp_path / "My run-1" / "export"))[1]
    other = suites.load_named(saved("bat 32k", tmp_path / "2nd" / "fold-3" / "export"))[1]
    assert one[:-8] == "my_run_1_"
    assert other[:-8] == "bat_2nd_fold_3_"
    assert one[-8:] != other[-8:]  # the same weights with another front end
    assert suites.load_named(str(tmp_path / "My run-1"))[1] == one
    model = bat.load_encoder(tmp_path / "My run-1")
    state = {n: 2 * t for n, t in model.state_dict().items() if n != "pos_embed"}
    state["pos_embed"] = model.pos_embed
    export(
        tmp_path / "My run-1" / "export",
        backbone="bat",
        encoder=model.config(),
        weights={"student": state},
        meta={},
    )
    again = suites.load_named(str(tmp_path / "My run-1"))[1]
    assert again[:-8] == one[:-8]
    assert again != one


def test_source_of__is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert suites.source_of("run") == str(tmp_path / "run")
    assert suites.source_of("bat:run") == f"bat:{tmp_path / 'run'}"
    assert suites.source_of("hub:org/name") == "hub:org/name"
