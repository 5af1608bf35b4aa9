"""Feature extractor of the Better Audio Transformer (BAT): waveforms to spectrograms.

Each clip is computed alone, then clips are padded with zero frames to the longest; the attention
mask says which time patches are a clip's own. Front ends (``kind``):

* ``bat``: power mel, decibels with a floor 80 dB under the clip's maximum, min-max to [0, 1];
* ``eat``, ``beats``: Kaldi's log filter bank, standardised with ``mean`` and ``std``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

logger = logging.get_logger(__name__)


class BatFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to ``input_values`` (B, 1, frames, mels) and ``attention_mask`` (B, T).

    Args:
        sampling_rate: Hz of the waveforms.
        kind: ``bat``, ``eat`` or ``beats``.
        n_fft, hop_length: window and hop of ``bat`` in samples; the others have 25 and 10 ms.
        pad_mode: ``spectrogram``, short clips get zero frames; ``waveform``, zero samples to the
            last frame; ``clip``, zero samples to ``clip_seconds``, then zero frames.
        patch_size: frames of a time patch.
        frames: cut or pad each clip to this number, and let the encoder attend to all of it (as in
            fine-tuning with a fixed length); None: each clip has its own length.
        mean, std: statistics of ``eat`` and ``beats``.
    """

    model_input_names: ClassVar[list[str]] = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        kind: str = "bat",
        n_fft: int = 1024,
        hop_length: int = 160,
        pad_mode: str = "spectrogram",
        clip_seconds: float | None = None,
        patch_size: int = 16,
        frames: int | None = None,
        mean: float = 0.0,
        std: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        self.kind = kind
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.pad_mode = pad_mode
        self.clip_seconds = clip_seconds
        self.patch_size = patch_size
        self.frames = frames
        self.mean = mean
        self.std = std

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Computes the spectrograms of one clip, (S,), or of a sequence of clips.

        Raises ``ValueError`` for another sampling rate, a clip that is not one channel, is empty or
        holds NaN or infinity, and for whole numbers.
        """
        if sampling_rate is None:
            logger.warning(f"sampling_rate not given: {self.sampling_rate} Hz is assumed")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}: resample to {self.sampling_rate} Hz first"
            )
        clips = [self._spectrogram(clip) for clip in self._clips(raw_speech)]
        own = [len(clip) // self.patch_size for clip in clips]
        T = max(own)
        values = torch.stack([F.pad(c, (0, 0, 0, T * self.patch_size - len(c))) for c in clips])
        mask = torch.arange(T) < torch.tensor(own)[:, None]
        found = {"input_values": values.unsqueeze(1).numpy(), "attention_mask": mask.long().numpy()}
        return BatchFeature(found, tensor_type=return_tensors)

    def _clips(self, given: Any) -> list[Tensor]:
        """Returns the clips as float32 vectors."""
        many = isinstance(given, (list, tuple)) and len(given) > 0 and not np.isscalar(given[0])
        many = many or getattr(given, "ndim", 1) == 2
        rows: Sequence[Any] = given if many else [given]
        arrays = [np.asarray(row) for row in rows]
        for number, array in enumerate(arrays):
            if array.dtype.kind != "f":
                raise ValueError(
                    f"clip {number} is {array.dtype}: give floats in [-1, 1] (int16 / 32768)"
                )
        clips = [torch.as_tensor(array, dtype=torch.float32) for array in arrays]
        for number, clip in enumerate(clips):
            if clip.dim() != 1 or len(clip) == 0:
                raise ValueError(
                    f"clip {number} has the shape {tuple(clip.shape)}: give one channel, (samples,)"
                )
            if not clip.isfinite().all():
                raise ValueError(f"clip {number} holds NaN or infinity")
        return clips

    def _spectrogram(self, x: Tensor) -> Tensor:
        """Maps (S,) to (frames, mels), whole patches."""
        kaldi = self.kind != "bat"
        hop = self.sampling_rate // 100 if kaldi else self.hop_length
        window = self.sampling_rate * 25 // 1000 if kaldi else 0
        clip = round((self.clip_seconds or 0) * self.sampling_rate)
        frames = self.frames
        if frames is None:
            found = 1 + max(max(len(x), clip) - window, 0) // hop
            frames = self.patch_size * -(-found // self.patch_size)
        most = window + frames * hop - 1
        x = x[:most]
        if self.kind == "eat":
            x = x - x.mean()
        elif self.kind == "beats":
            x = x * 2.0**15
        least = {"waveform": (frames - 1) * hop, "clip": min(clip, most)}.get(self.pad_mode, 0)
        x = F.pad(x, (0, max(0, least - len(x), window - len(x))))
        y = self._kaldi(x, window, hop) if kaldi else self._log_mel(x, hop)
        return F.pad(y, (0, 0, 0, frames - len(y)))

    def _log_mel(self, x: Tensor, hop: int) -> Tensor:
        half = self.n_fft // 2
        period = max(1, 2 * (len(x) - 1))
        at = torch.arange(-half, len(x) + half).remainder(period)  # reflected as often as needed
        x = x[torch.minimum(at, period - at)]
        hann = torch.hann_window(self.n_fft)
        spectrum = torch.stft(
            x, self.n_fft, hop, window=hann, center=False, return_complex=True
        )  # (bins, frames)
        power = spectrum.real.square() + spectrum.imag.square()
        bank = htk_bank(self.sampling_rate, self.n_fft, self.feature_size)
        db = 10.0 * (power.T @ bank).clamp(min=1e-10).log10()  # (frames, mels)
        db = torch.maximum(db, db.max() - 80.0)
        return (db - db.min()) / (db.max() - db.min() + 1e-8)

    def _kaldi(self, x: Tensor, window: int, hop: int) -> Tensor:
        x = x.unfold(0, window, hop)  # (frames, window)
        x = x - x.mean(-1, keepdim=True)
        x = x - 0.97 * torch.cat([x[:, :1], x[:, :-1]], dim=1)
        shape = torch.hann_window(window, periodic=False)
        shape = shape if self.kind == "eat" else shape.pow(0.85)
        n_fft = 2 ** (window - 1).bit_length()
        spectrum = torch.fft.rfft(x * shape, n=n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        bank = kaldi_bank(self.sampling_rate, n_fft, self.feature_size)
        return ((power @ bank).clamp(min=2.0**-23).log() - self.mean) / (2.0 * self.std)


@lru_cache(maxsize=4)
def htk_bank(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Returns triangles of height 1 on the mel axis ``2595 log10(1 + f / 700)``: (bins, mels)."""
    nyquist = sample_rate // 2
    bins = torch.linspace(0, nyquist, n_fft // 2 + 1)
    top = 2595.0 * math.log10(1.0 + nyquist / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, n_mels + 2) / 2595.0) - 1.0)
    width = edges[1:] - edges[:-1]
    ahead = edges[None, :] - bins[:, None]
    return torch.minimum(-ahead[:, :-2] / width[:-1], ahead[:, 2:] / width[1:]).clamp(min=0.0)


@lru_cache(maxsize=4)
def kaldi_bank(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Returns Kaldi's triangles, straight on the mel axis ``1127 ln(1 + f / 700)``, from 20 Hz."""
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (20.0, sample_rate / 2))
    step = (high - low) / (n_mels + 1)
    left, centre, right = (
        low + (torch.arange(n_mels)[:, None] + k) * step for k in (0.0, 1.0, 2.0)
    )
    hz = (sample_rate / n_fft) * torch.arange(n_fft // 2)
    mel = (1127.0 * (1.0 + hz / 700.0).log())[None, :]
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    return F.pad(bank.clamp(min=0.0), (0, 1)).T.contiguous()
