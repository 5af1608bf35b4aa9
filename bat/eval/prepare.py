"""What probing and fine-tuning do first: encoder, data, labels, rounds, each mistake named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from bat.audio.frontend import KaldiFbank
from bat.config.schema import Finetune, Probe, Supervised
from bat.config.sections import Data
from bat.data.index import Index
from bat.data.stream import clip_samples
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.errors import UserError
from bat.eval.frame_targets import FrameTargets
from bat.eval.hardware import attention_in_words
from bat.eval.loading import check_weights, data_of_run, device_for, load_for
from bat.eval.run_folder import open_data, open_own
from bat.eval.splits import DRAWN_FOLDS, Round, check_labels, check_rounds, how, make_rounds
from bat.eval.windows import check_events, check_in_place, window
from bat.nn.losses import Loss, loss_for
from bat.tasks.base import Task, load_task
from bat.tasks.events import Events
from bat.tasks.labels import classes_in_words, doubts
from bat.tasks.own import Own

C = TypeVar("C", bound=Supervised)


@dataclass(frozen=True)
class PreparedData(Generic[C]):
    """What is probed on, whatever the encoder: opened and checked; ``open_probing`` makes it."""

    config: C
    """``data`` says where the clips came from, be it a checkpoint's run, and how long the window
    is; ``task`` is that of the data."""
    task: Task
    index: Index
    rounds: list[Round]
    loss: Loss
    note: str
    """A line to print where the data were taken from the checkpoint's run, or nothing."""
    notices: tuple[str, ...] = ()
    """Lines that every user of the results should see."""
    how: str = ""
    """How results come about: ``held_out.how``."""
    events: Events | None = None
    """Of recordings by their keys, where labels of time patches are made of them."""


@dataclass(frozen=True)
class Prepared(Generic[C]):
    """A resolved configuration with all that it names, opened and checked."""

    config: C
    """``data`` says where the clips came from, be it the checkpoint's run."""
    task: Task
    index: Index
    rounds: list[Round]
    backbone: Encoder
    """In eval mode, on the CPU."""
    frames: int | None
    """Of one clip; None: each clip is encoded at its own length."""
    loss: Loss
    note: str
    """A line to print where the data were taken from the checkpoint's run, or nothing."""
    notices: tuple[str, ...] = ()
    """Lines that every user of the results should see."""
    how: str = ""
    """How results come about: ``held_out.how``."""
    targets_of: FrameTargets | None = None
    """``(batch, patches) -> (B, T, C)``, labels of time patches; None: those of whole clips."""

    def headline(self, first: str, *more: str) -> str:
        """What a run says when it starts."""
        backbone, index = self.backbone, self.index
        hardware = self.config.hardware
        front = getattr(backbone, "frontend", None)
        kernel = attention_in_words(backbone, hardware, device_for(hardware))
        lines = [
            first,
            f"data {len(index)} clips (task {self.task.name}; "
            f"{classes_in_words(index.vocabulary)}), encoder {backbone.width} wide, "
            f"{backbone.depth} blocks",
            *([kaldi_line(front)] if isinstance(front, KaldiFbank) else []),
            *([f"attention: {kernel}"] if kernel else []),
            *more,
            *([self.note] if self.note else []),
            *self.notices,
        ]
        return "\n  ".join(lines)


def kaldi_line(frontend: KaldiFbank) -> str:
    """Which statistics a legacy front end standardises by."""
    return (
        f"front end: Kaldi filter bank ({frontend.kind}), statistics={frontend.statistics}: mean "
        f"{frontend.mean:.4f}, deviation {frontend.std:.4f}"
    )


def check_frames(backbone: Encoder, *, frames: int, clip_seconds: float) -> None:
    """Raise ``UserError`` where ``frames`` are no whole patches, or whole clips have more.

    One more is cut off without a word: 120 s are 12,001 frames where a task counts 12,000.
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
    """Load and check everything that ``config`` names; ``UserError`` for what does not fit."""
    if config.data.csv:  # the clips decide how many frames the encoder is to have
        return with_encoder(open_probing(config), config)
    # what is wrong with the encoder is said before any shard is written
    backbone, frames = _load(config, load_task(config.task))
    return _together(open_probing(config), config, backbone, frames)


def open_probing(config: C) -> PreparedData[C]:
    """Data, labels and rounds that ``config`` names, for any number of encoders.

    ``config.checkpoint`` may name several, separated by commas: where no data are given, they are
    those of the first one's run that has some. ``UserError`` for what does not fit.
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
    """``data`` with the encoder ``checkpoint`` (None: that of ``config``), loaded and checked.

    What ``config`` says of the encoder counts, and of the data what ``data`` holds. ``UserError``
    for what does not fit.
    """
    config = replace(config, checkpoint=checkpoint or config.checkpoint)
    backbone, frames = _load(config, data.task, data.config.data.clip_seconds)
    return _together(data, config, backbone, frames)


def _load(config: C, task: Task, clip_seconds: float | None = None) -> tuple[Encoder, int | None]:
    """The encoder and the frames of a clip, None where each clip has its own."""
    if clip_seconds is not None:
        config = replace(config, data=replace(config.data, clip_seconds=clip_seconds))
    backbone, frames = load_for(config, task)
    if frames is not None:
        check_frames(backbone, frames=frames, clip_seconds=config.data.clip_seconds)
    return backbone, frames


def _together(
    data: PreparedData[C], config: C, backbone: Encoder, frames: int | None
) -> Prepared[C]:
    targets_of, notices = None, list(data.notices)
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
        rounds=data.rounds,
        backbone=backbone,
        frames=frames,
        loss=data.loss,
        note=data.note,
        notices=tuple(notices),
        how=data.how,
        targets_of=targets_of,
    )


def check_data(
    config: C, task: Task, index: Index, *, note: str = "", own: Own | None = None
) -> PreparedData[C]:
    """The data with its labels, window, events and rounds; ``UserError`` where they do not do."""
    notices: list[str] = list(own.notes) if own is not None else []
    events = None
    if own is not None:
        if own.events is not None:
            check_events(own.events, index)
            if isinstance(config, Probe) and config.level == "frame":
                check_in_place(config)
                events = own.events
            else:
                many = sum(len(found) for found in own.events.values())
                notices.append(
                    f"onsets and offsets of {many} event(s) are not used: labels are those of "
                    "whole clips (bat-probe with level=frame uses them)"
                )
        if events is not None or not index.labels_per_clip.all():  # none at a time, in a clip
            task = replace(task, multi_label=True, loss="bce", metric="map")
        clip_seconds, said = window(index, config.data.clip_seconds, events)
        config = replace(config, data=replace(config.data, clip_seconds=clip_seconds))
        notices += said
    config = replace(config, head=config.head.for_task(task.per_class))
    check_labels(task, index)
    protocol = config.protocol if isinstance(config, Probe) else None
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
    notices += check_rounds(rounds, index, multi_label=task.multi_label)
    notices += doubts(index.vocabulary)
    without = int((index.labels_per_clip == 0).sum())
    if without:  # ``check_labels`` refused them where each clip is of one class
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
    )


def _data_of_runs(config: Supervised) -> tuple[Data, str]:
    """``data_of_run`` of the first of the checkpoints that has data."""
    names = (config.checkpoint or "").split(",")
    for name in [config.checkpoint, *(names if len(names) > 1 else [])]:
        data, note = data_of_run(replace(config, checkpoint=name))
        if data.root or data.shards or data.csv:
            break
    return data, note
