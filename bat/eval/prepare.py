"""Prepares a probe run or fine-tuning: checks and opens encoder, data, labels and folds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from bat.audio.frontend import KaldiFbank
from bat.config.probing import Protocol
from bat.config.schema import Finetune, Probe, Supervised
from bat.data.index import Index
from bat.data.stream import clip_samples
from bat.data.tar import escape_key
from bat.data.windows import Window, fill_lengths
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.hardware import attention_in_words
from bat.eval.joining import write_scores
from bat.eval.lengths import cut_recordings, window
from bat.eval.loading import check_weights, data_of_run, device_for, load_for
from bat.eval.run_folder import open_csv, open_data
from bat.eval.scoring import Scorer
from bat.eval.splits import DRAWN_FOLDS, Split, check_labels, check_splits, how, make_splits
from bat.eval.targets import FrameTargets, TokenTargets, digest_texts, outputs
from bat.eval.texts import usable_texts
from bat.nn.losses import Loss, loss_for
from bat.probes.base import find_probe
from bat.seeding import derive_seed
from bat.tasks.base import Reading, Task, load_task
from bat.tasks.events import Events, digest
from bat.tasks.labels import classes_in_words, doubts

C = TypeVar("C", bound=Supervised)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreparedData(Generic[C]):
    """Opened and checked data of a run, independent of the encoder; see ``open_probing``."""

    config: C
    """Configuration; its ``data`` names the source of the clips, also if taken from a checkpoint's
    run, and the length of the window, its ``task`` that of the data."""
    task: Task
    index: Index
    splits: list[Split]
    loss: Loss
    note: str = ""
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
        """Hash of the clips, before long ones are cut into windows, and all their targets."""
        events = digest(self.events) if self.events is not None else ""
        texts = digest_texts(self.texts) if self.texts is not None else ""
        return self._recordings.hash + events + texts

    @property
    def _recordings(self) -> Index:
        return self.index


@dataclass(frozen=True, kw_only=True)
class Prepared(PreparedData[C]):
    """Prepared data with an encoder."""

    backbone: Encoder
    """Encoder in eval mode, on the CPU."""
    frames: int | None
    """Frames of one clip; None: each clip is encoded at its own length."""
    targets_of: FrameTargets | TokenTargets | None = None
    """Callable ``(batch, patches) -> targets``: frame labels (B, T, C) or tokens (B, U); None:
    labels of whole clips."""
    recordings: Index
    """The clips before long ones were cut into windows, which ``index`` and ``splits`` hold."""
    places: dict[str, Window] | None = None
    """Places of the windows in their recordings by key; None: nothing was cut."""

    @property
    def _recordings(self) -> Index:
        return self.recordings

    @property
    def scorer(self) -> Scorer:
        """Returns the object that computes the task's metrics."""
        return Scorer.of(self.task, self.targets_of, self.places)

    def write_scores(self, path: Path, logits: Tensor, keys: Sequence[str]) -> None:
        """Writes the probabilities of clips ``keys``, or of their windows, to a CSV at ``path``."""
        names, several = self.index.vocabulary, self.task.multi_label
        write_scores(path, logits, keys, self.places, labels=names, multi_label=several)

    def headline(self, first: str, *more: str) -> str:
        """Returns the message that a run prints when it starts."""
        backbone, hardware = self.backbone, self.config.hardware
        front = getattr(backbone, "frontend", None)
        kernel = attention_in_words(backbone, hardware, device_for(hardware))
        classes = classes_in_words(self.index.vocabulary)
        if self.task.target == "tokens":
            classes = classes_in_words(self.labels[1:]).replace("classes", "tokens", 1)
        lines = [
            first,
            f"data {len(self.recordings)} clips (task {self.task.name}; {classes}), encoder "
            f"{backbone.width} wide, {backbone.depth} blocks",
            kaldi_line(front) if isinstance(front, KaldiFbank) else "",
            f"attention: {kernel}" if kernel else "",
            *more,
            self.note,
            *self.notices,
        ]
        return "\n  ".join(filter(None, lines))


def kaldi_line(frontend: KaldiFbank) -> str:
    """Returns a line on the statistics by which a legacy front end standardises."""
    return (
        f"front end: Kaldi filter bank ({frontend.kind}), statistics={frontend.statistics}: mean "
        f"{frontend.mean:.4f}, deviation {frontend.std:.4f}"
    )


