"""Predicts with trained heads: ``bat-predict`` and ``bat.predict``.

A head of bat-probe or bat-finetune (``models``) answers for each window: scores of its classes
(softmax for one label a clip, sigmoid for tags; outputs of time patches are averaged first), events
(sigmoid of each time patch, median filter, threshold, as in evaluation), or text (CTC, the best
output of each patch). Of several folds the probabilities are averaged. Windows are those of the
head's run (``data.clip_seconds``) unless others are asked for. Events of one label that meet or
overlap where windows do are joined, their score the mean weighted by duration.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bat.data.windows import Windows
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import encode
from bat.eval.loading import weights_digest
from bat.eval.scoring import detected, greedy
from bat.interfaces.models import Model, device_named, find_heads, load_models, trained_window
from bat.interfaces.parts import Parts, Results, open_csv, run
from bat.interfaces.recordings import WHOLE, compute_clips, window_seconds
from bat.nn.losses import to_clip
from bat.tasks.events import Detection
from bat.types import Needs, WaveBatch
from bat.weights import WEIGHTS

Answer = Literal["scores", "events", "text"]
Floats = NDArray[np.float64]
JOIN_SECONDS = 1e-6
"""Greatest gap between two events that are joined."""


class Predictor:
    """Computes the answers of one head, or of the folds of one, for the clips of a batch.

    ``answer``: ``scores`` (1, C) of each clip; ``events`` (E, 4): onset, offset, class, score;
    ``text`` (1,) of str. None: events and text for heads trained on them, else scores.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        answer: Answer | None = None,
        threshold: float | None = None,
        median: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        first = models[0]
        self.models, self.autocast = models, autocast
        self.labels: list[str] = list(first.meta["labels"])
        self.target = str(first.meta["target"])
        usual: dict[str, Answer] = {"events": "events", "tokens": "text"}
        self.answer: Answer = answer or usual.get(self.target, "scores")
        self.joiner = " " if first.task.tokens == "words" else ""
        was = first.task.detection
        self.detection: Detection = was._replace(
            threshold=was.threshold if threshold is None else threshold,
            median=was.median if median is None else median,
        )
        if problems := list(self._problems(threshold, median)):
            raise UserError("; ".join(problems))
        self.backbone = first.backbone
        self.settings: dict[str, Any] = {
            **{"command": "predict", "answer": self.answer, "bf16": autocast is not None},
            **self.detection._asdict(),
        }
        self.encoders: dict[int, tuple[Encoder, list[Model]]] = {}
        for model in models:
            self.encoders.setdefault(id(model.backbone), (model.backbone, []))[1].append(model)

    def _problems(self, threshold: float | None, median: int | None) -> Iterator[str]:
        if (self.answer == "text") != (self.target == "tokens"):
            yield f"answer={self.answer}: this head is of {self.target}"
        if self.answer == "events" and self.models[0].head.level != "frame":
            yield "answer=events: this head answers for whole clips; train one with level=frame"
        if self.answer != "events" and (threshold is not None or median is not None):
            yield f"threshold and median are for events; this head gives {self.answer}"
        if not 0 <= self.detection.threshold <= 1:
            yield f"threshold={threshold}: from 0 to 1"
        if self.detection.median < 1 or self.detection.median % 2 == 0:
            yield f"median={median}: an odd number of time patches; 1: none"

    @torch.no_grad()
    def __call__(self, batch: WaveBatch) -> list[NDArray[Any]]:
        """Returns the answer for each clip of the batch."""
        total: Tensor | None = None
        own: list[int] = []
        for backbone, models in self.encoders.values():
            needs = reduce(
                Needs.__or__,
                (type(m.head).needs(has_cls=m.head.has_cls, level=m.head.level) for m in models),
            )
            frames = models[0].frames
            found = encode(backbone, batch, frames=frames, autocast=self.autocast, needs=needs)
            hop = backbone.hop_seconds * backbone.sample_rate
            T = found.patches.shape[2]
            valid = [T] * len(batch.keys) if found.valid is None else found.valid.tolist()
            begun = (batch.lengths.double() / hop - 1e-6).ceil().int().tolist()
            own = valid
            if self.answer == "events":  # as in evaluation: patches that start within the clip
                own = [max(1, min(t, b)) for t, b in zip(valid, begun, strict=True)]
            for model in models:
                logits = model.head(found).float()
                if self.answer == "scores":
                    logits = to_clip(logits, found.inside())
                p = logits.softmax(-1) if self._exclusive else logits.sigmoid()
                total = p if total is None else total + p
        assert total is not None
        p = (total / len(self.models)).double().cpu().numpy()  # (B, C) or (B, T, C)
        steps = self.models[0].head.outputs_per_patch
        return [self._answer(row, t * steps) for row, t in zip(p, own, strict=True)]

    @property
    def _exclusive(self) -> bool:
        return self.target == "tokens" or (self.target == "class" and self.answer == "scores")

    def _answer(self, p: Floats, outputs: int) -> NDArray[Any]:
        if self.answer == "scores":
            return p[None]
        p = p[:outputs]
        if self.answer == "text":
            numbers = greedy(p.argmax(1).tolist())
            said = self.joiner.join(self.labels[n] for n in numbers)
            return np.array([said])
        hop = self.models[0].backbone.hop_seconds
        events = []
        for onset, offset, c in sorted(detected(p, self.detection, hop_seconds=hop)):
            first = round(onset / hop)
            score = float(p[first : max(first + 1, round(offset / hop)), c].mean())
            events.append((onset, offset, c, score))
        return np.array(events, float).reshape(-1, 4)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        average: bool = False,
        encoder: str | None = None,
        device: str = "auto",
        bf16: bool = False,
        **how: Any,
    ) -> Predictor:
        """Loads the head, or the heads of several folds, onto the device; ``how``: see above."""
        where = device_named(device)
        models = [
            model._replace(backbone=model.backbone.to(where), head=model.head.to(where))
            for model in load_models(checkpoint, average=average, encoder=encoder)
        ]
        made = cls(models, autocast=torch.bfloat16 if bf16 else None, **how)
        heads = find_heads(checkpoint, average=average)
        digest = hashlib.sha256(b"".join((head / WEIGHTS).read_bytes() for head in heads))
        for used, _ in made.encoders.values():
            digest.update(weights_digest(used).encode())
        made.settings["models"] = digest.hexdigest()
        return made

    def window(self, value: float | str | None) -> float | None:
        """Returns the seconds of a window; None as ``value``: those of the head's run. Raises
        ``UserError`` if its frames would be cut."""
        model, frames = self.models[0], self.models[0].frames
        seconds = window_seconds(value, model.clip_seconds or trained_window(self.backbone))
        front: Any = getattr(self.backbone, "frontend", None)
        if frames is None or value is None or front is None:
            return seconds
        if seconds is None:
            raise UserError(
                f"window={WHOLE}: this head was trained on clips of {frames} frames, and a longer "
                "recording would be cut; give seconds"
            )
        samples = seconds * self.backbone.sample_rate
        made = int(front.valid_frames(int(samples))) if 0 < samples < math.inf else 0
        if made > frames + 1:
            raise UserError(
                f"window={seconds:g} makes {made} frames, and this head was trained on clips of "
                f"{frames}: the rest would be cut; give a shorter window"
            )
        return seconds

    def size(self, seconds: float) -> float:
        """Returns the bytes of the answer for a window, about."""
        return 8.0 * len(self.labels) if self.answer == "scores" else 4096.0


