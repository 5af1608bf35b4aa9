"""Checks the texts of clips that are to be transcribed: which can be learned, and which cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bat.config.schema import Finetune, Probe, Supervised
from bat.data.stream import clip_samples
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.splits import Split
from bat.eval.targets import TokenTargets
from bat.probes.base import find_probe

if TYPE_CHECKING:
    from bat.eval.prepare import PreparedData


def usable_texts(
    data: PreparedData[Any], targets_of: TokenTargets, backbone: Encoder, frames: int | None
) -> tuple[list[Split], list[str]]:
    """Returns the folds without the training clips whose text is empty, or longer than the head's
    outputs for their time patches, and lines that count these."""
    index, steps = data.index, outputs_per_patch(data.config)
    fixed = None
    if frames is not None and isinstance(backbone, SpectrogramEncoder):
        fixed = backbone.patches_of(frames)
    long = np.zeros(len(index), bool)
    for i, seconds in enumerate(index.seconds.tolist()):
        if fixed is None and not seconds:
            continue  # unknown length: the loss counts the clip as 0 if its text does not fit
        seconds = min(seconds, data.config.data.clip_seconds)
        own = backbone.time_patches(clip_samples(seconds, backbone.sample_rate))
        patches = own if fixed is None else fixed
        long[i] = targets_of.too_long(index.key(i), patches * steps)
    empty = np.array([targets_of.is_empty(index.key(i)) for i in range(len(index))])
    what = "" if steps == 1 else f" (the head gives {steps} outputs each)"
    asr = "" if steps > 1 else " or a head with more outputs (asr)"
    reasons = {
        f"longer than its clip has time patches of {1000 * backbone.hop_seconds:g} ms{what}": (
            long,
            f"cut the clips at words, or use an encoder with shorter patches{asr}",
        ),
        "empty": (empty, "give them a text, or remove them"),
    }
    said = []
    for why, (wrong, remedy) in reasons.items():
        if wrong.any():
            first = index.key(int(wrong.argmax()))
            said.append(
                f"{int(wrong.sum())} of {len(index)} clips have a text that is {why} (the first: "
                f"{first}): {_trained(data.splits, wrong)} left out of training, none of the "
                f"evaluation; {remedy}"
            )
    out = long | empty
    splits = [replace(held, train=held.train[~out[held.train]]) for held in data.splits]
    if not all(len(held.train) for held in splits):
        raise UserError(f"no training clip is left: {'; '.join(said)}")
    return splits, said


def _trained(splits: Sequence[Split], wrong: np.ndarray) -> int:
    """Returns the number of training clips among those of the mask ``wrong`` (n,)."""
    return int(wrong[np.unique(np.concatenate([held.train for held in splits]))].sum())


def outputs_per_patch(config: Supervised) -> int:
    """Returns the outputs per time patch of the head; the fewest where several are trained, since
    all are trained on the same clips."""
    methods = [config.method] if isinstance(config, Finetune) else []
    if isinstance(config, Probe):
        methods = [*config.methods, *["linear"] * config.diagnostics.curve]
    return min((1 if m == "all" else find_probe(m).outputs_per_patch for m in methods), default=1)