def prepare(config: C) -> Prepared[C]:
    """Loads and checks all that ``config`` names; raises ``UserError`` for what does not fit."""
    if config.data.csv:  # the clips decide how many frames the encoder needs
        return with_encoder(open_probing(config), config)
    # errors of the encoder are raised before any file is indexed
    backbone, frames = _load(config, load_task(config.task))
    return _joined(open_probing(config), config, backbone, frames)


def open_probing(config: C) -> PreparedData[C]:
    """Opens the data, labels and folds that ``config`` names, for any number of encoders.

    If ``config`` names no data, they are those of the first checkpoint whose run has some. Raises
    ``UserError`` for what does not fit.
    """
    check_weights(config)  # before audio is read
    data, note = data_of_run(config)
    config = replace(config, data=data)
    own: Reading | None = None
    if data.csv:
        task, index, own = open_csv(data, progress=config.log.progress)
        config = replace(config, task=task.name)
    else:
        task, index = open_data(config.task, data, progress=config.log.progress)
    if data.windows:
        fill_lengths(index)
    return check_data(config, task, index, note=note, own=own)


def with_encoder(data: PreparedData[C], config: C, checkpoint: str | None = None) -> Prepared[C]:
    """Loads and checks the encoder ``checkpoint`` (None: that of ``config``) for ``data``.

    Encoder settings are those of ``config``, data settings those held by ``data``. Raises
    ``UserError`` for what does not fit.
    """
    config = replace(config, checkpoint=checkpoint or config.checkpoint, data=data.config.data)
    return _joined(data, config, *_load(config, data.task))


def _load(config: C, task: Task) -> tuple[Encoder, int | None]:
    """Loads the encoder and returns it with the frames of a clip, None if each clip has its own."""
    backbone, frames = load_for(config, task)
    if frames is not None:
        check_frames(backbone, frames=frames, clip_seconds=config.data.clip_seconds)
    return backbone, frames


def check_frames(backbone: Encoder, *, frames: int, clip_seconds: float) -> None:
    """Raise ``UserError`` if ``frames`` are no whole patches, or whole clips have more.

    One more frame is cut off silently: 120 s are 12,001 frames where a task counts 12,000.
    """
    if not isinstance(backbone, SpectrogramEncoder):
        raise UserError(f"frames={frames}: {type(backbone).__name__} takes clips as they are")
    patch, front = backbone.patch, backbone.frontend
    if frames % patch:
        raise UserError(f"frames={frames} is not a multiple of the encoder's patch {patch}")
    samples = clip_samples(clip_seconds, backbone.sample_rate)
    given: int = front.valid_frames(samples)  # type: ignore[operator]
    if given > frames + 1:
        raise UserError(
            f"data.clip_seconds={clip_seconds} makes {given} frames, more than frames={frames}: "
            f"shorten the clips, or say frames={-(-given // patch) * patch}"
        )


def _joined(data: PreparedData[C], config: C, backbone: Encoder, frames: int | None) -> Prepared[C]:
    """Returns ``data`` with the encoder and the targets of its time patches."""
    targets_of: FrameTargets | TokenTargets | None = None
    hop_ms = 1000 * backbone.hop_seconds
    index, splits, places, said = cut_recordings(
        data.index,
        data.splits,
        data.config.data,
        in_time=data.events is not None,
        hop_seconds=backbone.hop_seconds,
    )
    notices = [*data.notices, *said]
    if data.texts is not None:
        targets_of = TokenTargets(data.texts, labels=data.labels, kind=data.task.tokens)
        splits, said = usable_texts(data, targets_of, backbone, frames)
        notices += said
    if data.events is not None:
        targets_of = FrameTargets(
            data.events,
            labels=data.index.vocabulary,
            patch_hop_ms=hop_ms,
            sample_rate=backbone.sample_rate,
            places=places,
        )
        if targets_of.missed:
            notices.append(
                f"{targets_of.missed} event(s) begin and end between the starts of two patches "
                f"({hop_ms:g} ms): no patch is labelled with them"
            )
    config = replace(config, task=data.config.task, data=data.config.data, head=data.config.head)
    changed = {"config": config, "index": index, "splits": splits, "notices": tuple(notices)}
    return Prepared(
        **{**vars(data), **changed},
        backbone=backbone,
        frames=frames,
        targets_of=targets_of,
        recordings=data.index,
        places=places,
    )


