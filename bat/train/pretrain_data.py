"""Opens training streams from the configuration.

Clips are read by index where possible (``AudioData``, exactly resumable); pre-training can also
read shards sequentially (``SequentialData``, which warns that it is not).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from bat.config.schema import Finetune, Pretrain
from bat.config.sections import Data
from bat.data.index import Index
from bat.data.module import AudioData, StreamData
from bat.data.plan import make_plan
from bat.data.sequential import SequentialData
from bat.data.sources import TRAIN, NotIndexable, check_no_train
from bat.data.windows import cut_into_windows
from bat.errors import UserError
from bat.eval.run_folder import open_data
from bat.ranges import changed
from bat.tasks.base import Task, load_task
from bat.tasks.folder import TASK as FOLDER
from bat.tasks.labels import classes_in_words

log = logging.getLogger("bat")

NEEDS_AN_INDEX = (
    *("windows", "mix", "shuffle", "window", "balance", "epoch_clips", "noise", "cache_waves_gb"),
)


@dataclass(frozen=True)
class PretrainData:
    """A stream and the data it reads."""

    data: StreamData
    task: Task
    index: Index | None
    """Index of the clips; None if they are read sequentially."""

    def describe(self) -> str:
        """Returns a short description: the number of clips and their source."""
        if self.index is None:
            shards = self.data.facts()["shards"]
            return f"{shards} shards, read from front to end (NOT exactly resumable)"
        classes = classes_in_words(self.index.vocabulary)
        clips = "clips" if self.index.starts is None else "windows"
        return f"{len(self.index)} {clips} (task {self.task.name}; {classes})"


def open_stream(config: Pretrain, out: Path | None = None) -> PretrainData:
    """Opens the data that ``config.data`` names; ``out``: run folder, for ``bad_clips.jsonl``.

    Raises ``UserError`` as ``open_data`` does, and for settings that do not fit the data.
    """
    data = config.data
    try:
        task, index = open_data(config.task, replace(data, labels=_labels(config)), labelled=False)
    except NotIndexable as error:
        return PretrainData(_sequential(config, out, error), load_task(config.task), None)
    if data.windows:
        cut_into_windows(index, data.clip_seconds)
    stream = audio_stream(
        config,
        index,
        training_clips(index, data.split),
        sample_rate=config.frontend.sample_rate,
        seed=config.seed,
        out=out,
    )
    return PretrainData(stream, task, index)


def audio_stream(
    config: Pretrain | Finetune,
    index: Index,
    ids: np.ndarray | None,
    *,
    sample_rate: int,
    seed: int,
    out: Path | None,
    random_offset: bool = False,
) -> AudioData:
    """Returns the stream of the clips ``ids`` (None: all) as ``config.data`` orders them."""
    data = config.data
    return AudioData(
        index=index,
        batch=data.batch,
        batches=config.train.steps * config.train.accumulate,
        sample_rate=sample_rate,
        clip_seconds=data.clip_seconds,
        plan=make_plan(
            index,
            ids,
            seed=seed,
            shuffle=data.shuffle,
            window=data.window,
            balance=data.balance,
            epoch_clips=data.epoch_clips,
            mix=data.mix,
        ),
        seed=seed,
        roll=bool(data.roll),
        noise=data.noise,
        random_offset=random_offset,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        workers=data.workers,
        cache_bytes=int(data.cache_waves_gb * 1e9),
        look_ahead=data.window,
        max_bad=data.max_bad,
        out=out,
    )


def _labels(config: Pretrain) -> Literal["same", "drop"]:
    """Returns how labels are read; folder names count as labels only if the settings say so."""
    data = config.data
    folders = config.task == FOLDER.name and data.root is not None and Path(data.root).is_dir()
    if data.labels != "folders":
        return "drop" if folders else data.labels
    if not folders or data.shards:
        raise UserError(
            "data.labels=folders is for a folder of audio: say task=folder data.root=DIR, or leave "
            "it away"
        )
    return "same"


def _sequential(config: Pretrain, out: Path | None, why: NotIndexable) -> SequentialData:
    data = config.data
    if asked := changed(data, NEEDS_AN_INDEX, Data()):
        raise UserError(f"data.{asked[0]}={getattr(data, asked[0])} needs an index, but {why}")
    if config.online.every and not (
        config.online.root or config.online.shards or config.online.csv
    ):
        raise UserError(
            f"online probes on the training set need an index, but {why}; or give online.shards= "
            "or online.root=, or set online.every=0"
        )
    log.warning(
        "%s. Reading from front to end instead: clips are mixed less, and a resumed run is NOT "
        "exactly the uninterrupted one",
        why,
    )
    return SequentialData(
        list(data.shards),
        batch=data.batch,
        sample_rate=config.frontend.sample_rate,
        clip_seconds=data.clip_seconds,
        split=data.split,
        seed=config.seed,
        roll=bool(data.roll),
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        workers=data.workers,
        max_bad=data.max_bad,
        out=out,
        retries=data.retries,
        timeout_seconds=data.timeout_seconds,
        redirects=data.redirects,
    )


def training_clips(index: Index, split: str) -> np.ndarray | None:
    """Returns ids of the clips to pre-train on (``data.split``, see ``choose_split``); None: all.

    Raises ``UserError`` for a split that the data does not have, or if ``auto`` finds only held-out
    splits.
    """
    name = next((n for n in TRAIN if n in index.splits), None) if split == "auto" else split
    if name is None or name == "all":
        if name is None and index.splits:
            check_no_train(index.splits, index.counted_splits())
        return None
    ids = index.clips_in_split(name)
    if split == "auto" and len(ids) < len(index):
        others = [other for other in index.splits if other != name]
        log.info(
            "pre-training on the %d clips of split %s; data.split=all takes those of %s too",
            len(ids),
            name,
            ", ".join(others) or "none",
        )
    return ids
