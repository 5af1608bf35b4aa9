"""What probing and fine-tuning do first: encoder, data, labels, rounds, each mistake named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from bat.audio.frontend import KaldiFbank
from bat.backbones.base import Backbone
from bat.config.schema import Supervised
from bat.data.index import Index
from bat.data.stream import clip_samples
from bat.shapes import UserError
from bat.tasks.base import Task, load_task
from bat.train.encoders import data_of_run, device_for, load_for
from bat.train.held_out import Round, check_labels, make_rounds
from bat.train.losses import Loss, loss_for
from bat.train.run_folder import open_data
from bat.train.speed import attention_in_words

C = TypeVar("C", bound=Supervised)


@dataclass(frozen=True)
class Prepared(Generic[C]):
    """A resolved configuration with all that it names, opened and checked."""

    config: C
    """``data`` says where the clips came from, be it the checkpoint's run."""
    task: Task
    index: Index
    rounds: list[Round]
    backbone: Backbone
    """In eval mode, on the CPU."""
    frames: int
    """Of one clip."""
    loss: Loss
    note: str
    """A line to print where the data were taken from the checkpoint's run, or nothing."""

    def headline(self, first: str, *more: str) -> str:
        """What a run says when it starts."""
        backbone, index = self.backbone, self.index
        hardware = self.config.hardware
        kernel = attention_in_words(backbone, hardware, device_for(hardware))
        lines = [
            first,
            f"data {len(index)} clips (task {self.task.name}, {index.classes} classes), encoder "
            f"{backbone.width} wide, {backbone.depth} blocks",
            *([kaldi_line(backbone.frontend)] if isinstance(backbone.frontend, KaldiFbank) else []),
            *([f"attention: {kernel}"] if kernel else []),
            *more,
            *([self.note] if self.note else []),
        ]
        return "\n  ".join(lines)


def kaldi_line(frontend: KaldiFbank) -> str:
    """Which statistics a legacy front end standardises by."""
    return (
        f"front end: Kaldi filter bank ({frontend.kind}), statistics={frontend.statistics}: mean "
        f"{frontend.mean:.4f}, deviation {frontend.std:.4f}"
    )


def check_frames(backbone: Backbone, *, frames: int, clip_seconds: float) -> None:
    """Raise ``UserError`` where whole clips have more than ``frames`` frames."""
    given = backbone.frontend.valid_frames(clip_samples(clip_seconds, backbone.sample_rate))  # type: ignore[operator]
    if given > frames:
        whole = -(-given // backbone.patch) * backbone.patch
        raise UserError(
            f"data.clip_seconds={clip_seconds} makes {given} frames, more than frames={frames}: "
            f"the rest would be cut off; shorten the clips, or say frames={whole}"
        )


def prepare(config: C) -> Prepared[C]:
    """Load and check everything that ``config`` names; ``UserError`` for what does not fit."""
    task = load_task(config.task)
    backbone, frames = load_for(config, task)
    check_frames(backbone, frames=frames, clip_seconds=config.data.clip_seconds)
    data, note = data_of_run(config)
    task, index = open_data(config.task, data, progress=config.log.progress)
    check_labels(task, index)
    return Prepared(
        config=replace(config, data=data),
        task=task,
        index=index,
        rounds=make_rounds(index, config.folds),
        backbone=backbone,
        frames=frames,
        loss=loss_for(task, config.loss),
        note=note,
    )
