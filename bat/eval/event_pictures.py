"""Draws the events that a head detects in held-out clips: the best clips and the worst.

A clip's score is its own onset F1, with the task's threshold, median and collar; of equal scores
the clip with more events is the better one, and that with more errors the worse. Clips without any
event on either side are not drawn. Of a recording that was cut into windows the first is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bat.eval.diagnostics import spectrograms
from bat.eval.features import FeatureStream, Source
from bat.eval.fit import Predictions
from bat.eval.scoring import Scorer
from bat.metrics.events import Event, pairs
from bat.report.event_plots import plot_events
from bat.report.plots import short

EVENTS = "events-"
"""Start of the names of the pictures in a run's ``plots``."""


class Compared(NamedTuple):
    """Events of a clip, ``(onset, offset, class, matched)`` on both sides."""

    key: str
    predicted: list[tuple[float, float, int, bool]]
    reference: list[tuple[float, float, int, bool]]

    @property
    def score(self) -> float:
        """Onset F1 of the clip."""
        matched = sum(event[3] for event in self.reference)
        return 2 * matched / (len(self.predicted) + len(self.reference))

    @property
    def wrong(self) -> int:
        """Number of events that are missed or false."""
        return sum(not event[3] for event in (*self.predicted, *self.reference))


def compared(key: str, predicted: list[Event], true: list[Event], collar: float) -> Compared:
    """Returns the events of a clip with those marked that match."""
    found: list[set[int]] = [set(), set()]
    for c in {event[2] for event in true}:
        places = [[i for i, e in enumerate(side) if e[2] == c] for side in (predicted, true)]
        onsets = [
            [side[i][0] for i in at] for side, at in zip((predicted, true), places, strict=True)
        ]
        for match in pairs(onsets[0], onsets[1], collar):
            for side, at, i in zip(found, places, match, strict=True):
                side.add(at[i])
    marked = [
        [(*event, i in matched) for i, event in enumerate(side)]
        for side, matched in zip((predicted, true), found, strict=True)
    ]
    return Compared(key, *marked)


def draw_events(
    logits: Tensor,
    found: Predictions,
    scorer: Scorer,
    *,
    labels: tuple[str, ...],
    stream: FeatureStream,
    source: Source,
    ids: NDArray[np.int64],
    picture: Path,
    count: int = 2,
) -> None:
    """Draws the ``count`` best and the ``count`` worst of the clips ``ids`` to ``picture``.

    Nothing is drawn if no clip has an event, predicted or true.
    """
    logits, found = scorer.joined(logits, found, source, ids)
    collar = scorer.detection.collar_seconds
    clips = [
        compared(key, scorer.detected(rows), true, collar)
        for key, rows, true in scorer.clips(logits, found, source, ids)
    ]
    clips = [clip for clip in clips if clip.predicted or clip.reference]
    order = sorted(clips, key=lambda c: (-c.score, -len(c.reference), c.wrong, c.key))
    best = order[: min(count, -(-len(order) // 2))]
    worst = sorted(order[len(best) :], key=lambda c: (c.score, -c.wrong, c.key))[:count]
    shown = {clip.key: ("best", clip) for clip in best} | {c.key: ("worst", c) for c in worst}
    number: dict[str, int] = {}
    for i in ids.tolist():
        key = stream.index.key(i)
        number.setdefault(scorer.places[key].recording if scorer.places else key, i)
    items = []
    for key, (what, clip) in shown.items():
        for batch in stream.loader(np.array([number[key]], np.int64), batch=1, workers=0):
            if not batch.keys:
                continue
            images, steps = spectrograms(stream.backbone, batch, stream.frames)
            seconds = int(batch.lengths[0]) / stream.backbone.sample_rate
            hop = stream.backbone.hop_seconds / steps
            image = images[0, : max(1, round(seconds / hop))].cpu().numpy()
            items.append(_item(what, clip, labels) | {
                "spectrogram": image, "hop_ms": 1000 * hop, "seconds": seconds,
            })  # fmt: skip
    if items:
        plot_events(items, picture)


def _item(what: str, clip: Compared, labels: tuple[str, ...]) -> dict[str, Any]:
    matched = sum(event[3] for event in clip.reference)
    title = (
        f"{what}: {short(clip.key, 40)}, onset F1 {100 * clip.score:.0f} % ({matched} of "
        f"{len(clip.reference)} found, {len(clip.predicted) - matched} false)"
    )
    sides = {
        name: [(onset, offset, labels[c], ok) for onset, offset, c, ok in events]
        for name, events in (("reference", clip.reference), ("predicted", clip.predicted))
    }
    return {"title": title, **sides}
