"""s3prl (SUPERB): an UpstreamExpert and a hubconf that returns it.

Clips at 16 kHz, one tensor each, give the tokens of all blocks, averaged over frequency:
``{"hidden_states": [(B, T, D)] * L}``, ``T = ceil(samples / rate)`` of the longest clip, where
``rate = get_downsample_rates("hidden_states")``, samples at 16 kHz (2560 for BAT). s3prl stops if
T is twice that, which the last, almost empty patch of a clip of 2,560 samples would cause. A rate
that is no whole number is rounded, and each time step takes the patch at its centre. Time steps
beyond a clip's end are zero. Gradients flow, for fine-tuned upstreams.

Guide: docs/evaluation_suites.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bat
from bat.errors import UserError
from bat.interfaces import suites

SAMPLE_RATE = 16000

EXPERT = '''\
"""s3prl upstream of an encoder of bat; bat must be installed (docs/evaluation_suites.md)."""

from bat.interfaces import s3prl


class UpstreamExpert(s3prl.Upstream):
    checkpoint = {checkpoint!r}
'''
HUBCONF = '''\
"""Entry of s3prl's hub for an encoder of bat; bat must be installed."""

from bat.interfaces.s3prl import Upstream as _Upstream


def {name}(ckpt=None, model_config=None, **kwargs):
    return _Upstream(ckpt or {checkpoint!r}, model_config, **kwargs)
'''


class Upstream(nn.Module):
    """An encoder with s3prl's interface. ``ckpt``: as for ``bat.load_encoder``; default: the
    subclass's ``checkpoint``. ``model_config`` and other keywords of s3prl have no effect."""

    checkpoint: str | None = None

    def __init__(self, ckpt: str | None = None, model_config: Any = None, **_: Any) -> None:
        super().__init__()
        source = ckpt or self.checkpoint
        if source is None:
            raise UserError("ckpt is not given: name a run, an export or a weight file")
        self.encoder = bat.load_encoder(source).eval()
        self.rate = max(1, round(SAMPLE_RATE * self.encoder.hop_seconds))

    def get_downsample_rates(self, key: str) -> int:
        """Returns the samples at 16 kHz from one time step to the next, for any ``key``."""
        return self.rate

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Maps B clips (samples,) at 16 kHz to ``hidden_states``, L tensors (B, T, D), and
        ``last_hidden_state``."""
        encoder = self.encoder
        clips = suites.check_clips(list(wavs), what="clip")
        own = [-(-len(clip) // self.rate) for clip in clips]  # time steps
        there = [suites.resample(clip, SAMPLE_RATE, encoder.sample_rate) for clip in clips]
        made = suites.embed(encoder, there, blocks=encoder.depth)
        frames = [
            _at_rate(one.frames, steps, self.rate / SAMPLE_RATE / encoder.hop_seconds)
            for one, steps in zip(made, own, strict=True)
        ]
        states = list(suites.padded(frames, max(own)).unbind(1))  # L of (B, T, D)
        return {"hidden_states": states, "last_hidden_state": states[-1]}


def _at_rate(frames: Tensor, steps: int, ratio: float) -> Tensor:
    """Returns ``steps`` time steps of (L, T, D), each the patch at its centre; ``ratio``: their
    length in patches. For 1, it cuts, or repeats the last patch."""
    centres = (torch.arange(steps, dtype=torch.float64) + 0.5) * ratio
    chosen = centres.floor().long().clamp(max=frames.shape[1] - 1)
    return frames[:, chosen.to(frames.device)]


def write(checkpoint: str, out: Path) -> None:
    """Writes ``expert.py`` and ``hubconf.py`` to the folder ``out``."""
    _, name = suites.load_named(checkpoint)
    source = suites.source_of(checkpoint)
    suites.write(out / "expert.py", EXPERT.format(checkpoint=source))
    suites.write(out / "hubconf.py", HUBCONF.format(checkpoint=source, name=name))


EXPORT = write
