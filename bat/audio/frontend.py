"""Waveform to log-mel spectrogram, batched, on the device, differentiable (docs/method.md 1).

``LogMel`` is the paper's "reworked fbank": power mel, decibels with a floor 80 dB under the clip's
own maximum, min-max of the clip to [0, 1]; no data-set statistics. ``KaldiFbank`` is the front end
of EAT, SSLAM, BEATs, AudioMAE and AST, standardised with the data set's statistics, needed to probe
them fairly; ``LnMel`` is M2D's and ``DbMel`` Dasheng's.

Rows of a batch may be clips of different length, zero-padded on the right, with ``lengths``.
**The spectrogram of a clip depends on that clip alone**. Reflections are taken at each
row's own end by index arithmetic, floor, minimum and maximum run over its own frames, and frames
beyond them are zero. Samples beyond ``lengths`` are never used.

Two settings select behaviour that differs among published pipelines:

* ``pad``: a clip too short for ``frames`` frames gets zero frames (``spectrogram``, as the paper's
  pre-training; ``fbank``: before standardising, so that they hold ``-mean / (2 std)``, as EAT,
  SSLAM, AudioMAE and AST were trained; Kaldi front ends only), or zero samples that count as
  signal, up to ``(frames - 1) * hop_length`` (``waveform``) or up to ``clip_seconds``, then zero
  frames (``clip``, as the paper's supervised tasks; for AudioSet the two are the same: 163,680
  samples, 1024 frames). The legacy front ends take the mean of the unpadded clip off;
* ``crop``: a clip too long is cut to the longest that has ``frames`` frames before anything is
  computed (``waveform``), or loses its last frames at the end (``spectrogram``, the paper's: the
  dropped part still sets floor and range).

Everything is float32, whatever the autocast state or the precision that the module was cast to
(``.double()`` is honoured: tests use it). One choice is left to the user: with
``torch.set_float32_matmul_precision("high")`` CUDA does the mel product in TF32, which moves values
of ``LogMel`` by up to 6e-5, 2e-4 for clips of little range (emulated). There is no loop over clips
and no host synchronisation.

Mel banks are torchaudio's, on which the published checkpoints were trained, computed on the CPU.
Kaldi's are computed here in the order of operations of torchaudio (2.11): equal to the last bit on
the same machine (its own function reads a value of the bank, which meta tensors do not have).
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.errors import UserError

Pad = Literal["spectrogram", "waveform", "clip", "fbank"]
Crop = Literal["waveform", "spectrogram"]
Samples = TypeVar("Samples", int, Tensor)

STATISTICS: dict[str, dict[str, tuple[float, float]]] = {
    "eat": {
        "audioset": (-4.59864076, 4.357353477),
        "speechcommands": (-9.03415996, 4.57304508),
        "esc50": (-6.85408831, 5.39770323),
        "librispeech": (-7.32925959, 4.06100490),
        "hsn": (-8.55048120, 4.04533479),
        "dcase16": (-10.68592022, 2.06164972),
        "audioset-eat": (-4.268, 4.569),
        "esc50-eat": (-6.627, 5.359),
        "speechcommands-eat": (-6.846, 5.565),
        "audioset-ast": (-4.2677393, 4.5689974),
        "speechcommands-ast": (-6.845978, 5.5654526),
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
"""Mean and deviation of the log filter bank by front end and data set (docs/method.md 1): those of
BAT's authors, ``-eat`` those of EAT's and SSLAM's, ``-ast`` those of AST's and AudioMAE's."""


