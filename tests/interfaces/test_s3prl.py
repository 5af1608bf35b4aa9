"""The s3prl interface by its written contract (UpstreamExpert, hubconf)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.interfaces import export
from bat.interfaces.s3prl import Upstream
from tests.interfaces.suite_encoders import (
    CLOSE,
    KINDS,
    SECONDS,
    clip,
    encoder,
    import_file,
    saved,
)

RATES = {"bat": 2560, "bat 32k": 2560, "steps": 320, "odd": 2000, "uneven": 2540}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_s3prl__states_of_all_blocks(kind: str, tmp_path: Path) -> None:
    made, own = Upstream(saved(kind, tmp_path)), encoder(kind)
    assert made.get_downsample_rates("hidden_states") == RATES[kind]
    clips = [clip(s) for s in SECONDS]
    found = made(clips)
    states = found["hidden_states"]
    assert [tuple(s.shape) for s in states] == [
        (3, -(-80000 // RATES[kind]), own.width)
    ] * own.depth
    assert found["last_hidden_state"] is states[-1]
    for row, wave in enumerate(clips):
        T = -(-len(wave) // RATES[kind])
        for state, alone in zip(states, made([wave])["hidden_states"], strict=True):
            torch.testing.assert_close(state[row, :T], alone[0], **CLOSE)
            assert not state[row, T:].any()
    if own.sample_rate == 16000:
        wanted = own(clips[1]).patches[:, 0].mean(2)
        for state, block in zip(states, wanted, strict=True):
            torch.testing.assert_close(state[1, : len(block)], block, **CLOSE)


@pytest.mark.parametrize("samples", [800, 2559, 2560, 2561, 5120, 25600])
@torch.no_grad()
def test_s3prl__the_length_check_holds(samples: int, tmp_path: Path) -> None:
    """s3prl wants ``len(range(0, samples, rate))`` time steps."""
    made = Upstream(saved("bat", tmp_path))
    states = made([clip(samples / 16000)])["hidden_states"]
    assert {s.shape[1] for s in states} == {len(range(0, samples, 2560))}


@torch.no_grad()
def test_s3prl__a_rounded_rate_does_not_drift(tmp_path: Path) -> None:
    made = Upstream(saved("brief", tmp_path))  # 72.56 samples at 16 kHz, 73 in s3prl
    made.encoder.block = torch.nn.Identity()
    wave = 1e-3 * clip(5.0)
    quiet = made([wave])["last_hidden_state"][0]
    wave[64_000] = 1.0
    loud = made([wave])["last_hidden_state"][0]
    (changed,) = (loud - quiet).abs().amax(-1).topk(1).indices.tolist()
    assert changed == 877  # centre 64,057.5, within the encoder's patch 882 (64,000 to 64,072)


@torch.no_grad()
def test_s3prl__a_last_step_without_a_patch_repeats_the_one_before(tmp_path: Path) -> None:
    made = Upstream(saved("uneven", tmp_path))
    state = made([clip(25_402 / 16_000)])["last_hidden_state"][0]
    assert len(state) == 11  # ceil(25,402 / 2,540), and ten patches of 2,540.4
    assert torch.equal(state[10], state[9])


def test_s3prl__gradients_reach_the_encoder(tmp_path: Path) -> None:
    made = Upstream(saved("bat", tmp_path))
    made([clip(0.3).requires_grad_(), clip(1.0)])["last_hidden_state"].square().sum().backward()
    assert made.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


def test_s3prl__bad_clips_are_named(tmp_path: Path) -> None:
    made, good = Upstream(saved("steps", tmp_path)), clip(0.1)
    cases = {
        "clip 1 has the shape (2, 1600)": good.expand(2, -1),
        "clip 1 has the shape (1, 1, 1600)": good.expand(1, 1, -1),
        "clip 1 holds NaN": good * torch.nan,
        "clip 1 has no samples": good[:0],
    }
    for said, wave in cases.items():
        with pytest.raises(UserError) as error:
            made([good, wave])
        assert said in str(error.value)
    with pytest.raises(UserError, match="ckpt"):
        Upstream()


def test_export__writes_expert_and_hubconf(tmp_path: Path) -> None:
    checkpoint = saved("bat", tmp_path / "run")
    out = export("s3prl", checkpoint, tmp_path / "out")
    hubconf, expert = import_file(out / "hubconf.py"), import_file(out / "expert.py")
    (entry,) = (name for name in dir(hubconf) if not name.startswith("_"))
    assert entry.startswith("run_")
    wanted = Upstream(checkpoint)([clip(0.5)])["last_hidden_state"]
    for made in (
        getattr(hubconf, entry)(refresh=True),
        getattr(hubconf, entry)(ckpt=checkpoint, model_config=None),
        expert.UpstreamExpert(),
    ):
        torch.testing.assert_close(made([clip(0.5)])["last_hidden_state"], wanted)
