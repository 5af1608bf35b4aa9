"""Predicts with trained heads: ``bat-predict`` and ``bat.predict``.

A head of bat-probe or bat-finetune (``models``) answers for each window: scores of its classes
(softmax for one label a clip, sigmoid for tags; outputs of time patches are averaged first), events
(sigmoid of each time patch, median filter, threshold, as in evaluation), or text (CTC, the best
output of each patch). Of several folds the probabilities are averaged. Windows are those of the
head's run (``data.clip_seconds``) unless others are asked for. Events of one label that meet or
overlap where windows do are joined, their score the mean weighted by duration.
"""

from __future__ import annotations

import csv
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

from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import encode
from bat.eval.loading import weights_digest
from bat.eval.scoring import detected, greedy
from bat.interfaces.embed import clip_reader, read_batches
from bat.interfaces.models import Model, device_named, find_heads, load_models, trained_window
from bat.interfaces.parts import Block, Job, Output, Parts, run
from bat.interfaces.recordings import Windows, list_recordings
from bat.logs import is_main
from bat.nn.losses import to_clip
from bat.tasks.events import Detection
from bat.types import Needs, WaveBatch
from bat.weights import WEIGHTS

Answer = Literal["scores", "events", "text"]
Floats = NDArray[np.float64]
JOIN_SECONDS = 1e-6
"""Greatest gap between two events that are joined."""
WHOLE = "whole"


class Predictor:
    """Computes the answers of one head, or of the folds of one, for the clips of a batch.

    ``answer``: ``scores`` (1, C) of each clip; ``events`` (E, 4): onset, offset, class, score;
    ``text`` (bytes,) UTF-8. None: events and text for heads trained on them, else scores.
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
        steps = self.models[0].head.steps  # outputs per time patch
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
            return np.frombuffer(said.encode(), np.uint8)
        hop = self.models[0].backbone.hop_seconds
        events = []
        for onset, offset, c in sorted(detected(p, self.detection, hop_seconds=hop)):
            first = round(onset / hop)
            score = float(p[first : max(first + 1, round(offset / hop)), c].mean())
            events.append((onset, offset, c, score))
        return np.array(events, float).reshape(-1, 4)

    @property
    def window_bytes(self) -> float:
        """Size of an answer, about."""
        return 8.0 * len(self.labels) if self.answer == "scores" else 4096.0


def answers(
    predictor: Predictor, parts: Iterable[Block], windows: Windows, *, average: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (recording, answer) in order: ``start``, ``end`` and ``scores`` (C,) or ``text`` of
    each window; or ``onset``, ``offset``, ``label``, ``score`` of each event of a recording.

    ``average``: the mean scores of all windows of a recording.
    """
    each = _windows_of(parts, windows)
    if predictor.answer == "events":
        for i, found in itertools.groupby(each, key=lambda window: window[0]):
            for event in _joined(found):
                onset, offset, c, score = event
                label = predictor.labels[int(c)]
                yield i, {"onset": onset, "offset": offset, "label": label, "score": score}
    elif predictor.answer == "text":
        for i, start, end, values in each:
            yield i, {"start": start, "end": end, "text": values.tobytes().decode()}
    elif average:
        for i, found in itertools.groupby(each, key=lambda window: window[0]):
            ends, scores = zip(*((end, values[0]) for _, _, end, values in found), strict=True)
            yield i, {"start": 0.0, "end": ends[-1], "scores": np.mean(scores, axis=0)}
    else:
        for i, start, end, values in each:
            yield i, {"start": start, "end": end, "scores": values[0]}


def _windows_of(
    parts: Iterable[Block], windows: Windows
) -> Iterator[tuple[int, float, float, NDArray[Any]]]:
    """Yields recording, start, end and values of each window."""
    for block in parts:
        start, end = (times.tolist() for times in windows.times(block.rows))
        values = np.split(block.values, np.cumsum(block.counts)[:-1])
        yield from zip(windows.recording(block.rows).tolist(), start, end, values, strict=True)


def _joined(found: Iterable[tuple[int, float, float, Floats]]) -> list[list[float]]:
    """Returns the events of a recording by onset, those that meet where windows do joined."""
    by_class: dict[float, list[list[float]]] = {}
    for _, start, end, values in found:
        for onset, offset, c, score in values.tolist():
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


class _Table:
    """Writes the answers as CSV."""

    def __init__(self, predictor: Predictor, *, top: int | None, average: bool) -> None:
        self.predictor, self.top, self.average = predictor, top, average

    def __call__(self, parts: Parts, path: Path) -> None:
        names, windows, labels = parts.job.recordings, parts.job.windows, self.predictor.labels
        found = answers(self.predictor, parts, windows, average=self.average)
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.header)
            for i, answer in found:
                if self.predictor.answer == "events":
                    onset, offset = f"{answer['onset']:.6g}", f"{answer['offset']:.6g}"
                    cells = [onset, offset, answer["label"], f"{answer['score']:.6g}"]
                    writer.writerow((names.name(i), *cells))
                    continue
                times = (names.name(i), f"{answer['start']:.9g}", f"{answer['end']:.9g}")
                if self.predictor.answer == "text":
                    writer.writerow((*times, answer["text"]))
                elif self.top is None:
                    writer.writerow((*times, *(f"{s:.6g}" for s in answer["scores"].tolist())))
                else:
                    for rank, (label, score) in enumerate(best(answer, labels, self.top), 1):
                        writer.writerow((*times, rank, label, f"{score:.6g}"))

    @property
    def header(self) -> list[str]:
        if self.predictor.answer == "events":
            return ["path", "onset", "offset", "label", "score"]
        times = ["path", "start", "end"]
        if self.predictor.answer == "text":
            return [*times, "text"]
        return [
            *times,
            *(self.predictor.labels if self.top is None else ("rank", "label", "score")),
        ]


