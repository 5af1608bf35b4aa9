"""Lists what was transcribed, a line per utterance, and draws the worst of it.

The CSV has the columns ``key, reference, hypothesis, words, edits, wer``: edits and reference words
of each utterance, and their quotient (empty without words). The word error rate of all is the sum
of ``edits`` over the sum of ``words``. The picture shows the alignment of the utterances with the
highest rate: words, or single tokens where no reference has more than one word.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bat.eval.diagnostics import spectrograms
from bat.eval.features import FeatureStream, Source
from bat.eval.fit import Predictions
from bat.eval.scoring import by_clip
from bat.eval.targets import TokenTargets
from bat.io import write_atomic
from bat.metrics.text import align, edits
from bat.nn.losses import NOTHING
from bat.report.token_plots import plot_transcripts

TRANSCRIPTS = "transcripts-"
"""Start of the names of the pictures in a run's ``plots``."""
COLUMNS = ("key", "reference", "hypothesis", "words", "edits", "wer")


class Piece(NamedTuple):
    """A token or a word that was heard, and when."""

    text: str
    start_seconds: float
    end_seconds: float


class Utterance(NamedTuple):
    """A clip's transcript and what a head made of it."""

    key: str
    reference: str
    hypothesis: str
    heard: list[Piece]
    """Tokens of the hypothesis."""
    edits: int
    """Word edits between the two."""

    @property
    def words(self) -> int:
        """Number of reference words."""
        return len(self.reference.split())

    @property
    def wer(self) -> float:
        """Word error rate; ``inf`` for words heard where none are."""
        return self.edits / self.words if self.words else float("inf") if self.edits else 0.0


def utterances(
    logits: Tensor,
    found: Predictions,
    targets_of: TokenTargets,
    keys: Sequence[str],
    *,
    hop_seconds: float,
) -> list[Utterance]:
    """Returns the utterances ``keys`` that were predicted, in order; empty if the keys of some are
    not known. ``hop_seconds``: of a time patch."""
    if len(keys) != found.total:
        return []
    assert found.clips is not None
    hop = hop_seconds * len(found.clips) / len(logits)
    names, joiner = targets_of.names, targets_of.joiner
    made = []
    best = by_clip(logits.argmax(1, keepdim=True), found)
    for key, rows, target in zip(keys, best, found.targets.tolist(), strict=True):
        heard = [
            Piece(names[n], hop * first, hop * (last + 1))
            for n, first, last in runs(rows[:, 0].astype(int).tolist())
        ]
        said = joiner.join(names[n] for n in target if n != NOTHING)
        hypothesis = joiner.join(piece.text for piece in heard)
        made.append(
            Utterance(key, said, hypothesis, heard, edits(hypothesis.split(), said.split()))
        )
    return made


def runs(best: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (token, first step, last step) of each run of a greedy path, blanks left out."""
    for token, run in groupby(enumerate(best), key=lambda step: step[1]):
        steps = [step for step, _ in run]
        if token:
            yield token, steps[0], steps[-1]


def write_csv(path: Path, found: Sequence[Utterance]) -> None:
    """Writes the utterances in the order of the clips."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found:
        rate = f"{one.wer:.6g}" if one.words else ""
        writer.writerow((one.key, one.reference, one.hypothesis, one.words, one.edits, rate))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def record(
    logits: Tensor,
    found: Predictions,
    targets_of: TokenTargets,
    *,
    stream: FeatureStream,
    source: Source,
    ids: NDArray[np.int64],
    listed: Path,
    picture: Path | None,
    count: int = 3,
) -> None:
    """Writes the CSV ``listed`` of the clips ``ids`` and draws the ``count`` worst.

    Nothing is written if too many clips cannot be read to tell whose transcripts these are.
    """
    backbone, index = stream.backbone, stream.index
    keys = source.readable(ids)
    made = utterances(logits, found, targets_of, keys, hop_seconds=backbone.hop_seconds)
    if not made:
        return
    write_csv(listed, made)
    if picture is None or not count:
        return
    worst = sorted(made, key=lambda one: (-one.wer, -one.edits, one.key))[:count]
    number = {index.key(int(i)): int(i) for i in ids}
    by_words = any(" " in one.reference for one in made)
    items = []
    chosen = {one.key: one for one in worst}
    rows = np.array([number[key] for key in chosen], np.int64)
    for batch in stream.loader(rows, batch=1, workers=0):
        for key in batch.keys:
            images, steps = spectrograms(backbone, batch, stream.frames)
            seconds = int(batch.lengths[0]) / backbone.sample_rate
            hop = backbone.hop_seconds / steps
            image = images[0, : max(1, round(seconds / hop))].cpu().numpy()
            item = {"spectrogram": image, "hop_ms": 1000 * hop, "seconds": seconds}
            items.append(item | columns_of(chosen[key], by_words=by_words))
    plot_transcripts(items, picture)


def columns_of(one: Utterance, *, by_words: bool) -> dict[str, Any]:
    """Returns what ``plot_transcripts`` shows of an utterance besides its spectrogram."""
    heard = words_of(one.heard) if by_words else one.heard
    said = one.reference.split() if by_words else list(one.reference)
    times = iter(heard)
    pairs = align([piece.text for piece in heard], said)
    columns = []
    for true, predicted in pairs:
        piece = next(times) if predicted is not None else None
        span = None if piece is None else (piece.start_seconds, piece.end_seconds)
        columns.append({"reference": true, "hypothesis": predicted, "span": span})
    return {"key": one.key, "columns": columns, "unit": "word" if by_words else "token"}


def words_of(heard: Sequence[Piece]) -> list[Piece]:
    """Joins characters to words at blanks; words stay as they are."""
    if any(len(piece.text) > 1 for piece in heard):
        return list(heard)
    found = []
    for blank, group in groupby(heard, key=lambda piece: piece.text == " "):
        letters = list(group)
        if not blank:
            text = "".join(piece.text for piece in letters)
            found.append(Piece(text, letters[0].start_seconds, letters[-1].end_seconds))
    return found
