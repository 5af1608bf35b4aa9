"""Augmentation: the golden cores, the distributions, the seeds, and what stays untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bat.audio.augment import add_noise, colour_noise, mix, mixup, spec_augment, time_roll


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)) * 0.1


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "losses.npz", allow_pickle=False) as file:
        names = [n for n in file.files if n.startswith(("mixup/", "colour_noise/"))]
        return {name: torch.from_numpy(file[name]) for name in names}


def test_mix__golden(arrays: dict[str, Tensor]) -> None:
    x, y = mix(arrays["mixup/x"], arrays["mixup/y"], arrays["mixup/weight"].flatten())
    torch.testing.assert_close(x, arrays["mixup/x_out_hard0"], rtol=0, atol=1e-6)
    torch.testing.assert_close(y, arrays["mixup/y_out_hard0"], rtol=0, atol=1e-6)


def test_add_noise__golden(arrays: dict[str, Tensor]) -> None:
    get = {key.split("/")[1]: value for key, value in arrays.items()}
    out = add_noise(get["wave"], get["white"], beta=get["decay"][:, 0], snr_db=get["snr_db"][:, 0])
    torch.testing.assert_close(out, get["out"], rtol=0, atol=1e-6)


def test_mix__clamps_targets_and_keeps_dtypes() -> None:
    x, y = noise(2, 3).bfloat16(), torch.tensor([[1.5], [1.0]])
    mixed_x, mixed_y = mix(x, y, torch.tensor([0.0, 1.0]))
    assert mixed_x.dtype == torch.bfloat16
    torch.testing.assert_close(mixed_x, x[[0, 0]])
    assert mixed_y.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("alpha", [0.8, 0.2, 3.0])
def test_mixup__weights_are_beta(alpha: float) -> None:
    clips = 40_000  # x tells each clip's weight: first half 1, second half 0
    x = torch.cat([torch.ones(clips // 2), torch.zeros(clips // 2)])[:, None]
    mixed, _ = mixup(x, x, generator=seeded(), p=1.0, alpha=alpha)
    weight = torch.cat([1 - mixed[: clips // 2], mixed[clips // 2 :]]).double()
    assert weight.mean() == pytest.approx(0.5, abs=0.01)
    assert weight.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.004)
    assert weight.unique().numel() > 0.9 * clips  # every clip draws for itself


def test_mixup__probability_labels_and_seed() -> None:
    x = torch.arange(10_000.0).double()[:, None, None, None].expand(-1, 1, 2, 2)
    y = torch.eye(2)[torch.arange(10_000) % 2]  # reversal pairs the two classes
    mixed, targets = mixup(x, y, generator=seeded(1), p=0.9)
    changed = (mixed != x).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.9, abs=0.01)
    assert targets[~changed].equal(y[~changed])
    torch.testing.assert_close(targets.sum(1), torch.ones(10_000))
    share = (mixed[:, 0, 0, 0] - x[:, 0, 0, 0]) / (x.flip(0) - x)[:, 0, 0, 0]
    torch.testing.assert_close(targets[:, 1], torch.where(y[:, 1] > 0, 1 - share, share).float())
    again, _ = mixup(x, y, generator=seeded(1), p=0.9)
    other, _ = mixup(x, y, generator=seeded(2), p=0.9)
    assert mixed.equal(again)
    assert not mixed.equal(other)
    assert mixup(x, y, generator=seeded(), p=0.0)[0].equal(x)


def test_spec_augment__masks_bands_of_every_clip() -> None:
    out = spec_augment(
        torch.ones(1500, 1, 112, 128), generator=seeded(), freq_width=16, time_width=32
    )
    time, freq = (out == 0).all(3)[:, 0], (out == 0).all(2)[:, 0]  # (B, T), (B, F)
    masked = time[:, :, None] | freq[:, None, :]
    assert (out[:, 0] == 0).equal(masked)  # whole rows and columns, nothing else
    for bands, width in ((time, 32), (freq, 16)):
        edges = torch.nn.functional.pad(bands.int(), (1, 1)).diff().abs().sum(1)
        assert set(edges.tolist()) == {0, 2}  # one band, or a width of 0
        widths = bands.sum(1)
        assert widths.max() == width - 1
        counts = torch.bincount(widths, minlength=width) / 1500  # uniform on 0 .. width - 1
        assert (counts - 1 / width).abs().max() < 5 * (1 / width / 1500) ** 0.5
        assert bands[:, 0].any()
        assert bands.float().argmax(1).unique().numel() > 0.6 * bands.shape[1]


def test_spec_augment__repeats_and_switches() -> None:
    ones = torch.ones(500, 1, 64, 32)
    once = spec_augment(ones, generator=seeded(), freq_width=0, time_width=16)
    assert not (once == 0).all(2).any()  # no mel masked throughout
    twice = spec_augment(ones, generator=seeded(), freq_width=0, time_width=16, repeats=2)
    assert 1.5 < float((twice == 0).sum() / (once == 0).sum()) < 2.0
    none = spec_augment(ones, generator=seeded(), freq_width=8, time_width=8, repeats=0)
    assert none.equal(ones)
    assert ones.all()  # not in place
    wide = spec_augment(ones, generator=seeded(), freq_width=999, time_width=999)
    assert wide.shape == ones.shape


def test_add_noise__level_and_colour() -> None:
    waves, white = noise(3, 16384), noise(3, 16384, seed=1)
    beta, snr = torch.tensor([2.0, 0.0, -2.0]), torch.tensor([5.0, 15.0, 25.0])
    added = (add_noise(waves, white, beta=beta, snr_db=snr) - waves).double()
    ratio = 10 * (waves.square().mean(1) / added.square().mean(1)).log10()
    torch.testing.assert_close(ratio, snr.double(), rtol=0, atol=1e-3)
    power = torch.fft.rfft(added).abs().square()
    low, high = power[:, 100:200].mean(1), power[:, 4000:8000].mean(1)
    slope = (high / low).log10() / np.log10(6000 / 150)  # power goes as f^-beta
    torch.testing.assert_close(slope, -beta.double(), rtol=0, atol=0.25)


def test_add_noise__only_valid_samples_count() -> None:
    waves, white = torch.zeros(2, 8000), noise(2, 8000, seed=1)
    waves[0, :2000], waves[1] = noise(2000), noise(8000)
    lengths, ones = torch.tensor([2000, 8000]), torch.ones(2)
    out = add_noise(waves, white, beta=0 * ones, snr_db=10 * ones, lengths=lengths)
    assert not out[0, 2000:].any()
    added = (out - waves)[0, :2000]
    ratio = 10 * (waves[0, :2000].square().mean() / added.square().mean()).log10()
    assert ratio == pytest.approx(10.0, abs=1e-3)
    plain = add_noise(waves[1:], white[1:], beta=0 * ones[1:], snr_db=10 * ones[1:])
    torch.testing.assert_close(out[1:], plain, rtol=0, atol=1e-6)


def test_colour_noise__silence_stays_silent_and_differentiable() -> None:
    waves = torch.zeros(2, 500).requires_grad_()
    out = colour_noise(waves, generator=seeded(), p=1.0)
    assert not out.any()
    out.sum().backward()
    assert waves.grad is not None
    assert waves.grad.eq(1.0).all()


def test_colour_noise__probability_ranges_and_seed() -> None:
    waves = noise(3000, 256)
    out = colour_noise(waves, generator=seeded(1), p=0.3, snr_db=(5.0, 25.0))
    added = out - waves
    chosen = added.any(1)
    assert chosen.float().mean() == pytest.approx(0.3, abs=0.03)
    ratio = 10 * (waves.square().sum(1) / added.square().sum(1)).log10()[chosen]
    assert ratio.min() > 4.99
    assert ratio.max() < 25.01
    assert ratio.mean() == pytest.approx(15.0, abs=0.7)
    assert out.equal(colour_noise(waves, generator=seeded(1), p=0.3))
    assert not out.equal(colour_noise(waves, generator=seeded(2), p=0.3))
    assert colour_noise(waves, generator=seeded(), p=0.0).equal(waves)


def test_time_roll__one_shift_for_the_batch_within_each_clip_s_frames() -> None:
    x, frames = noise(3, 1, 9, 4), torch.tensor([9, 7, 4])
    shifts = set()
    for seed in range(120):
        out = time_roll(x, generator=seeded(seed), frames=frames)
        shifts |= {s for s in range(10) if all(
            out[row, :, :n].equal(x[row, :, :n].roll(s, 1)) for row, n in enumerate(frames.tolist())
        )}  # fmt: skip
        assert all(out[row, :, n:].equal(x[row, :, n:]) for row, n in enumerate(frames.tolist()))
    assert shifts == set(range(10))  # all 9 frames too: a shift for the shorter clips
    assert time_roll(x, generator=seeded()).equal(
        time_roll(x, generator=seeded(), frames=torch.full((3,), 9))
    )