def best(answer: dict[str, Any], labels: Sequence[str], top: int) -> list[tuple[str, float]]:
    """Returns the ``top`` labels with the highest scores, and these."""
    order = np.argsort(-answer["scores"], kind="stable")[:top].tolist()
    return [(labels[c], float(answer["scores"][c])) for c in order]


def _loaded(
    checkpoint: str | Path,
    *,
    average: bool,
    encoder: str | None,
    device: str,
    bf16: bool,
    **how: Any,
) -> Predictor:
    where = device_named(device)
    models = [
        model._replace(backbone=model.backbone.to(where), head=model.head.to(where))
        for model in load_models(checkpoint, average=average, encoder=encoder)
    ]
    return Predictor(models, autocast=torch.bfloat16 if bf16 else None, **how)


def _window(value: float | str | None, model: Model) -> float | None:
    """Returns the seconds of a window, None for whole recordings."""
    if value == WHOLE:
        if model.frames is not None:
            raise UserError(
                f"window={WHOLE}: this head was trained on clips of {model.frames} frames, and a "
                "longer recording would be cut; give seconds"
            )
        return None
    try:
        if value is None:
            return model.clip_seconds or trained_window(model.backbone)
        seconds = float(value)
    except ValueError:
        raise UserError(f"window={value}: seconds, or {WHOLE}") from None
    if model.frames is not None:
        samples = seconds * model.backbone.sample_rate
        front: Any = getattr(model.backbone, "frontend", None)
        if math.isfinite(samples) and front is not None and samples > 0:
            frames = int(front.valid_frames(int(samples)))
            if frames > model.frames + 1:
                raise UserError(
                    f"window={seconds:g} makes {frames} frames, and this head was trained on clips "
                    f"of {model.frames}: the rest would be cut; give a shorter window"
                )
    return seconds


def predict_files(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path,
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
    workers: int = 0,
    device: str = "auto",
    bf16: bool = False,
    progress: bool = False,
    stop_after: int | None = None,
) -> None:
    """Predicts for the audio at ``paths`` into the CSV ``out``; continues what was interrupted.

    Args:
        paths: files, folders, CSVs, shards; see ``list_recordings``.
        checkpoint: a head, a fold, or a run with one head. average: the mean of several folds.
        encoder: where the encoder lies, if not where the head's run had it.
        answer, threshold, median: see ``Predictor``. top: the best labels only, a line each.
        window, hop: seconds; ``whole``: whole recordings. average_windows: a line a recording.
        stop_after: return after this many parts (tests).

    Raises:
        UserError: whatever is wrong with these; nothing readable; ``out`` is of another command.
    """
    out = Path(out)
    problems = []
    if out.suffix != ".csv":
        problems.append(f"--out {out}: a .csv")
    if batch < 1 or workers < 0:
        problems.append(f"batch={batch}, workers={workers}: at least 1, and 0")
    if top is not None and top < 1:
        problems.append(f"top={top}: at least 1")
    if problems:
        raise UserError("; ".join(problems))
    output = Output(out)
    with output.checked():
        predictor = _loaded(
            checkpoint,
            average=average,
            encoder=encoder,
            device=device,
            bf16=bf16,
            answer=answer,
            threshold=threshold,
            median=median,
        )
        if predictor.answer != "scores" and (top is not None or average_windows):
            raise UserError(
                f"top and average-windows are for scores; this gives {predictor.answer}"
            )
        first = predictor.models[0]
        backbone = first.backbone
        show = progress and is_main()
        recordings = list_recordings(paths, cache=output.headers, progress=show)
        seconds = _window(window, first)
        windows = Windows(recordings.seconds, window=seconds, hop=hop, rest=backbone.hop_seconds)
        heads = find_heads(checkpoint, average=average)
        digest = hashlib.sha256(b"".join((head / WEIGHTS).read_bytes() for head in heads))
        for encoder_used, _ in predictor.encoders.values():
            digest.update(weights_digest(encoder_used).encode())
        job = Job(
            recordings,
            windows,
            sample_rate=backbone.sample_rate,
            compute=predictor,
            settings={
                "command": "predict",
                "models": digest.hexdigest(),
                "answer": predictor.answer,
                "top": top,
                "threshold": predictor.detection.threshold,
                "median": predictor.detection.median,
                "window": windows.window,
                "hop": windows.hop,
                "average_windows": average_windows,
                "bf16": bf16,
            },
            batch=batch,
            window_bytes=predictor.window_bytes,
            workers=workers,
            progress=show,
        )
        table = _Table(predictor, top=top, average=average_windows)
        run(job, out, table, stop_after=stop_after)


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
    predictor = _loaded(
        checkpoint,
        average=average,
        encoder=encoder,
        device=device,
        bf16=False,
        answer=answer,
        threshold=threshold,
        median=median,
    )
    first = predictor.models[0]
    reader = clip_reader(
        clips,
        sample_rate=sample_rate,
        to_rate=first.backbone.sample_rate,
        window=_window(window, first),
        hop=hop,
        rest=first.backbone.hop_seconds,
    )
    found: dict[int, NDArray[Any]] = {}
    for part in read_batches(reader, batch):
        found |= dict(zip(part.positions.tolist(), predictor(part), strict=True))
    rows = np.arange(len(reader.windows))
    values = [found[row] for row in rows.tolist()]
    block = Block(rows, np.array([len(v) for v in values], np.int64), np.concatenate(values))
    made = []
    for i, said in answers(predictor, [block], reader.windows, average=average_windows):
        if "scores" in said:
            some = len(predictor.labels) if top is None else top
            said["scores"] = dict(best(said, predictor.labels, some))
        made.append({"clip": i, **said})
    return made
