"""Joins what a probe says of the windows of a recording, so that each recording counts once.

Labels: the probabilities of its windows (softmax for one label a clip, sigmoid for several) are
averaged, as ``bat-predict --average-windows`` does, and returned as logits:

    one label     log mean_k softmax(x_k)
    several       log mean_k sigmoid(x_k) - log mean_k sigmoid(-x_k)

Labels of time patches: the outputs of its windows follow one another in time; of patches that lie
in two windows those of the later one count.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bat.data.windows import Window
from bat.errors import UserError
from bat.eval.fit import Predictions

Places = Mapping[str, Window]
"""Place of each window in its recording, by the window's key."""


def join_windows(
    logits: Tensor,
    found: Predictions,
    keys: Sequence[str],
    places: Places,
    *,
    multi_label: bool,
    hop_seconds: float | None = None,
) -> tuple[Tensor, Predictions]:
    """Returns logits and predictions of recordings from those of their windows.

    Args:
        logits: (n, C) of the rows of ``found``. keys: of its windows, those of a recording
            adjacent and in order of time.
        multi_label: sigmoid, else softmax.
        hop_seconds: of time patches, where rows are time patches.
    """
    check_readable(keys, found)
    names = [places[key].recording for key in keys]
    recordings = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(recordings)}
    of = torch.tensor([number[name] for name in names])  # (windows,)
    found = found._replace(total=len(recordings), keys=recordings)
    if found.clips is None:
        counts = of.bincount()
        parts = logits.split(counts.tolist())
        mean = torch.stack([mean_logits(part, multi_label=multi_label) for part in parts])
        return mean, found._replace(targets=found.targets[counts.cumsum(0) - counts])
    assert hop_seconds is not None
    starts = torch.tensor([places[key].start_seconds / hop_seconds for key in keys])
    first = starts.round().long()  # (windows,) first patch of each in its recording
    counts = found.clips.bincount(minlength=len(keys))
    within = torch.arange(len(found.clips)) - (counts.cumsum(0) - counts)[found.clips]
    patches = first[found.clips] + within
    ends = torch.full_like(first, torch.iinfo(first.dtype).max)  # where the next window begins
    ends[:-1] = torch.where(of[1:] == of[:-1], first[1:], ends[:-1])
    kept = patches < ends[found.clips]
    found = found._replace(
        targets=found.targets[kept], clips=of[found.clips][kept], patches=patches[kept]
    )
    return logits[kept], found


def check_readable(keys: Sequence[str], found: Predictions) -> None:
    """Raises ``UserError`` if the number of clips that were read is not that of ``keys``."""
    if len(keys) != found.total:
        raise UserError("too many clips cannot be read to tell whose labels were predicted")


def mean_logits(logits: Tensor, *, multi_label: bool) -> Tensor:
    """Returns the logits of the mean probability, (K, C) -> (C,) float64; of one, its own."""
    logits = logits.double()
    if len(logits) == 1:
        return logits[0]
    count = math.log(len(logits))
    if not multi_label:
        return logits.log_softmax(1).logsumexp(0) - count
    return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)


def write_scores(
    path: Path,
    logits: Tensor,
    keys: Sequence[str],
    places: Places | None,
    *,
    labels: Sequence[str],
    multi_label: bool,
) -> None:
    """Writes the probabilities of each window to a CSV: recording, start in seconds, classes.

    ``logits``: (n, C) of the clips or windows ``keys``.
    """
    scores = logits.sigmoid() if multi_label else logits.softmax(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recording", "start", *labels])
        for key, row in zip(keys, scores.tolist(), strict=True):
            place = Window(key, 0.0) if places is None else places[key]
            writer.writerow(
                [place.recording, f"{place.start_seconds:.9g}", *(f"{p:.6g}" for p in row)]
            )
