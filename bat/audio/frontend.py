"""Waveform to log-mel spectrogram, batched, on the device, differentiable (docs/method.md 1).

``LogMel`` is the paper's "reworked fbank": power mel, decibels with a floor 80 dB under the clip's
own maximum, min-max of the clip to [0, 1]; no data-set statistics. ``KaldiFbank`` is the front end
of EAT, SSLAM and BEATs, standardised with the data set's statistics, needed to probe them fairly.

Rows of a batch may be clips of different length, zero-padded on the right, with ``lengths``.
**The spectrogram of a clip depends on that clip alone**. Reflections are taken at each
row's own end by index arithmetic, floor, minimum and maximum run over its own frames, and frames
beyond them are zero. Samples beyond ``lengths`` are never used.

Two settings select behaviour that differs among the paper's own pipelines:

* ``pad``: a clip too short for ``frames`` frames gets zero frames (``spectrogram``, as the paper's
  pre-training), or zero samples that count as signal, up to ``(frames - 1) * hop_length``
  (``waveform``) or up to ``clip_seconds``, then zero frames (``clip``, as the paper's supervised
  tasks; for AudioSet the two are the same: 163,680 samples, 1024 frames). The legacy front ends
  take the mean of the unpadded clip off;
* ``crop``: a clip too long is cut to the longest that has ``frames`` frames before anything is
  computed (``waveform``), or loses its last frames at the end (``spectrogram``, the paper's: the
  dropped part still sets floor and range).

Everything is float32, whatever the autocast state or the precision that the module was cast to
(``.double()`` is honoured: tests use it). One choice is left to the user: with
``torch.set_float32_matmul_precision("high")`` CUDA does the mel product in TF32, which moves values
of ``LogMel`` by up to 6e-5, 2e-4 for clips of little range (emulated). There is no loop over clips
and no host synchronisation.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bat.audio.base import Crop, FrontEnd, Pad, extend, zero_beyond
from bat.audio.filters import htk_bank, kaldi_bank
from bat.errors import UserError

STATISTICS: dict[str, dict[str, tuple[float, float]]] = {
    "eat": {
        "audioset": (-4.59864076, 4.357353477),
        "speechcommands": (-9.03415996, 4.57304508),
        "esc50": (-6.85408831, 5.39770323),
        "librispeech": (-7.32925959, 4.06100490),
        "hsn": (-8.55048120, 4.04533479),
        "dcase16": (-10.68592022, 2.06164972),
    },
    "beats": {
        "audioset": (15.41663, 6.55582),
        "speechcommands": (11.42262215, 5.65233194),
        "esc50": (11.72161352, 10.60385933),
        "librispeech": (13.30096596, 4.97074609),
        "hsn": (11.82694931, 5.40055698),
        "dcase16": (10.01597327, 3.07065857),
    },
}
"""Mean and deviation of the log filter bank by front end and data set (docs/method.md 1)."""


class LogMel(FrontEnd):
    """BAT's front end: (B, S) -> (B, 1, frames, n_mels) in [0, 1], each clip by its own range.

    Centred frames with reflect padding: ``1 + floor(samples / hop)``. Clips too short for one
    reflection (``samples <= n_fft / 2``, where PyTorch's own padding raises) are reflected again
    and again, as ``numpy.pad`` does; a single sample is repeated. Silence gives zeros.

    HSN uses ``sample_rate=32000, n_fft=2048, hop_length=320``.
    """

    TOP_DB = 80.0
    LEAST_POWER = 1e-10

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 160,
        n_mels: int = 128,
        pad: Pad = "spectrogram",
        crop: Crop = "waveform",
        clip_seconds: float | None = None,
    ) -> None:
        super().__init__(
            sample_rate=sample_rate,
            hop_length=hop_length,
            n_mels=n_mels,
            pad=pad,
            crop=crop,
            clip_seconds=clip_seconds,
        )
        if n_fft < 2 or n_fft % 2:
            raise UserError(f"n_fft={n_fft}: an even number of samples")
        self.n_fft = n_fft
        self._make_tables()

    def _count(self, lengths: Tensor | int) -> Tensor | int:
        return 1 + lengths // self.hop_length

    def max_samples(self, frames: int) -> int:
        return frames * self.hop_length - 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.hann_window(self.n_fft, device=device, dtype=torch.float32), htk_bank(
            sample_rate=self.sample_rate, n_fft=self.n_fft, n_mels=self.n_mels, device=device
        )

    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self._reflect(x, lengths)  # (B, S + n_fft)
        spectrum = torch.stft(
            x, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
        )  # (B, bins, T)
        mel = _power(spectrum).transpose(1, 2) @ self.filters  # (B, T, F)
        db = 10.0 * mel.clamp(min=self.LEAST_POWER).log10()
        shown = self._shown(db, lengths)
        high = db.masked_fill(~shown, -torch.inf).amax((1, 2), keepdim=True)  # (B, 1, 1)
        db = torch.maximum(db, high - self.TOP_DB)
        low = db.masked_fill(~shown, torch.inf).amin((1, 2), keepdim=True)
        return (db - low) / (high - low + 1e-8), shown

    def _reflect(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns n_fft / 2 mirrored samples before each row and after its own last sample."""
        half = self.n_fft // 2
        steps = torch.arange(half, device=x.device)
        ends = lengths[:, None]  # (B, 1)
        before = x.gather(1, _mirror(steps - half, ends))  # (B, half)
        behind = x.gather(1, _mirror(ends + steps, ends))
        padded = torch.cat([before, F.pad(x, (0, half))], dim=1)  # (B, S + n_fft)
        return padded.scatter(1, half + ends + steps, behind)


class KaldiFbank(FrontEnd):
    """Kaldi's log filter bank as EAT/SSLAM and BEATs use it: (B, S) -> (B, 1, frames, n_mels).

    25 ms windows every 10 ms, complete ones only; each: mean removed, pre-emphasis 0.97, window,
    power spectrum, mel bands, ``ln(max(., 2^-23))``; then ``(x - mean) / (2 std)``; frames beyond
    the clip are zero *after* that. ``eat``: the clip's mean removed first, symmetric Hann window.
    ``beats``: samples times 2^15, "povey" window (Hann to the power 0.85).

    Departure: a clip shorter than one window, for which Kaldi gives no frame, is padded with zeros
    to one window.

    Args:
        kind: ``eat`` (and SSLAM) or ``beats``.
        statistics: a data set of ``STATISTICS[kind]``.
    """

    PRE_EMPHASIS = 0.97
    LEAST_POWER = 2.0**-23

    def __init__(
        self,
        *,
        kind: Literal["eat", "beats"] = "eat",
        statistics: str = "audioset",
        sample_rate: int = 16000,
        n_mels: int = 128,
        pad: Pad = "spectrogram",
        crop: Crop = "waveform",
        clip_seconds: float | None = None,
    ) -> None:
        super().__init__(
            sample_rate=sample_rate,
            hop_length=sample_rate // 100,
            n_mels=n_mels,
            pad=pad,
            crop=crop,
            clip_seconds=clip_seconds,
        )
        if kind not in STATISTICS:
            raise UserError(f"kind={kind!r}: one of {', '.join(STATISTICS)}")
        if statistics not in STATISTICS[kind]:
            known = ", ".join(STATISTICS[kind])
            raise UserError(f"statistics={statistics!r}: none known for it; one of {known}")
        self.kind = kind
        self.statistics = statistics
        self.mean, self.std = STATISTICS[kind][statistics]
        self.window_length = sample_rate * 25 // 1000
        self.n_fft = 2 ** (self.window_length - 1).bit_length()
        self._make_tables()

    def _count(self, lengths: Tensor | int) -> Tensor | int:
        beyond = lengths - self.window_length
        beyond = beyond.clamp(min=0) if isinstance(beyond, Tensor) else max(beyond, 0)
        return 1 + beyond // self.hop_length

    def max_samples(self, frames: int) -> int:
        return self.window_length + frames * self.hop_length - 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        window = torch.hann_window(
            self.window_length, periodic=False, device=device, dtype=torch.float32
        )
        return window if self.kind == "eat" else window.pow(0.85), kaldi_bank(
            sample_rate=self.sample_rate, n_fft=self.n_fft, n_mels=self.n_mels, device=device
        )

    def _centre(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "beats":
            return x * 2.0**15
        mean = x.sum(1) / lengths  # (B,); samples beyond the clip are zero
        return zero_beyond(x - mean[:, None], lengths)

    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = extend(x, lengths, self.window_length)
        x = x.unfold(1, self.window_length, self.hop_length)  # (B, T, window)
        x = x - x.mean(-1, keepdim=True)
        x = x - self.PRE_EMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(x * self.window, n=self.n_fft)  # (B, T, bins)
        mel = (_power(spectrum) @ self.filters).clamp(min=self.LEAST_POWER).log()  # (B, T, F)
        return (mel - self.mean) / (2.0 * self.std), self._shown(mel, lengths)


def _power(spectrum: Tensor) -> Tensor:
    """Computes the squared magnitude without ``abs()``: no root to differentiate, no sum over
    two."""
    return spectrum.real.square() + spectrum.imag.square()


def _mirror(position: Tensor, lengths: Tensor) -> Tensor:
    """Maps positions into a clip by reflection at 0 and at ``lengths - 1``, as often as needed."""
    period = (2 * (lengths - 1)).clamp(min=1)  # of a single sample: always that sample
    position = position.remainder(period)
    return torch.minimum(position, period - position)