def check_data(
    config: C, task: Task, index: Index, *, note: str = "", own: Reading | None = None
) -> PreparedData[C]:
    """Returns the data with labels, window, events and folds; ``UserError`` if unsuitable."""
    notices = list(own.notes) if own is not None else []
    events, texts = _events_and_texts(index, own)
    task = _for_level(task, config.level, events=events, texts=texts, labels=index.classes)
    if events is not None:
        check_events(events, index)
        if task.target != "events":
            many = sum(len(found) for found in events.values())
            notices.append(
                f"onsets and offsets of {many} event(s) are not used: labels are those of whole "
                "clips (level=frame uses them)"
            )
            events = None
    if texts is not None and task.target == "tokens":
        texts = {key: task.text_of(text) for key, text in texts.items()}
    else:
        texts = None
        methods = (
            config.methods if isinstance(config, Probe) else [getattr(config, "method", "all")]
        )
        several = {m: find_probe(m).outputs_per_patch for m in methods if m != "all"}
        for method in (m for m, outputs in several.items() if outputs > 1):
            raise UserError(
                f"{method} gives {several[method]} outputs per time patch, for texts, and task "
                f"{task.name} is of {task.target}: name another probe"
            )
    timed = task.target in ("events", "tokens")
    if config.data.roll is None:
        config = replace(config, data=replace(config.data, roll=not timed))
    if timed:
        if config.window_scores:
            raise UserError(
                f"window_scores=true lists classes of whole clips, not {task.target}: leave it "
                "away; bat-predict lists what a head says of each recording"
            )
        for moves, name, remedy in (
            (config.data.roll, "data.roll=true", "data.roll=false"),
            (config.pad_offset == "random", "pad_offset=random", "pad_offset=start"),
        ):
            if moves:
                raise UserError(f"{name} moves clips against their {task.target}: say {remedy}")
    if own is not None and task.target == "class" and not index.labels_per_clip.all():
        task = task.asking("tags")
    clip_seconds, said = window(index, config.data, events, texts, shorten=own is not None)
    config = replace(config, data=replace(config.data, clip_seconds=clip_seconds))
    notices += said
    config = replace(config, head=config.head.for_task(task.per_class))
    if texts is None:
        check_labels(task, index)
    protocol = protocol_of(config)
    if protocol is not None and protocol.metric == "map" and texts is not None:
        raise UserError("protocol.metric=map: a task of tokens has no mAP; say =task")
    splits = make_splits(
        index,
        config.folds,
        protocol=protocol,
        seed=config.seed,
        multi_label=task.multi_label,
        draw=DRAWN_FOLDS if own is not None or task.name == "folder" else 0,
        split=config.data.split,
        shots=config.shots,
        clip_seconds=config.data.clip_seconds,
    )
    if events is not None:
        check_timed(splits, index)
    if config.shots is not None:
        notices.append(
            f"shots={config.shots}: {len(splits[0].train)} training clip(s) in {splits[0].in_words}"
            ", counted by first label"
        )
    if config.data.split != "auto":
        notices.append(f"trained on split {config.data.split}; {index.counted_splits()}")
    notices += check_splits(splits, index, multi_label=task.multi_label, labelled=texts is None)
    labels = tuple(index.vocabulary)
    if texts is not None:
        trained = np.unique(np.concatenate([held.train for held in splits]))
        known = {escape_key(key): text for key, text in texts.items()}
        labels = tuple(outputs((known[index.key(int(i))] for i in trained), task))
    notices += doubts(index.vocabulary)
    without = int((index.labels_per_clip == 0).sum())
    if without and texts is None:  # refused by ``check_labels`` where each clip is of one class
        notices.append(f"{without} of {len(index)} clips have no label: negatives of every class")
    if isinstance(config, Finetune) or (isinstance(config, Probe) and not config.train.epochs):
        notices += config.optim.notes(config.train.steps)
    if splits[0].drawn:
        notices.append(
            "folds drawn: clips cut from one recording may be on both sides; a column fold keeps "
            "them together"
        )
    return PreparedData(
        config=config,
        task=task,
        index=index,
        splits=splits,
        loss=loss_for(task, config.loss),
        note=note,
        notices=tuple(notices),
        how=how(splits, protocol),
        events=events,
        texts=texts,
        labels=labels,
    )


def protocol_of(config: Supervised) -> Protocol | None:
    """Returns how values are selected; None if fine-tuning evaluates its last step."""
    if isinstance(config, Probe):
        return config.protocol
    every = config.validate_every if isinstance(config, Finetune) else 0
    return Protocol(look_every=every) if every else None


