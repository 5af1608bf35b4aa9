"""Settings of what is computed: model, front end, data, optimiser.

Rules and precedence are described in ``schema.py``, which combines the sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from bat.ranges import (
    CountOrZero,
    DecayFactor,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
)


@dataclass
class Model:
    """The encoder (docs/method.md 2). Sizes S, B, L and tiny are fragments: ``model=S``."""

    backbone: str = "bat"
    """File in ``bat/encoders`` or a dotted import path."""
    width: PositiveInt = 768
    """Width of the tokens, D."""
    depth: PositiveInt = 12
    """Number of blocks, L."""
    heads: PositiveInt = 12
    """Attention heads; divides ``width``."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of a block's MLP divided by ``width``."""
    patch: PositiveInt = 16
    """Patch side in frames and mel bins."""
    gate: bool = True
    """Gated attention, BAT's; false: EAT's block."""
    norm_order: Literal["post", "pre"] = "post"
    """LayerNorm after the residual sum (``post``, the paper's) or before attention and MLP."""
    pos_layout: Literal["reference", "grid", "eat"] = "reference"
    """Order of the axes in the fixed sin-cos position code; ``reference``: the paper's files,
    ``eat``: EAT's and SSLAM's."""
    drop_path: Rate = 0.0
    """Drop-path rate of the last block; rises linearly from 0 at the first."""
    attention: Literal["auto", "flash", "flash4", "cudnn", "sdpa", "eager"] = "auto"
    """Attention kernel; ``auto``: the fastest that is there and right (docs/performance.md)."""

    def problems(self) -> Iterator[str]:
        if self.width % max(1, self.heads):
            yield (
                f"model.width={self.width} is not a multiple of model.heads={self.heads}; "
                f"try model.heads={max(1, self.width // 64)}"
            )
        if self.width % 4:
            yield f"model.width={self.width} must be a multiple of 4 (sin-cos code)"


@dataclass
class Frontend:
    """Waveform to log-mel (docs/method.md 1)."""

    kind: Literal["bat", "eat", "beats"] = "bat"
    """``bat``: the reworked log-mel; ``eat`` / ``beats``: the legacy Kaldi filter banks."""
    sample_rate: PositiveInt = 16000
    """Sample rate of the waveform."""
    n_fft: PositiveInt = 1024
    """Window and length of the Fourier transform."""
    hop_length: PositiveInt = 160
    """Hop from frame to frame."""
    n_mels: PositiveInt = 128
    """Mel bins, a multiple of the patch."""
    frames: PositiveInt = 1024
    """Frames of one clip, a multiple of the patch: 10 s -> 1024, 5 s -> 512."""
    pad: Literal["spectrogram", "waveform", "clip", "fbank"] = "spectrogram"
    """Padding of short clips; ``clip``: zero samples to ``data.clip_seconds``, then zero
    frames."""
    statistics: str = "audioset"
    """Data set whose mean and deviation the legacy front ends use to standardise."""

    def problems(self) -> Iterator[str]:
        if self.kind == "bat" and self.statistics != "audioset":
            yield (
                f"frontend.statistics={self.statistics} is for the legacy front ends; the BAT one "
                "has none: leave it away, or say frontend.kind=eat"
            )
        if self.kind != "bat" and (self.n_fft, self.hop_length) != (1024, 160):
            yield (
                f"frontend.n_fft={self.n_fft} and hop_length={self.hop_length} are for "
                f"frontend.kind=bat; {self.kind} has windows of 25 ms every 10 ms: leave them away"
            )


