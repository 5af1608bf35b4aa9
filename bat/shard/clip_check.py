"""Checks one clip of a shard; used by ``verify``.

*Corrupt* is a clip that training would skip: each kind of ``DecodeError``. *Silent*: no sample
above -60 dBFS. *Clipped*: in some channel, more than 0.1 % of the samples lie in runs of three or
more at full scale (one such sample is a loud moment, a run is a cut-off top). *Label*: the JSON
contradicts the file or the set: a name or number outside the vocabulary, a length or a rate that is
not the file's.

Clips are decoded a minute at a time at their own rate, so memory does not grow with their length.
The audio's hash is over the decoded samples, mixed to mono: the same sound as FLAC and as WAV, or
under another key, has the same hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from bat.audio.decode import (
    MP3_SLACK_FRAMES,
    AudioInfo,
    DecodeError,
    channel_mean,
    decode_channels,
    probe,
)
from bat.data.clip_json import parse_labels
from bat.shard.pack import decoded

Kind = Literal["shard", "corrupt", "label", "silent", "clipped", "duplicate", "unread"]

PIECE_SECONDS = 60
SILENT_PEAK = 1e-3  # -60 dBFS
FULL_SCALE = 0.9999  # 32767 / 32768, the largest positive sample of 16 bits, is above it
CLIPPED_SHARE = 1e-3
CLIPPED_RUN = 3


@dataclass
class ClipReport:
    """The findings on one clip."""

    problems: list[tuple[Kind, str]] = field(default_factory=list)
    """``[(kind, why), ...]``"""
    seconds: float = 0.0
    audio_hash: int = 0
    """Hash of the samples; 0 if there are none to compare: corrupt or silent."""
    labels: tuple[tuple[str, int], ...] = ()
    """``(name, label_id or -1)``"""


def check_clip(
    data: bytes, meta: Mapping[str, Any], vocabulary: Mapping[str, int] | None
) -> ClipReport:
    """Decode a whole clip and check its JSON against it.

    Args:
        vocabulary: class name -> index; None: the set has no vocabulary to check against.
    """
    report = ClipReport(labels=tuple(parse_labels(dict(meta))))
    problems = report.problems
    problems += [("label", why) for why in label_faults(meta, report.labels, vocabulary)]
    try:
        info = probe(data)
        frames, rate = (_count(meta, name, problems) for name in ("num_samples", "sample_rate"))
        if rate is not None and rate != info.sample_rate:
            why = f"sample_rate {rate} in its JSON, {info.sample_rate} Hz in the file"
            problems.append(("label", why))
            frames = None  # meant for another rate than the file's
        slack = MP3_SLACK_FRAMES if info.codec == "mp3" else 0
        if frames is not None and info.frames > frames + slack:
            why = f"num_samples {frames} in its JSON, {info.frames} in the file"
            problems.append(("label", why))
            frames = None
        peak, clipped, audio_hash = _listen(data, info, frames)
    except DecodeError as error:
        problems.append(("corrupt", f"{error.kind}: {error}"))
        return report
    report.seconds = info.frames / info.sample_rate
    if peak < SILENT_PEAK:
        level = f"{20 * math.log10(peak):.0f} dBFS" if peak else "all zeros"
        problems.append(("silent", f"peak {level}"))
        return report
    report.audio_hash = audio_hash or 1
    if clipped > CLIPPED_SHARE:
        why = f"{100 * clipped:.2f} % of the samples in runs at full scale"
        problems.append(("clipped", why))
    return report


def label_faults(
    meta: Mapping[str, Any],
    labels: tuple[tuple[str, int], ...],
    vocabulary: Mapping[str, int] | None,
) -> list[str]:
    """Returns the faults of the labels of one clip, one sentence each."""
    faults = []
    names, numbers = meta.get("label", meta.get("labels")), meta.get("label_id")
    if isinstance(names, list) and isinstance(numbers, list) and len(names) != len(numbers):
        faults.append(f"{len(names)} in label, but {len(numbers)} in label_id")
    if vocabulary is None:
        return faults
    for name, number in labels:
        if name not in vocabulary:
            faults.append(f"label {name!r} is not in the vocabulary")
        elif number not in (-1, vocabulary[name]):
            faults.append(f"label_id {number} for {name!r}, which is {vocabulary[name]}")
    return faults


def _listen(data: bytes, info: AudioInfo, expected: int | None) -> tuple[float, float, int]:
    """Decodes the whole clip, ``PIECE_SECONDS`` at a time.

    Returns:
        The peak, the share of samples in runs at full scale in the worst channel, and the hash.

    Raises:
        DecodeError: any part of it does not decode.
    """
    peak, digest = 0.0, hashlib.blake2b(digest_size=8)
    clipped = np.zeros(info.channels, np.int64)
    read = partial(decode_channels, sample_rate=info.sample_rate, expected_frames=expected)
    for wave in decoded(data, info, PIECE_SECONDS, read):  # (S, channels)
        peak = max(peak, float(wave.max()), -float(wave.min()))
        clipped += _in_runs(np.abs(wave) >= FULL_SCALE)
        digest.update(np.ascontiguousarray(channel_mean(wave)).tobytes())
    share = float(clipped.max()) / max(1, info.frames)
    return peak, share, int.from_bytes(digest.digest(), "little")


def _in_runs(hot: np.ndarray) -> np.ndarray:
    """Counts the samples in runs of ``CLIPPED_RUN`` or more: (S, channels) bool -> (channels,)."""
    counts = np.zeros(hot.shape[1], np.int64)
    for channel in np.flatnonzero(hot.sum(0) >= CLIPPED_RUN):
        edges = np.flatnonzero(np.diff(hot[:, channel].astype(np.int8), prepend=0, append=0))
        lengths = edges[1::2] - edges[::2]
        counts[channel] = lengths[lengths >= CLIPPED_RUN].sum()
    return counts


def _count(meta: Mapping[str, Any], name: str, problems: list[tuple[Kind, str]]) -> int | None:
    """Returns a count of the JSON, or None; a value that is not a count is a fault."""
    value = meta.get(name)
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1:
        return int(min(value, 2**62))
    problems.append(("label", f"{name} {value!r:.40} in its JSON is no count"))
    return None
