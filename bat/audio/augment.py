"""Augments whole batches on the device (docs/method.md 5).

Mixup, SpecAugment, colour noise, time roll. Every random number is drawn from the given
``torch.Generator``, on the generator's own device (shares of ``mixup``: from its seed, on the CPU):
with one on the GPU no data leave it, with a CPU one the draws are the same on every machine. Each
clip has its own draws, except in ``time_roll``; there is no loop over clips and no host
synchronisation. Random draws and computation are separate: ``mix`` and ``add_noise`` are the
deterministic parts, which the golden vectors cover.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mixup(
    x: Tensor, y: Tensor, *, generator: torch.Generator, p: float = 0.9, alpha: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Mix each clip, with probability ``p``, with its counterpart in the reversed batch.

    The share of the counterpart is drawn from Beta(alpha, alpha), separately for each clip; an odd
    batch's middle clip is its own counterpart and stays unchanged.

    Args:
        x: (B, ...) inputs; the recipes mix spectrograms, after the front end.
        y: (B, C) targets in [0, 1].

    Returns:
        Mixed inputs and targets, of the same shapes.
    """
    assert 0.0 <= p <= 1.0, p
    assert alpha > 0, alpha
    # torch.distributions takes no generator: NumPy draws, from the generator's seed
    drawn = np.random.default_rng(generator.initial_seed()).beta(alpha, alpha, len(x))  # (B,)
    weight = torch.from_numpy(drawn).to(generator.device, non_blocking=True)
    chosen = _uniform(len(x), generator=generator) < p
    return mix(x, y, torch.where(chosen, weight, 0.0).to(x.device, non_blocking=True))


