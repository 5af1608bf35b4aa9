"""Settings for the conversion of rows of a source to clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from bat.audio.decode import RATES_HZ
from bat.audio.encode import OPUS_RATES_HZ
from bat.errors import UserError

Codec = Literal["keep", "flac", "opus", "wav", "ogg"]
Channels = Literal["mono", "keep"]


@dataclass(frozen=True)
class Recipe:
    """The conversion of each row; the fields are arguments of ``write_shards``."""

    codec: Codec = "keep"
    sample_rate: int | None = None
    channels: Channels | None = None
    clip_seconds: float | None = None
    min_seconds: float | None = None

    def check(self) -> None:
        """Raise a UserError for settings that no clip could satisfy."""
        if self.codec not in get_args(Codec):
            raise UserError(f"codec {self.codec!r}: one of {', '.join(get_args(Codec))}")
        if self.channels not in (None, *get_args(Channels)):
            raise UserError(f"channels {self.channels!r}: mono or keep")
        rate, low, high = self.sample_rate, *RATES_HZ
        if rate is not None and not low <= rate <= high:
            raise UserError(f"sample_rate={rate}: in Hz, {low} to {high}")
        if self.codec == "opus" and rate is not None and rate not in OPUS_RATES_HZ:
            raise UserError(f"Opus has no {rate} Hz: one of {', '.join(map(str, OPUS_RATES_HZ))}")
        clip, least = self.clip_seconds, self.min_seconds
        if clip is not None and not 0.01 <= clip < math.inf:
            raise UserError(f"clip_seconds={clip}: 0.01 or more")
        if least is not None and not 0 <= least < math.inf:
            raise UserError(f"min_seconds={least}: zero or more")
        if clip is not None and least is not None and least > clip:
            raise UserError(
                f"min_seconds={least} is more than clip_seconds={clip}: nothing is left"
            )

    @property
    def shortest_rest(self) -> float:
        """Shortest duration of the last piece of a recording, in seconds."""
        assert self.clip_seconds is not None
        return self.clip_seconds / 2 if self.min_seconds is None else self.min_seconds