def answers(
    predictor: Predictor, parts: Iterable[Results], windows: Windows, *, average: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (recording, answer) in order: ``start``, ``end`` and ``scores`` (C,) or ``text`` of
    each window; or ``onset``, ``offset``, ``label``, ``score`` of each event of a recording.

    ``average``: the mean scores of all windows of a recording.
    """
    for i, rows in itertools.groupby(_rows(parts, windows), key=lambda row: row[0]):
        if predictor.answer == "events":
            for onset, offset, c, score in _joined(rows):
                label = predictor.labels[int(c)]
                yield i, {"onset": onset, "offset": offset, "label": label, "score": score}
        elif average:
            ends, scores = zip(*((end, value) for _, _, end, value in rows), strict=True)
            yield i, {"start": 0.0, "end": ends[-1], "scores": np.mean(scores, axis=0)}
        else:
            for _, start, end, value in rows:
                said = {"text": str(value)} if predictor.answer == "text" else {"scores": value}
                yield i, {"start": start, "end": end, **said}


def _rows(
    parts: Iterable[Results], windows: Windows
) -> Iterator[tuple[int, float, float, NDArray[Any]]]:
    """Yields recording, start and end of the window, and value of each result."""
    for window, values in parts:
        times = (t.tolist() for t in windows.times(window))
        yield from zip(windows.recording(window).tolist(), *times, values, strict=True)


def _joined(found: Iterable[tuple[int, float, float, Floats]]) -> list[list[float]]:
    """Returns the events of a recording by onset, those that meet where windows do joined."""
    by_class: dict[float, list[list[float]]] = {}
    for _, start, end, event in found:
        onset, offset, c, score = event.tolist()
        onset, offset = start + onset, min(start + offset, end)
        known = by_class.setdefault(c, [])
        if known and known[-1][1] >= onset - JOIN_SECONDS and known[-1][4] < start:
            last = known[-1]
            one, two = max(last[1] - last[0], 1e-9), max(offset - onset, 1e-9)
            last[3] = (last[3] * one + score * two) / (one + two)
            last[1], last[4] = max(last[1], offset), start
        else:
            known.append([onset, offset, c, score, start])
    return sorted(event[:4] for events in by_class.values() for event in events)


def _write(predictor: Predictor, parts: Parts, path: Path) -> None:
    """Writes the answers as CSV."""
    top, average = (predictor.settings[name] for name in ("top", "average_windows"))
    names, labels = parts.job.recordings.names, predictor.labels
    if predictor.answer == "events":
        header = ["path", "onset", "offset", "label", "score"]
    elif predictor.answer == "text":
        header = ["path", "start", "end", "text"]
    else:
        scores = labels if top is None else ["rank", "label", "score"]
        header = ["path", "start", "end", *scores]
    with open_csv(path, *header) as table:
        for i, answer in answers(predictor, parts, parts.job.windows, average=average):
            times = [f"{answer[name]:.9g}" for name in header[1:3]]
            if predictor.answer == "events":
                table.writerow((names[i], *times, answer["label"], f"{answer['score']:.6g}"))
            elif predictor.answer == "text":
                table.writerow((names[i], *times, answer["text"]))
            elif top is None:
                table.writerow((names[i], *times, *(f"{s:.6g}" for s in answer["scores"].tolist())))
            else:
                for rank, (label, score) in enumerate(best(answer, labels, top), 1):
                    table.writerow((names[i], *times, rank, label, f"{score:.6g}"))


def best(answer: dict[str, Any], labels: Sequence[str], top: int) -> list[tuple[str, float]]:
    """Returns the ``top`` labels with the highest scores, and these."""
    order = np.argsort(-answer["scores"], kind="stable")[:top].tolist()
    return [(labels[c], float(answer["scores"][c])) for c in order]


def predict_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path,
    top: int | None = None,
    average_windows: bool = False,
    average: bool = False,
    encoder: str | None = None,
    answer: Answer | None = None,
    threshold: float | None = None,
    median: int | None = None,
    device: str = "auto",
    bf16: bool = False,
    **reading: Any,
) -> None:
    """Predicts for the audio at ``paths`` into the CSV ``out``; continues what was interrupted.

    Args:
        checkpoint, ...: see ``predict``. reading: see ``run``.

    Raises:
        UserError: whatever is wrong with these; nothing readable; ``out`` is of another command.
    """
    if Path(out).suffix != ".csv":
        raise UserError(f"--out {out}: a .csv")
    how: dict[str, Any] = {"answer": answer, "threshold": threshold, "median": median}
    how |= {"average": average, "encoder": encoder, "device": device, "bf16": bf16}

    def load() -> Predictor:
        made = Predictor.load(checkpoint, **how)
        check_answer(made, top=top, average_windows=average_windows)
        made.settings |= {"top": top, "average_windows": average_windows}
        return made

    run(paths, out, load, _write, **reading)


def check_answer(predictor: Predictor, *, top: int | None, average_windows: bool) -> None:
    """Raises ``UserError`` for settings of scores with other answers, and ``top`` below 1."""
    if predictor.answer != "scores" and (top is not None or average_windows):
        raise UserError(f"top and average-windows are for scores; this gives {predictor.answer}")
    if top is not None and top < 1:
        raise UserError(f"top={top}: at least 1")


def predict(
    clips: Any,
    checkpoint: str | Path,
    *,
    sample_rate: int | None = None,
    average: bool = False,
    encoder: str | None = None,
    answer: Answer | None = None,
    top: int | None = None,
    threshold: float | None = None,
    median: int | None = None,
    window: float | str | None = None,
    hop: float | None = None,
    average_windows: bool = False,
    batch: int = 32,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Predicts with a head of bat-probe or bat-finetune, as ``bat-predict`` (docs/embed.md).

    Args:
        clips, sample_rate: as for ``bat.embed``.
        checkpoint: a head's folder, a fold, or a run with one head. average: the mean of folds.
        encoder: where a probe's encoder lies, if it was moved.
        answer: ``scores``, ``events`` or ``text``; None: as the head was trained.
        top: the best labels only. threshold, median: of events; None: the task's.
        window, hop: seconds; None: the clips of the head's run; ``whole``: clips are not cut.
        average_windows: one answer a clip, its mean scores.

    Returns:
        A dict for each window, or each event: ``clip`` (its number), ``start``, ``end`` (seconds)
        and ``scores`` (label to score, best first) or ``text``; or ``onset``, ``offset``,
        ``label``, ``score``.

    Raises:
        UserError: unreadable or unsuitable clips, several heads, settings that do not fit.
    """
    how: dict[str, Any] = {"answer": answer, "threshold": threshold, "median": median}
    how |= {"average": average, "encoder": encoder, "device": device}
    reading: dict[str, Any] = {"sample_rate": sample_rate, "window": window, "hop": hop}
    predictor = Predictor.load(checkpoint, **how)
    check_answer(predictor, top=top, average_windows=average_windows)
    windows, found = compute_clips(predictor, clips, batch=batch, **reading)
    made = []
    for i, said in answers(predictor, [Results.of(found)], windows, average=average_windows):
        if "scores" in said:
            some = len(predictor.labels) if top is None else top
            said["scores"] = dict(best(said, predictor.labels, some))
        made.append({"clip": i, **said})
    return made