def mix(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(1 - w) x + w reversed(x)``, and the same for the targets, clamped to [0, 1].

    Args:
        x: (B, ...). y: (B, C). weight: (B,) in [0, 1], the share of the reversed batch.
    """

    def blend(values: Tensor) -> Tensor:
        w = weight.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return (1.0 - w) * values + w * values.flip(0)

    return blend(x), blend(y).clamp(0.0, 1.0)


def spec_augment(
    spectrogram: Tensor,
    *,
    generator: torch.Generator,
    freq_width: int,
    time_width: int,
    repeats: int = 1,
) -> Tensor:
    """Set random bands of mels and frames to zero, ``repeats`` of each, for each clip separately.

    Widths are uniform in [0, width) and starts uniform over the places left, both rounded down, as
    torchaudio's ``mask_along_axis_iid``. A width beyond the axis counts as the whole axis; 0
    switches that mask off.

    Args:
        spectrogram: (B, 1, T, F), T frames and F mels.

    Returns:
        (B, 1, T, F), a new tensor.
    """
    assert min(freq_width, time_width, repeats) >= 0
    batch, _, frames, mels = spectrogram.shape
    time = _bands(batch, repeats, frames, time_width, generator)  # (B, T)
    freq = _bands(batch, repeats, mels, freq_width, generator)  # (B, F)
    masked = (time[:, None, :, None] | freq[:, None, None, :]).to(
        spectrogram.device, non_blocking=True
    )
    return spectrogram.masked_fill(masked, 0.0)


def time_roll(
    spectrogram: Tensor, *, generator: torch.Generator, frames: Tensor | None = None
) -> Tensor:
    """Roll all clips of the batch along time by one shift, circularly within each clip's frames.

    The shift is uniform over 0 .. T inclusive, T the most frames that a clip of the batch has.

    Args:
        spectrogram: (B, 1, T, F).
        frames: (B,) each clip's own frames, later frames are unchanged; None: all T.

    Returns:
        (B, 1, T, F), a new tensor.
    """
    batch, _, T, _ = spectrogram.shape
    if frames is None:
        frames = torch.full((batch,), T)
    frames = frames.to(spectrogram.device).clamp(1, T)
    share = _uniform(1, generator=generator).to(spectrogram.device, non_blocking=True)
    shift = (share * (frames.amax() + 1)).long()  # (1,)
    position = torch.arange(T, device=spectrogram.device)
    source = (position - shift).remainder(frames[:, None])  # (B, T)
    source = torch.where(_inside(T, frames), source, position)
    return spectrogram.gather(2, source[:, None, :, None].expand_as(spectrogram))


def colour_noise(
    waves: Tensor,
    *,
    generator: torch.Generator,
    p: float = 0.3,
    beta: tuple[float, float] = (-2.0, 2.0),
    snr_db: tuple[float, float] = (5.0, 25.0),
    lengths: Tensor | None = None,
) -> Tensor:
    """Add noise of a random colour and loudness to each clip with probability ``p``.

    Args:
        waves: (B, S), padding zero.
        beta: range of the exponent: spectrum ``f^(-beta / 2)``, 2 red, 0 white, -2 violet.
        snr_db: range of the signal-to-noise ratio, decibels.
        lengths: (B,) valid samples of each row: the rest stays zero; None: all S.

    Returns:
        (B, S).
    """
    assert 0.0 <= p <= 1.0, p
    batch, samples = waves.shape
    chosen = _uniform(batch, generator=generator) < p
    exponents = beta[0] + (beta[1] - beta[0]) * _uniform(batch, generator=generator)
    ratios = snr_db[0] + (snr_db[1] - snr_db[0]) * _uniform(batch, generator=generator)
    white = torch.randn(batch, samples, generator=generator, device=generator.device)
    chosen, exponents, ratios, white = (
        t.to(waves.device, non_blocking=True) for t in (chosen, exponents, ratios, white)
    )
    noisy = add_noise(waves, white, beta=exponents, snr_db=ratios, lengths=lengths)
    return torch.where(chosen[:, None], noisy, waves)


def add_noise(
    waves: Tensor, white: Tensor, *, beta: Tensor, snr_db: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Add ``white`` noise, coloured by ``f^(-beta / 2)``, at ``snr_db`` under each clip's power.

    Bin k of the noise's spectrum, counted from 1, is divided by ``k^(beta / 2)``. Silence stays
    silent. Powers are means over each clip's valid samples.

    Args:
        waves: (B, S). white: (B, S). beta: (B,). snr_db: (B,), decibels. lengths: (B,) or None.
    """
    samples = waves.shape[1]
    spectrum = torch.fft.rfft(white)  # (B, bins)
    bins = torch.arange(1, spectrum.shape[1] + 1, device=waves.device, dtype=white.dtype)
    shape = bins ** (-beta.to(white.dtype)[:, None] / 2)
    noise = torch.fft.irfft(spectrum * shape, n=samples)  # (B, S)
    valid = torch.full_like(waves[:, :1], samples)  # (B, 1)
    if lengths is not None:
        lengths = lengths.to(waves.device)
        noise = noise.masked_fill(~_inside(samples, lengths), 0.0)
        valid = lengths[:, None].to(waves.dtype)
    with torch.no_grad():  # the scale is a constant: at silence its root has no gradient
        noise_power = noise.square().sum(1, keepdim=True) / valid
        wave_power = waves.square().sum(1, keepdim=True) / valid
        wanted = wave_power / 10.0 ** (snr_db.to(waves.dtype)[:, None] / 10.0)
        scale = (wanted / noise_power.clamp(min=1e-20)).sqrt()
    return waves + noise * scale


def _bands(batch: int, repeats: int, size: int, width: int, generator: torch.Generator) -> Tensor:
    """Returns which of ``size`` places lie in ``repeats`` random bands: (batch, size) bool."""
    draws = _uniform(2, batch, repeats, 1, generator=generator)
    widths = draws[0] * min(width, size)  # (B, repeats, 1)
    starts = (draws[1] * (size - widths)).long()
    places = torch.arange(size, device=generator.device)
    return ((places >= starts) & (places < starts + widths.long())).any(1)


def _inside(samples: int, lengths: Tensor) -> Tensor:
    return torch.arange(samples, device=lengths.device) < lengths[:, None]  # (B, S)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)
