"""Prepares a probe run or fine-tuning: checks and opens encoder, data, labels and folds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from bat.audio.frontend import KaldiFbank
from bat.config.schema import Finetune, Probe, Supervised
from bat.config.sections import Data
from bat.data.index import Index
from bat.data.stream import clip_samples
from bat.data.tar import escape_key
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.frame_targets import FrameTargets
from bat.eval.hardware import attention_in_words
from bat.eval.loading import check_weights, data_of_run, device_for, load_for
from bat.eval.run_folder import open_data, open_own
from bat.eval.scoring import Scorer
from bat.eval.splits import DRAWN_FOLDS, Round, check_labels, check_rounds, how, make_rounds
from bat.eval.token_targets import TokenTargets, digest_texts, outputs
from bat.eval.windows import check_events, check_in_place, window
from bat.nn.losses import Loss, loss_for
from bat.tasks.base import Reading, Task, load_task
from bat.tasks.events import Events, digest
from bat.tasks.labels import classes_in_words, doubts

C = TypeVar("C", bound=Supervised)


@dataclass(frozen=True)
class PreparedData(Generic[C]):
    """Opened and checked data of a probe run, independent of the encoder; see ``open_probing``."""

    config: C
    """Configuration; its ``data`` names the source of the clips, also if taken from a checkpoint's
    run, and the length of the window, its ``task`` that of the data."""
    task: Task
    index: Index
    rounds: list[Round]
    loss: Loss
    note: str
    """Line to print if the data were taken from the checkpoint's run, else empty."""
    notices: tuple[str, ...] = ()
    """Lines that every user of the results should see."""
    how: str = ""
    """Sentence on how results are obtained, see ``splits.how``."""
    events: Events | None = None
    """Events of clips by key, for frame labels."""
    texts: dict[str, str] | None = None
    """Texts of clips by key, for token targets."""
    labels: tuple[str, ...] = ()
    """Names of a head's outputs: the classes, or the blank and the tokens."""

    @property
    def hash(self) -> str:
        """Hash of the clips and all their targets."""
        more = digest(self.events) if self.events is not None else ""
        more += digest_texts(self.texts) if self.texts is not None else ""
        return self.index.hash + more


@dataclass(frozen=True)
class Prepared(Generic[C]):
    """A resolved configuration with everything it names, opened and checked."""

    config: C
    """Configuration; its ``data`` names the source of the clips, also if taken from the
    checkpoint's run."""
    task: Task
    index: Index
    rounds: list[Round]
    backbone: Encoder
    """Encoder in eval mode, on the CPU."""
    frames: int | None
    """Frames of one clip; None: each clip is encoded at its own length."""
    loss: Loss
    note: str
    """Line to print if the data were taken from the checkpoint's run, else empty."""
    notices: tuple[str, ...] = ()
    """Lines that every user of the results should see."""
    how: str = ""
    """Sentence on how results are obtained, see ``splits.how``."""
    targets_of: FrameTargets | TokenTargets | None = None
    """Callable ``(batch, patches) -> targets``: frame labels (B, T, C) or tokens (B, U); None:
    labels of whole clips."""
    labels: tuple[str, ...] = ()
    """Names of a head's outputs."""
    hash: str = ""
    """Hash of the clips and all their targets."""

    @property
    def scorer(self) -> Scorer:
        """Returns the object that computes the task's metrics."""
        return Scorer.of(self.task, self.targets_of)

    @property
    def in_words(self) -> str:
        """Returns ``3 classes: cat, dog, frog``, or the tokens likewise."""
        if self.task.target == "tokens":
            return classes_in_words(self.labels[1:]).replace("classes", "tokens", 1)
        return classes_in_words(self.index.vocabulary)

    def headline(self, first: str, *more: str) -> str:
        """Returns the message that a run prints when it starts."""
        backbone, index = self.backbone, self.index
        hardware = self.config.hardware
        front = getattr(backbone, "frontend", None)
        kernel = attention_in_words(backbone, hardware, device_for(hardware))
        lines = [
            first,
            f"data {len(index)} clips (task {self.task.name}; "
            f"{self.in_words}), encoder {backbone.width} wide, "
            f"{backbone.depth} blocks",
            *([kaldi_line(front)] if isinstance(front, KaldiFbank) else []),
            *([f"attention: {kernel}"] if kernel else []),
            *more,
            *([self.note] if self.note else []),
            *self.notices,
        ]
        return "\n  ".join(lines)