def _events_and_texts(
    index: Index, own: Reading | None
) -> tuple[Events | None, dict[str, str] | None]:
    """Returns events and texts of the clips by key; None if no clip has any. Where only some clips
    have them, the others get no events or an empty text."""
    if own is not None:
        texts = {row.key: row.text for row in own.rows if row.text is not None}
        return own.events, texts or None
    keys = [index.key(i) for i in range(len(index))] if index.events or index.texts else []
    events = {key: index.events.get(i, ()) for i, key in enumerate(keys)}
    said = {key: index.texts.get(i, "") for i, key in enumerate(keys)}
    return (events if index.events else None), (said if index.texts else None)


def _for_level(
    task: Task, level: str, *, events: Events | None, texts: dict[str, str] | None, labels: int
) -> Task:
    """Returns ``task`` with the target for data of ``labels`` many labels at ``level``.

    Events at clip level become labels of clips, their union. Raises ``UserError`` if the data or
    the level do not allow it.
    """
    text_only = task.adapts and texts is not None and not labels
    if level == "clip":
        if task.target == "tokens" or text_only:
            raise UserError(f"task {task.name} has texts, one output a time patch: say level=frame")
        return task.asking("tags") if task.target == "events" else task
    if (task.target == "events" and events is None) or (task.target == "tokens" and texts is None):
        columns = "onset and offset" if task.target == "events" else "text"
        raise UserError(
            f"task {task.name} is of {task.target}, and no clip has any: give them in the task's "
            f"rows, in the JSON of shards or in a CSV (column {columns})"
        )
    if text_only:
        return task.asking("tokens")
    if events is not None and task.target in ("class", "tags"):
        return task.asking("events", metrics=("map", "event_f1", "segment_f1"))
    return task


def check_events(events: Events, index: Index) -> None:
    """Raise ``UserError`` for events of unknown classes, or after the end of their recording."""
    by_key = {escape_key(key): found for key, found in events.items()}
    names = {name for found in by_key.values() for event in found for name in event.labels}
    if unknown := sorted(names - set(index.vocabulary)):
        raise UserError(
            f"an event has the label {unknown[0]!r}, which is not among the classes of the data: "
            "give its clip that label too (bat-shard does)"
        )
    late = [
        (event.line, f"onset {event.onset_seconds:g}, {index.key(i)} has {end:.6g} s")
        for i, end in enumerate(index.seconds.tolist())
        for event in by_key.get(index.key(i), ())
        if 0 < end <= event.onset_seconds
    ]
    if late:
        line, said = min(late)
        raise UserError(
            f"{len(late)} event(s) begin after their recording has ended (the first"
            f"{f' in line {line}' if line else ''}: {said}): give times in seconds"
        )


def check_timed(splits: list[Split], index: Index) -> None:
    """Raise ``UserError`` if clips of ``splits`` have labels whose times are not known."""
    parts = [ids for held in splits for ids in (held.train, held.test, held.valid)]
    used = np.unique(np.concatenate([ids for ids in parts if ids is not None])).tolist()
    labels = index.labels_per_clip
    bare = [i for i in used if labels[i] and i not in index.events]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(used)} clips have labels, but no events (the first: "
            f"{index.key(bare[0])}): at level=frame they would be taken for silence. Leave their "
            "split out (data.split=NAME), or say level=clip"
        )


def permuted(data: PreparedData[C], *, seed: int) -> PreparedData[C]:
    """Returns ``data`` with the labels, events or texts permuted among the clips.

    Only chance is left: a better result means that held-out clips were seen in training or used for
    selection.
    """
    seed = derive_seed(seed, "permuted")
    if data.events is not None:
        return replace(data, events=_permuted_values(dict(data.events), seed))
    if data.texts is not None:
        return replace(data, texts=_permuted_values(data.texts, seed))
    return replace(data, index=permute_labels(data.index, seed=seed))


def _permuted_values(given: dict[str, T], seed: int) -> dict[str, T]:
    values = list(given.values())
    order = np.random.default_rng(seed).permutation(len(values))
    return dict(zip(given, (values[i] for i in order), strict=True))


def permute_labels(index: Index, *, seed: int) -> Index:
    """Returns ``index`` with labels permuted among the clips, by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(index))
    other = copy.copy(index)
    other.__dict__.pop("hash", None)  # the hash covers the labels, too
    counts = index.labels_per_clip[order]
    other.label_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(index.label_ptr.dtype)
    parts = [index.label_ids[index.label_ptr[i] : index.label_ptr[i + 1]] for i in order]
    other.label_ids = np.concatenate(parts).astype(index.label_ids.dtype)
    return other
