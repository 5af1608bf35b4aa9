"""Builds front ends and encoders from settings and weights, and names all that does not fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bat.audio.frontend import KaldiFbank, LogMel, Pad
from bat.errors import UserError

Built = TypeVar("Built", bound=nn.Module)
MAX_DEPTH = 512
"""Largest number of blocks."""
Range = type[bool] | tuple[str, ...] | tuple[type[int] | type[float], float, float]
"""Range of a setting: a boolean, one of some words, or a number from minimum to maximum."""
FRONTEND: dict[str, Range] = {
    "kind": ("bat", "eat", "beats"),
    "sample_rate": (int, 1000, 768_000),
    "n_fft": (int, 2, 32_768),
    "hop_length": (int, 1, 65_536),
    "n_mels": (int, 1, 1024),
}


def make_frontend(
    *,
    kind: Literal["bat", "eat", "beats"] = "bat",
    sample_rate: int = 16000,
    n_fft: int = 1024,
    hop_length: int = 160,
    n_mels: int = 128,
    pad: Pad = "spectrogram",
    clip_seconds: float | None = None,
    statistics: str = "audioset",
) -> nn.Module:
    """Builds the front end ``kind``: ``bat`` (LogMel) or a legacy Kaldi one, ``eat`` or ``beats``.

    ``clip_seconds``: for ``pad="clip"``. Raises ``UserError`` for a setting of the wrong type or
    out of range.
    """
    given = {"kind": kind, "sample_rate": sample_rate, "n_fft": n_fft, "hop_length": hop_length}
    check_settings("frontend", {**given, "n_mels": n_mels}, FRONTEND)
    for name, value in (("pad", pad), ("statistics", statistics)):
        if not isinstance(value, str):
            raise UserError(f"frontend: {name} must be text, not a {type(value).__name__}")
    common: dict[str, Any] = {"sample_rate": sample_rate, "n_mels": n_mels}
    common |= {"pad": pad, "clip_seconds": clip_seconds}
    if kind == "bat":
        if statistics != "audioset":
            raise UserError(f"frontend: statistics={statistics}: the front end 'bat' uses none")
        return LogMel(n_fft=n_fft, hop_length=hop_length, **common)
    if (n_fft, hop_length) != (1024, 160):
        raise UserError(
            f"frontend: n_fft={n_fft}, hop_length={hop_length}: '{kind}' has windows of 25 ms "
            "every 10 ms; omit both"
        )
    return KaldiFbank(kind=kind, statistics=statistics, **common)


def check_settings(what: str, given: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises ``UserError`` for each setting that is not in ``ranges`` or out of its range.

    ``what``: owner of the settings, for the message.
    """
    problems = []
    for name, value in given.items():
        allowed = ranges.get(name)
        if allowed is None:
            problems.append(f"{name[:100]} is not known ({', '.join(ranges)})")
        elif allowed is bool:
            if not isinstance(value, bool):
                problems.append(f"{name}={in_short(value)}: true or false")
        elif isinstance(allowed, tuple) and isinstance(allowed[0], str):
            if not isinstance(value, str) or value not in allowed:
                problems.append(f"{name}={in_short(value)}: one of {', '.join(map(str, allowed))}")
        else:
            kind, least, most = allowed
            if type(value) not in (int, kind) or not least <= value <= most:
                noun = "a whole number" if kind is int else "a number"
                problems.append(f"{name}={in_short(value)}: {noun} from {least} to {most}")
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")


def in_short(value: Any) -> str:
    """Formats a value from a file for a message."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def demand(config: Mapping[str, Any], fixed: Mapping[str, Any], what: str) -> None:
    """Raises ``UserError`` if ``config`` gives a setting of ``fixed`` another value."""
    wrong = [name for name, value in fixed.items() if config.get(name, value) != value]
    if wrong:
        said = ", ".join(f"{n}={in_short(config[n])} (here {fixed[n]!r})" for n in wrong)
        raise UserError(f"{what} describes another encoder than this bat has: {said}")


def keywords_of(cls: Callable[..., Any], given: Any, what: str) -> dict[str, Any]:
    """Returns ``given`` if it is a mapping of keywords of ``cls``, else raises ``UserError``."""
    known = inspect.signature(cls).parameters
    if not isinstance(given, Mapping):
        raise UserError(f"{what} is a {type(given).__name__}, not settings by name")
    unknown = [str(name)[:100] for name in given if name not in known]
    if unknown:
        raise UserError(f"{what}: {', '.join(unknown[:10])}: not known ({', '.join(known)})")
    return dict(given)


def block_count(state: Mapping[str, Tensor], what: str) -> int:
    """Returns the number of blocks ``blocks.B.*``; raises ``UserError`` unless they are numbered
    from 0 on without a gap, ``MAX_DEPTH`` at most."""
    numbered = (re.match(r"blocks\.([0-9]{1,9})\.", n, re.ASCII) for n in state)
    blocks = {int(found[1]) for found in numbered if found}
    if not blocks or len(blocks) > MAX_DEPTH or max(blocks) != len(blocks) - 1:
        raise UserError(
            f"not a {what} encoder: {len(blocks)} blocks, numbered up to {max(blocks, default=0)}: "
            f"from 0 on and none left out, {MAX_DEPTH} at most"
        )
    return len(blocks)


def build_strictly(
    cls: type[Built], keywords: Mapping[str, Any], state: Mapping[str, Tensor], what: str
) -> Built:
    """Returns ``cls(**keywords)`` with the weights ``state``, loaded strictly. Names and shapes
    are compared before anything of the stated size is built; see ``load_strictly``."""
    with torch.device("meta"):
        check_fit(cls(**keywords), state, what)
    model = cls(**keywords)
    load_strictly(model, state, what)
    return model


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads a state dict, or raises an error that lists every missing, unexpected, misshapen and
    non-floating-point name."""
    check_fit(module, state, what)
    module.load_state_dict(dict(state))


def check_fit(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raises the error of ``load_strictly`` if ``state`` does not fit ``module``."""
    own = module.state_dict()
    problems = [f"missing: {n} {tuple(own[n].shape)}" for n in own if n not in state]
    problems += [f"unexpected: {n[:200]} {tuple(state[n].shape)}" for n in state if n not in own]
    problems += [
        f"shape: {n} is {tuple(state[n].shape)} in the file, {tuple(own[n].shape)} here"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    problems += [
        f"type: {n} is {t.dtype}, not floating point"
        for n, t in state.items()
        if n in own and own[n].is_floating_point() and not t.is_floating_point()
    ]
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(f"{what} does not fit this model; nothing was loaded:\n  {shown}{more}")