@dataclass
class Data:
    """Source of the clips and batch sizes."""

    root: str | None = None
    """Folder of audio in the layout of the task, read in place."""
    csv: str | None = None
    """Custom data, read in place: a CSV with the columns path, label or labels (pre-training:
    optional), and optional split or fold, onset and offset (see ``bat/tasks/own.py``)."""
    shards: list[str] = field(default_factory=list)
    """Folders of shards, globs, ``shard-{00000..00041}.tar``, or URLs of such; one or several."""
    mix: list[float] = field(default_factory=list)
    """Share of each of ``shards`` in the stream; empty: one set, each clip once per epoch."""
    split: str = "auto"
    """Train on the clips of this split, or of several: ``a,b``. ``auto``: ``train``; pre-training
    uses AudioSet's ``train-unbalanced`` if there is no ``train``; ``all``: all clips."""
    labels: Literal["same", "drop", "folders"] = "same"
    """Pre-training. ``drop``: read sets with different labels together, without them; ``folders``:
    with task=folder the names of the folders in ``root`` are classes (otherwise ignored)."""
    cache: str = "runs/shards"
    """Folder of cached file lengths (of ``root`` and ``csv``) and of copies of remote shards."""
    cache_gb: NonNegativeFloat = 100.0
    """Disk space for copies of remote shards; the least recently used are deleted first."""
    retries: PositiveInt = 5
    """Attempts without progress before a remote shard counts as unreachable."""
    timeout_seconds: PositiveFloat = 30.0
    """Time that a server of remote shards may be silent."""
    redirects: list[str] = field(default_factory=list)
    """Hosts that such a server may redirect to, besides itself: ``[cdn.org, "*.cdn.org"]``."""
    shuffle: Literal["auto", "exact", "window", "keyed"] = "auto"
    """``exact``: a uniform permutation of each epoch; ``window``: shards in a random order, clips
    shuffled within a window (slow disks); ``keyed``: a permutation that takes no memory; ``auto``:
    ``window`` if shards are remote, ``exact``, from 8.4 million clips on ``keyed``."""
    window: PositiveInt = 8192
    """Clips per shuffle window."""
    balance: Literal["none", "class", "first_label"] = "none"
    """``class``: clips drawn with inverse class frequency, none twice an epoch (docs/method.md 5);
    ``first_label``: drawn with replacement, weight 1 / clips with the same first label."""
    epoch_clips: PositiveInt | None = None
    """Clips per epoch; null: all, with ``balance=first_label`` as many draws as there are clips."""
    clip_seconds: PositiveFloat = 10.0
    """Length of the clips that files are cut or padded to."""
    windows: bool = False
    """Cut recordings longer than ``clip_seconds`` into windows of that length, each a clip of its
    own: an epoch hears all of every recording. Probing and fine-tuning average the probabilities of
    a recording's windows, or join their outputs in time (events), so that it counts once. false: a
    random crop of each in training, its start where nothing is augmented and in evaluation."""
    batch: PositiveInt = 24
    """Clips per device and micro-batch; the maximum if ``global_batch`` is set."""
    global_batch: PositiveInt | None = None
    """Clips per optimiser step, whatever the number of devices; null: batch x accumulate x
    devices."""
    workers: CountOrZero = 4
    """Loader processes per device; 0 decodes in the training process."""
    roll: bool | None = True
    """Circular roll of each training clip by a random offset; null: where labels are those of whole
    clips (a roll moves clips against events and texts)."""
    noise: NonNegativeFloat = 0.0
    """Deviation of normal noise added to every sample of a training clip, with
    ``pad_offset=random`` of the silence around it too; never to a clip that is evaluated."""
    min_seconds: NonNegativeFloat = 0.0
    """Minimum clip length; shorter clips count as unreadable."""
    max_seconds: PositiveFloat = 3600.0
    """Maximum file length; longer files count as unreadable ("long"), whatever part is used."""
    max_bad: Fraction = 0.05
    """Fraction of unreadable clips above which the run stops."""
    cache_waves_gb: NonNegativeFloat = 0.0
    """Memory for decoded clips, in GB per loader process (small data sets)."""

    def problems(self) -> Iterator[str]:
        given = [n for n in ("root", "csv", "shards") if getattr(self, n)]
        if len(given) > 1:
            yield f"{' and '.join(f'data.{n}' for n in given)} are given: give one of them"
        if self.balance == "class" and self.epoch_clips is None:
            yield "data.balance=class needs data.epoch_clips (the paper's, on AudioSet: 200000)"
        if self.mix and len(self.mix) != len(self.shards):
            yield (
                f"data.mix={list(self.mix)} has {len(self.mix)} weights for {len(self.shards)} "
                "data.shards: give one each"
            )
        if self.mix and self.epoch_clips is not None:
            yield "data.mix and data.epoch_clips exclude one another: leave one away"


@dataclass
class Optim:
    """AdamW with linear warm-up and cosine decay (docs/method.md 3)."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: list[Rate] = field(default_factory=lambda: [0.9, 0.95])
    """The two decay rates of AdamW's moments."""
    eps: NonNegativeFloat = 1e-8
    """Term added to AdamW's denominator."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay, decoupled."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters with weight decay: ``all`` (the paper's pre-training) or ``matrices`` only."""
    layer_decay: DecayFactor = 1.0
    """Factor from one block to the one below it (fine-tuning: 0.75); 1 is off."""
    warmup_steps: CountOrZero = 53_000
    """Steps of linear warm-up from 0."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    clip_norm: PositiveFloat | None = None
    """Maximum global gradient norm; None: no clipping."""

    def notes(self, steps: int) -> list[str]:
        """Returns warnings about these settings for a run of ``steps`` optimiser steps."""
        if self.warmup_steps <= steps:
            return []
        return [
            f"optim.warmup_steps={self.warmup_steps} are more than train.steps={steps}: the full "
            "learning rate is never reached"
        ]

    def problems(self) -> Iterator[str]:
        if len(self.betas) != 2:
            yield f"optim.betas={list(self.betas)} must be two numbers"
        if 0 < self.lr < self.min_lr:
            yield (
                f"optim.min_lr={self.min_lr:g} is above optim.lr={self.lr:g}, which would never be "
                "used: lower it"
            )


@dataclass
class Augment:
    """Augmentation of fine-tuning. ``data.roll`` rolls waves, each by its own offset."""

    time_roll: bool = False
    """One circular shift along time for all spectrograms of a batch."""
    mixup_p: Fraction = 0.0
    """Probability that a clip is mixed with its counterpart in the reversed batch; 0 is off."""
    mixup_alpha: PositiveFloat = 0.8
    """Parameter of the Beta distribution of mixing weights."""
    noise_p: Fraction = 0.0
    """Probability of colour noise, 5 to 25 dB."""
    spec_freq: CountOrZero = 0
    """Frequency masks of SpecAug are 0 to ``spec_freq - 1`` mel bins wide; 0 is off."""
    spec_time: CountOrZero = 0
    """Time masks are 0 to ``spec_time - 1`` frames wide; 0 is off."""
    spec_repeats: PositiveInt = 1
    """Masks of each kind."""

    def problems(self) -> Iterator[str]:
        for name in ("spec_freq", "spec_time"):
            if getattr(self, name) == 1:
                yield (
                    f"augment.{name}=1 masks nothing (widths are below it): say 2 or more, or 0, "
                    "which is off"
                )
        if self.spec_repeats > 1 and not (self.spec_freq or self.spec_time):
            yield (
                f"augment.spec_repeats={self.spec_repeats} with augment.spec_freq=0 and "
                "spec_time=0, which switch SpecAug off: say augment.spec_repeats=1, or give a width"
            )
        if not self.mixup_p and self.mixup_alpha != Augment().mixup_alpha:
            yield (
                f"augment.mixup_alpha={self.mixup_alpha} with augment.mixup_p=0, which switches "
                "mixup off: give augment.mixup_p too, or leave it away"
            )
