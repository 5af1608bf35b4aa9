"""Takes waveforms in memory as users hold them, and refuses what it would have to guess.

Every clip is mono, (S,), floats in [-1, 1]. torchaudio gives (channels, S) and soundfile
(S, channels), so an array of two rows may be stereo or two clips, and is refused; so is a clip of
several channels, since which of them holds the sound is the user's to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray
from torch import Tensor

from bat.errors import UserError

LOUDEST = 100.0
"""Peak above which samples are taken for unscaled integers."""
FEWEST_SAMPLES = 16
"""Columns of a batch below which it is taken for (S, channels)."""
RATES = (100, 10_000_000)
SHOWN = 10


def waveforms(clips: Any, *, sample_rate: float | None, to_rate: int) -> list[NDArray[np.float32]]:
    """Returns the waveforms (S_i,) at ``to_rate``.

    Args:
        clips: NumPy or torch, on any device: one clip (S,), a batch (B, S), or several clips (S,)
            or (1, S) of any lengths.
        sample_rate: Hz, of all clips.

    Raises:
        UserError: naming every clip that is unsuitable, with the remedy.
    """
    whole = clips if hasattr(clips, "ndim") else None
    given = [clips] if whole is not None and whole.ndim < 2 else list(clips)
    problems = [] if given else ["no clips"]
    if sample_rate is None:
        problems.append(
            "sample_rate is missing: waveforms do not say theirs, as files do; this encoder's is "
            f"{to_rate}, to which others are resampled"
        )
    elif isinstance(sample_rate, bool) or not RATES[0] <= sample_rate <= RATES[1]:
        problems.append(f"sample_rate={sample_rate}: Hz, such as 16000")
    if whole is not None and whole.ndim == 2 and (said := _channels(tuple(whole.shape))):
        problems.append(said)
    else:
        problems += [said for i, clip in enumerate(given) if (said := _problem(i, clip))]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError("; ".join(problems[:SHOWN]) + more)
    assert sample_rate is not None
    waves = [_array(clip).reshape(-1).astype(np.float32, copy=False) for clip in given]
    if sample_rate == to_rate:
        return waves
    return [soxr.resample(wave, sample_rate, to_rate, "HQ") for wave in waves]


def _channels(shape: tuple[int, ...]) -> str:
    """Returns a message if an array of two axes may be one clip of several channels."""
    rows, columns = shape
    if rows == 2 and columns >= FEWEST_SAMPLES:
        return (
            f"shape {shape} may be one clip in stereo or two clips: give x.mean(0) for the mean of "
            "the channels, or list(x) for two clips"
        )
    if columns < FEWEST_SAMPLES < rows:
        return (
            f"shape {shape} looks like (samples, channels): give x.mean(1) for the mean of the "
            "channels, or x.T[i] for one of them; a batch is (clips, samples)"
        )
    return ""


def _problem(number: int, clip: Any) -> str:
    """Returns what is wrong with a clip, empty if nothing is."""
    wave, name = _array(clip), f"clip {number}"
    if isinstance(clip, str) or hasattr(clip, "__fspath__"):
        return f"{name} is a path among waveforms: give paths or waveforms"
    if wave.dtype.kind in "iu" and wave.ndim:
        most = np.iinfo(wave.dtype).max + 1
        return f"{name} has type {wave.dtype}: give floats in [-1, 1] (x / {most})"
    if wave.dtype.kind != "f" or not wave.ndim:
        kind = wave.dtype if wave.ndim else type(clip).__name__
        return f"{name} is a {kind}: give a waveform (S,) of floats in [-1, 1]"
    if wave.ndim > 2 or (wave.ndim == 2 and wave.shape[0] != 1):
        axis = int(wave.shape[0] > wave.shape[-1])
        mean = f": for the mean of its channels give x.mean({axis})" if wave.ndim == 2 else ""
        return f"{name} has shape {wave.shape}, a clip is (S,){mean}"
    if not wave.size:
        return f"{name} has no samples"
    if not np.isfinite(wave).all():
        return f"{name} has samples that are not finite (NaN, inf): mend it or leave it out"
    if (peak := float(np.abs(wave).max())) > LOUDEST:
        return f"{name} has a peak of {peak:.6g}: give floats in [-1, 1] (16-bit: x / 32768)"
    return ""


def _array(clip: Any) -> NDArray[Any]:
    if isinstance(clip, Tensor):
        clip = clip.detach().cpu()
        clip = clip.float() if clip.is_floating_point() else clip
        return np.asarray(clip.numpy())
    return np.asarray(clip)
