"""Waveform to log-mel: once a batch, against torchaudio's transform twice and repeated V times.

*as the step does it*: ours makes one spectrogram a clip; *plain* one for the teacher, one for the
student, repeated for its 16 views. *one pass*: each once, nothing repeated. On a GPU also ours
compiled. ``difference`` is the largest between the two spectrograms, which lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bat.audio.frontend import LogMel
from benchmarks.memory import peak_mb
from benchmarks.plain_step import PlainFrontEnd
from benchmarks.timing import attempted, here, medians

ABOUT = "log-mel of 10-s clips; ratio = plain / ours"
SAMPLE_RATE, VIEWS = 16_000, 16


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device = here()
    clips = 2 if quick else 24 if device.type == "cuda" else 8
    seconds, frames = (1, 112) if quick else (10, 1024)
    generator = torch.Generator().manual_seed(0)
    waves = (0.1 * torch.randn(clips, seconds * SAMPLE_RATE, generator=generator)).to(device)
    front = LogMel().to(device)
    other = PlainFrontEnd(sample_rate=SAMPLE_RATE, n_fft=1024, hop_length=160, n_mels=128)
    other.to(device)

    @torch.no_grad()
    def ours() -> Tensor:
        return front(waves, frames=frames)

    def once() -> Tensor:
        return other(waves, frames)

    def twice() -> tuple[Tensor, Tensor]:
        return once(), once().repeat_interleave(VIEWS, dim=0)

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
        "as the step does it": (ours, twice),
        "one pass": (ours, once),
    }
    if device.type == "cuda" and not quick:
        compiled = torch.compile(front, dynamic=False)

        @torch.no_grad()
        def ours_compiled() -> Tensor:
            return compiled(waves, frames=frames)

        cases["as the step does it, ours compiled"] = (ours_compiled, twice)

    def measure(
        case: str, mine: Callable[[], Tensor], theirs: Callable[[], Any]
    ) -> Iterator[dict[str, Any]]:
        difference = float((mine() - once()).abs().max())
        ways = {"ours": mine, "plain": theirs}
        taken = medians(ways, repeats=repeats, title=case, warm_up=2, device=device)
        yield {
            "case": case,
            "ours_ms": 1e3 * taken["ours"],
            "plain_ms": 1e3 * taken["plain"],
            "ratio": taken["plain"] / taken["ours"],
            "ours_peak_mb": peak_mb(mine, device),
            "plain_peak_mb": peak_mb(theirs, device),
            "difference": difference,
        }

    for name, ways in cases.items():
        case = f"{name}, {clips} clips"
        yield from attempted(case, lambda case=case, ways=ways: measure(case, *ways))