class FrontEnd(nn.Module, abc.ABC):
    """Base of the front ends: the call, cropping and padding, the float32 tables.

    Attributes:
        sample_rate: Hz the waveform must have.
        hop_length: samples from frame to frame.
        n_mels: mel bands.
        clip_samples: samples that ``pad="clip"`` pads to, else 0.
        fill: value of the frames beyond a clip, 0 unless ``pad="fbank"``.
    """

    fill = 0.0

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        hop_length: int,
        n_mels: int,
        pad: Pad,
        crop: Crop,
        clip_seconds: float | None,
    ) -> None:
        super().__init__()
        for name, value, known in (("pad", pad, Pad), ("crop", crop, Crop)):
            if value not in get_args(known):
                raise UserError(f"{name}={value!r}: one of {', '.join(get_args(known))}")
        if (pad == "clip") != (clip_seconds is not None):
            raise UserError(
                f"pad={pad!r} with clip_seconds={clip_seconds}: pad='clip' pads to clip_seconds, "
                "and nothing else uses them"
            )
        if clip_seconds is not None and not 0 < clip_seconds < math.inf:
            raise UserError(f"clip_seconds={clip_seconds}: a positive number of seconds")
        sizes = {"sample_rate": sample_rate, "hop_length": hop_length, "n_mels": n_mels}
        for name, number in sizes.items():
            if number < 1:
                raise UserError(f"{name}={number}: at least 1")
        self.sample_rate = sample_rate
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.pad = pad
        self.crop = crop
        self.clip_samples = round((clip_seconds or 0) * sample_rate)

    def forward(
        self,
        waveform: Tensor,
        frames: int,
        lengths: Tensor | None = None,
        *,
        row_frames: Tensor | None = None,
    ) -> Tensor:
        """Returns the batch as spectrograms of ``frames`` frames.

        Args:
            waveform: (B, S) floating point in [-1, 1] at ``sample_rate``.
            frames: time frames of the result.
            lengths: (B,) integer, valid samples of each row (0 counts as 1); None: all S.
            row_frames: (B,) integer, at most ``frames``: the value of ``frames`` if each row were
                computed alone (``pad="waveform"`` pads to it); None: ``frames``.

        Returns:
            (B, 1, frames, n_mels) float32, ``fill`` beyond each clip's valid frames.

        Raises:
            UserError: a waveform that is not (B, S) floating point, ``frames`` below 1, ``lengths``
                that are not (B,).
        """
        if waveform.ndim != 2 or waveform.shape[1] < 1:
            raise UserError(f"waveform of shape {tuple(waveform.shape)}: give (clips, samples)")
        if not waveform.is_floating_point():
            raise UserError(f"waveform of {waveform.dtype}: give floating point in [-1, 1]")
        if frames < 1:
            raise UserError(f"frames={frames}: at least 1")
        if lengths is not None and lengths.shape != waveform.shape[:1]:
            raise UserError(f"lengths of shape {tuple(lengths.shape)} for {len(waveform)} clips")

        with torch.autocast(waveform.device.type, enabled=False):
            x = waveform.to(self.window.dtype)  # (B, S)
            most = self.max_samples(frames)
            if self.crop == "waveform" and x.shape[1] > most:
                x = x[:, :most]
            if lengths is None:
                valid = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
            else:
                valid = lengths.to(x.device, torch.int64).clamp(1, x.shape[1])  # (B,)
                x = _zero_beyond(x, valid)
            x = self._centre(x, valid)
            if self.pad == "waveform":
                x, full = _extend(x, valid, (frames - 1) * self.hop_length)
                if row_frames is not None:
                    own = (row_frames.to(x.device, torch.int64) - 1) * self.hop_length
                    full = torch.maximum(valid, own)
                valid = full
            elif self.pad == "clip":
                fits = self.clip_samples if self.crop == "spectrogram" else most
                x, valid = _extend(x, valid, min(self.clip_samples, fits))
            x, shown = self._transform(x, valid)  # (B, T, F), (B, T, 1)
            x = x.masked_fill(~shown, self.fill)
            # crops where frames are too many, appends some where too few
            x = F.pad(x, (0, 0, 0, frames - x.shape[1]), value=self.fill)
            return x.unsqueeze(1)  # (B, 1, frames, F)

    @abc.abstractmethod
    def valid_frames(self, lengths: Samples) -> Samples:
        """Returns the frames of clips of ``lengths`` samples, before any cropping or padding."""

    @abc.abstractmethod
    def max_samples(self, frames: int) -> int:
        """Returns the samples beyond which a clip would have more than ``frames`` frames."""

    def padded_samples(self, lengths: Samples) -> Samples:
        """Returns the signal samples of clips of ``lengths`` samples after ``pad="clip"`` has
        padded them; else ``lengths``."""
        return at_least(lengths, self.clip_samples)

    @abc.abstractmethod
    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns window and filter bank, float32."""

    @abc.abstractmethod
    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms (B, S) to all frames (B, T, F), and a mask of the valid ones (B, T, 1)
        bool."""

    def _centre(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x

    def _shown(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        return (steps < self.valid_frames(lengths)[:, None]).unsqueeze(-1)  # (B, T, 1)

    def _make_tables(self, device: torch.device | None = None) -> None:
        window, filters = self._tables(device or torch.get_default_device())
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrontEnd:
        # casting a model to bfloat16 must not round the tables, and leaving the meta device must
        # not leave them empty (they are in no state dict that could fill them)
        stale = self.window.is_meta
        super()._apply(fn, recurse)
        stale = stale or self.window.dtype not in (torch.float32, torch.float64)
        if stale and not self.window.is_meta:
            self._make_tables(self.window.device)
        return self


class PowerMel(FrontEnd):
    """Base of front ends of a power mel spectrogram; a subclass scales it.

    Centred frames with reflect padding: ``1 + floor(samples / hop)``, periodic Hann window of
    ``n_fft``. Clips too short for one reflection (``samples <= n_fft / 2``, where PyTorch's own
    padding raises) are reflected again and again, as ``numpy.pad`` does; a single sample is
    repeated.

    Args:
        f_min: lowest frequency of the bank in Hz; the highest is sample_rate / 2.
        slaney: Slaney's mel scale and triangles of equal area (librosa's default), else HTK's
            scale and triangles of height 1.
    """

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 160,
        n_mels: int = 128,
        f_min: float = 0.0,
        slaney: bool = False,
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
        if pad == "fbank":
            raise UserError(f"pad='fbank': only for a Kaldi filter bank, not {type(self).__name__}")
        self.n_fft, self.f_min, self.slaney = n_fft, f_min, slaney
        self._make_tables()

    def valid_frames(self, lengths: Samples) -> Samples:
        return 1 + lengths // self.hop_length

    def max_samples(self, frames: int) -> int:
        return frames * self.hop_length - 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        window = torch.hann_window(self.n_fft, device=device, dtype=torch.float32)
        bank = mel_bank(
            self.sample_rate, self.n_fft, self.n_mels, f_min=self.f_min, slaney=self.slaney
        )
        return window, bank.to(device, copy=True)

    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self._reflect(x, lengths)  # (B, S + n_fft)
        spectrum = torch.stft(
            x, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
        )  # (B, bins, T)
        mel = _power(spectrum).transpose(1, 2) @ self.filters  # (B, T, F)
        shown = self._shown(mel, lengths)
        return self._scale(mel, shown), shown

    @abc.abstractmethod
    def _scale(self, mel: Tensor, shown: Tensor) -> Tensor:
        """Scales power (B, T, F); frames that are not ``shown`` (B, T, 1) must have no effect."""

    def _reflect(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns n_fft / 2 mirrored samples before each row and after its own last sample."""
        half = self.n_fft // 2
        steps = torch.arange(half, device=x.device)
        ends = lengths[:, None]  # (B, 1)
        before = x.gather(1, _mirror(steps - half, ends))  # (B, half)
        behind = x.gather(1, _mirror(ends + steps, ends))
        padded = torch.cat([before, F.pad(x, (0, half))], dim=1)  # (B, S + n_fft)
        return padded.scatter(1, half + ends + steps, behind)


class DbMel(PowerMel):
    """Decibels of the power mel, not below ``TOP_DB`` under the clip's maximum: (B, S) -> (B, 1,
    frames, n_mels). Dasheng's: ``n_fft=512, n_mels=64``.

    Departure from torchaudio on a batch, whose floor is that of the batch's maximum.
    """

    TOP_DB = 120.0
    LEAST_POWER = 1e-10

    def _scale(self, mel: Tensor, shown: Tensor) -> Tensor:
        db = 10.0 * mel.clamp(min=self.LEAST_POWER).log10()
        high = db.masked_fill(~shown, -torch.inf).amax((1, 2), keepdim=True)  # (B, 1, 1)
        return torch.maximum(db, high - self.TOP_DB)


class LogMel(DbMel):
    """BAT's front end: (B, S) -> (B, 1, frames, n_mels) in [0, 1], each clip by its own range.

    Silence gives zeros. HSN uses ``sample_rate=32000, n_fft=2048, hop_length=320``.
    """

    TOP_DB = 80.0

    def _scale(self, mel: Tensor, shown: Tensor) -> Tensor:
        db = super()._scale(mel, shown)
        high = db.masked_fill(~shown, -torch.inf).amax((1, 2), keepdim=True)  # (B, 1, 1)
        low = db.masked_fill(~shown, torch.inf).amin((1, 2), keepdim=True)
        return (db - low) / (high - low + 1e-8)


class LnMel(PowerMel):
    """``(ln(x + 2^-23) - mean) / std`` of the power mel x: (B, S) -> (B, 1, frames, n_mels).

    M2D's: ``n_fft=400, n_mels=80, f_min=50, slaney=True`` and the weight file's statistics.
    """

    LEAST_POWER = 2.0**-23

    def __init__(self, *, mean: float, std: float, **mel: Any) -> None:
        super().__init__(**mel)
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise UserError(f"mean={mean}, std={std}: finite numbers, std above 0")
        self.mean, self.std = mean, std

    def _scale(self, mel: Tensor, shown: Tensor) -> Tensor:
        return ((mel + self.LEAST_POWER).log() - self.mean) / self.std


class KaldiFbank(FrontEnd):
    """Kaldi's log filter bank as EAT/SSLAM and BEATs use it: (B, S) -> (B, 1, frames, n_mels).

    25 ms windows every 10 ms, complete ones only; each: mean removed, pre-emphasis 0.97, window,
    power spectrum, mel bands, ``ln(max(., 2^-23))``; then ``(x - mean) / (2 std)``; frames beyond
    the clip are zero *after* that (``pad="fbank"``: before it). ``eat``: the clip's mean removed
    first, symmetric Hann window. ``beats``: samples times 2^15, "povey" window (Hann to the power
    0.85).

    Departure: a clip shorter than one window, for which Kaldi gives no frame, is padded with zeros
    to one window.

    Args:
        kind: ``eat`` (SSLAM, AudioMAE and AST too) or ``beats``.
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
        if pad == "fbank":
            self.fill = -self.mean / (2.0 * self.std)
        self.window_length = sample_rate * 25 // 1000
        self.n_fft = 2 ** (self.window_length - 1).bit_length()
        self._make_tables()

    def valid_frames(self, lengths: Samples) -> Samples:
        return 1 + at_least(lengths - self.window_length, 0) // self.hop_length

    def max_samples(self, frames: int) -> int:
        return self.window_length + frames * self.hop_length - 1

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        window = torch.hann_window(
            self.window_length, periodic=False, device=device, dtype=torch.float32
        )
        bank = kaldi_bank(self.sample_rate, self.n_fft, self.n_mels, device)
        return window if self.kind == "eat" else window.pow(0.85), bank

    def _centre(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "beats":
            return x * 2.0**15
        mean = x.sum(1) / lengths  # (B,); samples beyond the clip are zero
        return _zero_beyond(x - mean[:, None], lengths)

    def _transform(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = _extend(x, lengths, self.window_length)
        x = x.unfold(1, self.window_length, self.hop_length)  # (B, T, window)
        x = x - x.mean(-1, keepdim=True)
        x = x - self.PRE_EMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(x * self.window, n=self.n_fft)  # (B, T, bins)
        mel = (_power(spectrum) @ self.filters).clamp(min=self.LEAST_POWER).log()  # (B, T, F)
        return (mel - self.mean) / (2.0 * self.std), self._shown(mel, lengths)


@functools.lru_cache(maxsize=8)
def mel_bank(
    sample_rate: int, n_fft: int, n_mels: int, *, f_min: float = 0.0, slaney: bool = False
) -> Tensor:
    """Returns torchaudio's triangles from ``f_min`` to sample_rate / 2, on the CPU: of height 1 on
    the scale ``2595 log10(1 + f / 700)``, or ``slaney``'s scale and equal areas.

    Kept, since torchaudio reads a value, which fake tensors do not have: a front end built before
    (on any device) can then be built anew among them.

    Returns:
        (n_fft / 2 + 1, n_mels) float32, not to be written to.
    """
    from torchaudio.functional import melscale_fbanks  # not at the top: it takes a while

    style = ("slaney", "slaney") if slaney else (None, "htk")
    with torch.device("cpu"):
        bank: Tensor = melscale_fbanks(
            n_fft // 2 + 1, f_min, sample_rate / 2, n_mels, sample_rate, *style
        )
    return bank


def kaldi_bank(sample_rate: int, n_fft: int, n_mels: int, device: torch.device) -> Tensor:
    """Returns triangles, straight on the mel axis ``1127 ln(1 + f / 700)``, from 20 Hz to sr / 2.

    Kaldi leaves the bin at sr / 2 out: its row is zero.

    Returns:
        (n_fft / 2 + 1, n_mels) float32.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (20.0, sample_rate / 2))
    step = (high - low) / (n_mels + 1)
    index = torch.arange(n_mels, device=device)[:, None]
    left, centre, right = (low + (index + k) * step for k in (0.0, 1.0, 2.0))  # (n_mels, 1)
    hz = (sample_rate / n_fft) * torch.arange(n_fft // 2, device=device)
    mel = (1127.0 * (1.0 + hz / 700.0).log())[None, :]  # (1, n_fft / 2)
    rising = (mel - left) / (centre - left)
    falling = (right - mel) / (right - centre)
    bank = torch.minimum(rising, falling).clamp(min=0.0)  # (n_mels, n_fft / 2)
    return F.pad(bank, (0, 1)).T.contiguous()


def at_least(x: Samples, least: int) -> Samples:
    """Returns ``x``, raised to ``least``; also while a graph is exported (symbolic sizes)."""
    if isinstance(x, Tensor):
        return x.clamp(min=least)
    return torch.sym_max(x, least) if isinstance(x, torch.SymInt) else max(x, least)


def _zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(beyond, 0.0)  # (B, S)


def _extend(x: Tensor, lengths: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Pads clips shorter than ``samples`` with zeros up to there, which count as signal."""
    return F.pad(x, (0, max(0, samples - x.shape[1]))), lengths.clamp(min=samples)


def _power(spectrum: Tensor) -> Tensor:
    """Computes the squared magnitude without ``abs()``: no root to differentiate, no sum over
    two."""
    return spectrum.real.square() + spectrum.imag.square()


def _mirror(position: Tensor, lengths: Tensor) -> Tensor:
    """Maps positions into a clip by reflection at 0 and at ``lengths - 1``, as often as needed."""
    period = (2 * (lengths - 1)).clamp(min=1)  # of a single sample: always that sample
    position = position.remainder(period)
    return torch.minimum(position, period - position)