def kaldi_line(frontend: KaldiFbank) -> str:
    """Returns a line on the statistics by which a legacy front end standardises."""
    return (
        f"front end: Kaldi filter bank ({frontend.kind}), statistics={frontend.statistics}: mean "
        f"{frontend.mean:.4f}, deviation {frontend.std:.4f}"
    )


def check_frames(backbone: Encoder, *, frames: int, clip_seconds: float) -> None:
    """Raise ``UserError`` if ``frames`` are no whole patches, or whole clips have more.

    One more frame is cut off silently: 120 s are 12,001 frames where a task counts 12,000.
    """
    if not isinstance(backbone, SpectrogramEncoder):
        raise UserError(f"frames={frames}: {type(backbone).__name__} takes clips as they are")
    if frames % backbone.patch:
        raise UserError(
            f"frames={frames} is not a multiple of the encoder's patch {backbone.patch}"
        )
    front: Any = backbone.frontend
    given = front.valid_frames(clip_samples(clip_seconds, backbone.sample_rate))
    if given > frames + 1:
        whole = -(-given // backbone.patch) * backbone.patch
        raise UserError(
            f"data.clip_seconds={clip_seconds} makes {given} frames, more than frames={frames}: "
            f"the rest would be cut off; shorten the clips, or say frames={whole}"
        )


def prepare(config: C) -> Prepared[C]:
    """Loads and checks all that ``config`` names; raises ``UserError`` for what does not fit."""
    if config.data.csv:  # the clips decide how many frames the encoder needs
        return with_encoder(open_probing(config), config)
    # errors of the encoder are raised before any shard is written
    backbone, frames = _load(config, load_task(config.task))
    return _together(open_probing(config), config, backbone, frames)


def open_probing(config: C) -> PreparedData[C]:
    """Opens the data, labels and folds that ``config`` names, for any number of encoders.

    ``config.checkpoint`` may name several, separated by commas: if no data are given, they are
    those of the first checkpoint whose run has some. Raises ``UserError`` for what does not fit.
    """
    check_weights(config)  # before audio is read
    if config.data.csv:
        task, index, listed = open_own(config.data, progress=config.log.progress)
        return check_data(replace(config, task=task.name), task, index, own=listed)
    data, note = _data_of_runs(config)
    if data.csv:
        found = open_probing(replace(config, data=data))
        return replace(found, note=note)
    task, index = open_data(config.task, data, progress=config.log.progress)
    return check_data(replace(config, data=data), task, index, note=note)


def with_encoder(data: PreparedData[C], config: C, checkpoint: str | None = None) -> Prepared[C]:
    """Loads and checks the encoder ``checkpoint`` (None: that of ``config``) for ``data``.

    Encoder settings are those of ``config``, data settings those held by ``data``. Raises
    ``UserError`` for what does not fit.
    """
    config = replace(config, checkpoint=checkpoint or config.checkpoint)
    backbone, frames = _load(config, data.task, data.config.data.clip_seconds)
    return _together(data, config, backbone, frames)


def _load(config: C, task: Task, clip_seconds: float | None = None) -> tuple[Encoder, int | None]:
    """Loads the encoder and returns it with the frames of a clip, None if each clip has its own."""
    if clip_seconds is not None:
        config = replace(config, data=replace(config.data, clip_seconds=clip_seconds))
    backbone, frames = load_for(config, task)
    if frames is not None:
        check_frames(backbone, frames=frames, clip_seconds=config.data.clip_seconds)
    return backbone, frames


def _together(
    data: PreparedData[C], config: C, backbone: Encoder, frames: int | None
) -> Prepared[C]:
    targets_of: FrameTargets | TokenTargets | None = None
    notices, rounds = list(data.notices), data.rounds
    if data.texts is not None:
        targets_of = TokenTargets(data.texts, labels=data.labels, kind=data.task.tokens)
        rounds, said = _that_fit(data, targets_of, backbone, frames)
        notices += said
    if data.events is not None:
        targets_of = FrameTargets(
            data.events,
            labels=data.index.vocabulary,
            patch_hop_ms=1000 * backbone.hop_seconds,
            sample_rate=backbone.sample_rate,
        )
        if targets_of.missed:
            notices.append(
                f"{targets_of.missed} event(s) begin and end between the starts of two patches "
                f"({1000 * backbone.hop_seconds:g} ms): no patch is labelled with them"
            )
    return Prepared(
        config=replace(config, task=data.config.task, data=data.config.data, head=data.config.head),
        task=data.task,
        index=data.index,
        rounds=rounds,
        backbone=backbone,
        frames=frames,
        loss=data.loss,
        note=data.note,
        notices=tuple(notices),
        how=data.how,
        targets_of=targets_of,
        labels=data.labels,
        hash=data.hash,
    )


def _that_fit(
    data: PreparedData[C], targets_of: TokenTargets, backbone: Encoder, frames: int | None
) -> tuple[list[Round], list[str]]:
    """Returns the folds without the training clips whose text is longer than their time patches,
    and lines that count these."""
    index, window = data.index, data.config.data.clip_seconds
    long = np.zeros(len(index), bool)
    for i in range(len(index)):
        if frames is not None and isinstance(backbone, SpectrogramEncoder):
            patches = frames // backbone.patch
        elif index.frames[i] > 0 and index.rate[i] > 0:
            seconds = min(float(index.frames[i] / index.rate[i]), window)
            patches = backbone.time_patches(clip_samples(seconds, backbone.sample_rate))
        else:
            continue  # unknown length: the loss counts the clip as 0 if its text does not fit
        long[i] = targets_of.too_long(index.key(i), patches)
    if not long.any():
        return data.rounds, []
    rounds = [replace(held, train=held.train[~long[held.train]]) for held in data.rounds]
    empty = next((held for held in rounds if not len(held.train)), None)
    first = index.key(int(long.argmax()))
    why = f"longer than its clip has time patches of {1000 * backbone.hop_seconds:g} ms"
    if empty is not None:
        raise UserError(
            f"the text of every training clip is {why} (the first: {first}): CTC needs a patch for "
            "each token; cut the clips at words, or use an encoder with shorter patches"
        )
    left = np.unique(np.concatenate([held.train for held in data.rounds]))
    out = int(long[left].sum())
    said = f"{int(long.sum())} of {len(index)} clips have a text that is {why} (the first: {first})"
    return rounds, [f"{said}: {out} left out of training, none of the evaluation"]


def _asked(
    task: Task, level: str, *, events: Events | None, texts: dict[str, str] | None, labels: int
) -> Task:
    """Returns ``task`` with the target for data of ``labels`` many labels at ``level``.

    Events at clip level become labels of clips, their union. Raises ``UserError`` if the data or
    the level do not allow it.
    """
    own_text = task.adapts and texts is not None and not labels
    if (task.target == "tokens" or own_text) and level == "clip":
        raise UserError(f"task {task.name} has texts, one output a time patch: say level=frame")
    if level == "clip":
        return task.asking("tags") if task.target == "events" else task
    for target, given, what in (
        ("events", events, "column onset and offset"),
        ("tokens", texts, "column text"),
    ):
        if task.target == target and given is None:
            raise UserError(
                f"task {task.name} is of {target}, and no clip has any: the task's rows, the JSON "
                f"of shards (field {'text' if target == 'tokens' else 'events'}) or a CSV ({what}) "
                "give them"
            )
    if own_text:
        return task.asking("tokens")
    if events is not None and task.target in ("class", "tags"):
        return task.asking("events", metrics=("map", "event_f1", "segment_f1"))
    return task


def _said_of(index: Index, own: Reading | None) -> tuple[Events | None, dict[str, str] | None]:
    """Returns events and texts of the clips by key; None if no clip has any. Where only some clips
    have them, the others get no events or an empty text."""
    if own is not None:
        texts = {row.key: row.text for row in own.rows if row.text is not None}
        return own.events, texts or None
    keys = [index.key(i) for i in range(len(index))] if index.events or index.texts else []
    events = {key: index.events.get(i, ()) for i, key in enumerate(keys)}
    said = {key: index.texts.get(i, "") for i, key in enumerate(keys)}
    return (events if index.events else None), (said if index.texts else None)


def check_data(
    config: C, task: Task, index: Index, *, note: str = "", own: Reading | None = None
) -> PreparedData[C]:
    """Returns the data with labels, window, events and folds; ``UserError`` if unsuitable."""
    notices: list[str] = list(own.notes) if own is not None else []
    events, texts = _said_of(index, own)
    task = _asked(task, config.level, events=events, texts=texts, labels=index.classes)
    if events is not None:
        check_events(events, index)
        if task.target != "events":
            many = sum(len(found) for found in events.values())
            notices.append(
                f"onsets and offsets of {many} event(s) are not used: labels are those of whole "
                "clips (level=frame uses them)"
            )
            events = None
    if task.target != "tokens":
        texts = None
    if task.target in ("events", "tokens"):
        check_in_place(config)
    if own is not None:
        if task.target == "class" and not index.labels_per_clip.all():
            task = task.asking("tags")
        clip_seconds, said = window(index, config.data.clip_seconds, events)
        config = replace(config, data=replace(config.data, clip_seconds=clip_seconds))
        notices += said
    config = replace(config, head=config.head.for_task(task.per_class))
    if texts is None:
        check_labels(task, index)
    protocol = config.protocol if isinstance(config, Probe) else None
    if protocol is not None and protocol.metric == "map" and texts is not None:
        raise UserError(
            "protocol.metric=map: a task of tokens has no mAP; say protocol.metric=task"
        )
    rounds = make_rounds(
        index,
        config.folds,
        protocol=protocol,
        seed=config.seed,
        multi_label=task.multi_label,
        draw=DRAWN_FOLDS if own is not None else 0,
        split=config.data.split,
    )
    if config.data.split != "auto":
        notices.append(f"trained on split {config.data.split}; {index.counted_splits()}")
    notices += check_rounds(rounds, index, multi_label=task.multi_label, labelled=texts is None)
    labels = tuple(index.vocabulary)
    if texts is not None:
        trained = np.unique(np.concatenate([held.train for held in rounds]))
        known = {escape_key(key): text for key, text in texts.items()}
        labels = tuple(outputs((known[index.key(int(i))] for i in trained), task.tokens))
    notices += doubts(index.vocabulary)
    without = int((index.labels_per_clip == 0).sum())
    if without and texts is None:  # refused by ``check_labels`` where each clip is of one class
        notices.append(f"{without} of {len(index)} clips have no label: negatives of every class")
    if isinstance(config, Finetune) or (isinstance(config, Probe) and not config.train.epochs):
        notices += config.optim.notes(config.train.steps)
    if rounds[0].drawn:
        notices.append(
            "folds drawn: clips cut from one recording may be on both sides; a column fold keeps "
            "them together"
        )
    return PreparedData(
        config=config,
        task=task,
        index=index,
        rounds=rounds,
        loss=loss_for(task, config.loss),
        note=note,
        notices=tuple(notices),
        how=how(rounds, protocol),
        events=events,
        texts=texts,
        labels=labels,
    )


def _data_of_runs(config: Supervised) -> tuple[Data, str]:
    """Returns ``data_of_run`` of the first of the checkpoints that has data."""
    names = (config.checkpoint or "").split(",")
    for name in [config.checkpoint, *(names if len(names) > 1 else [])]:
        data, note = data_of_run(replace(config, checkpoint=name))
        if data.root or data.shards or data.csv:
            break
    return data, note
