"""Features of a frozen encoder, all blocks of each clip, as the probes take them.

``FeatureBank`` runs the encoder once a clip and keeps the features in memory; ``FeatureStream``
runs it for each batch, for sets that no memory holds and for augmented clips. Both give batches in
the order of the same plan, so that a probe trained on one equals a probe trained on the other (up
to the rounding of stored features).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bat.audio.decode import MAX_FILE_SECONDS
from bat.backbones.base import Backbone
from bat.data.bad_clips import BadClips
from bat.data.index import Index
from bat.data.module import AudioData, eval_loader
from bat.data.order import make_plan
from bat.data.plan import Plan
from bat.shapes import Features, UserError, WaveBatch

Batches = Iterator[tuple[Features, Tensor]]
"""Features of B clips and their targets (B, C), on the encoder's device or the CPU."""


class Source(Protocol):
    """Where probes get features of clips from; clips are ids of an index."""

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        """``steps`` batches of ``ids`` in the order of the plan of ``seed``, without end."""

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        """Every readable clip of ``ids`` once, in order."""


@torch.no_grad()
def encode(
    backbone: Backbone, batch: WaveBatch, *, frames: int, autocast: torch.dtype | None = None
) -> Features:
    """Features of all blocks, without gradient, on the backbone's device."""
    device = device_of(backbone)
    waves, lengths = batch.waves.to(device), batch.lengths.to(device)
    spectrogram = backbone.spectrogram(waves, lengths, frames=frames)  # float32
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        features = backbone.features(spectrogram)
    if not features.patches[-1].isfinite().all():
        raise UserError(
            f"the encoder's features are not finite (batch of {batch.keys[0]}): its weights are "
            "damaged, or hardware.precision=32-true is needed"
        )
    return features


class FeatureBank:
    """Features of a set of clips, all blocks, in memory.

    ``patches`` (n, L, T, F, D) and ``cls`` (n, L, D) or None, clips first; ``targets`` (n, C);
    ``ids`` (n,) clip ids of the index; ``keys`` (n); ``skipped`` ``{key: reason}``.
    """

    def __init__(
        self,
        *,
        patches: Tensor,
        cls: Tensor | None,
        targets: Tensor,
        ids: np.ndarray,
        keys: Sequence[str],
        skipped: Mapping[str, str],
    ) -> None:
        self.patches, self.cls, self.targets = patches, cls, targets
        self.ids, self.keys, self.skipped = np.asarray(ids, np.int64), list(keys), dict(skipped)

    @classmethod
    def extract(
        cls,
        backbone: Backbone,
        batches: Iterable[WaveBatch],
        *,
        ids: np.ndarray,
        frames: int,
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        bad_clips: BadClips | None = None,
        progress: bool = False,
    ) -> FeatureBank:
        """Run ``backbone`` (in eval mode meanwhile) over ``batches`` (of ``eval_loader(ids=ids)``).

        Stored on ``device`` in ``autocast``'s type, float32 without one. Raises ``UserError`` where
        no clip is readable, too many are not, or features are not finite.
        """
        bad = bad_clips or BadClips(max_bad=1.0)
        patches, classes, targets = torch.empty(0), None, []
        rows: list[int] = []
        keys: list[str] = []
        with (
            evaluating(backbone),
            progress_bar(len(ids), "features", unit="clip", show=progress) as bar,
        ):
            for batch in batches:
                bad.add(batch)
                bar.update(len(batch.keys) + len(batch.skipped))
                if not batch.keys:
                    continue
                found = encode(backbone, batch, frames=frames, autocast=autocast)
                start, end = len(rows), len(rows) + len(batch.keys)
                if not rows:
                    dtype = autocast or torch.float32
                    L, _, *rest = found.patches.shape
                    patches = torch.empty(len(ids), L, *rest, dtype=dtype, device=device)
                    if found.cls is not None:
                        classes = torch.empty(len(ids), L, rest[-1], dtype=dtype, device=device)
                patches[start:end] = found.patches.transpose(0, 1)
                if classes is not None and found.cls is not None:
                    classes[start:end] = found.cls.transpose(0, 1)
                targets.append(batch.targets)
                rows += batch.positions.tolist()
                keys += batch.keys
        bad.check(final=True)
        if not rows:
            raise UserError(f"none of the {len(ids)} clips can be read: {bad.summary()}")
        return cls(
            patches=patches[: len(rows)],
            cls=None if classes is None else classes[: len(rows)],
            targets=torch.cat(targets),
            ids=np.asarray(ids)[rows],
            keys=keys,
            skipped=bad.keys,
        )

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        plan = Plan(self._rows(ids), seed=seed)
        for k in range(steps):
            yield self._pick(plan.clips(np.arange(k * batch, (k + 1) * batch)))

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        rows = self._rows(ids)
        for start in range(0, len(rows), batch):
            yield self._pick(rows[start : start + batch])

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the clips ``ids`` that could be read."""
        row_of = {int(clip): row for row, clip in enumerate(self.ids)}
        return np.array([row_of[int(i)] for i in ids if int(i) in row_of], np.int64)

    def _pick(self, rows: np.ndarray) -> tuple[Features, Tensor]:
        at = torch.from_numpy(rows)
        where = at.to(self.patches.device)
        cls = None if self.cls is None else self.cls[where].transpose(0, 1)
        return Features(patches=self.patches[where].transpose(0, 1), cls=cls), self.targets[at]


class FeatureStream:
    """The same features made anew for each batch: for sets that no memory holds, and for training
    clips that differ from time to time (``roll``, ``random_offset``).

    Without these and with clips no longer than ``clip_seconds`` it yields what the bank does.
    """

    def __init__(
        self,
        backbone: Backbone,
        index: Index,
        *,
        frames: int,
        clip_seconds: float,
        roll: bool = False,
        random_offset: bool = False,
        min_seconds: float = 0.0,
        max_seconds: float = MAX_FILE_SECONDS,
        workers: int = 0,
        cache_bytes: int = 0,
        autocast: torch.dtype | None = None,
        bad_clips: BadClips | None = None,
    ) -> None:
        self.backbone, self.index, self.frames, self.autocast = backbone, index, frames, autocast
        self.clip_seconds, self.roll, self.random_offset = clip_seconds, roll, random_offset
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.workers, self.cache_bytes = workers, cache_bytes
        self.bad_clips = bad_clips or BadClips(max_bad=1.0)

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        data = AudioData(
            index=self.index,
            batch=batch,
            batches=steps,
            sample_rate=self.backbone.sample_rate,
            clip_seconds=self.clip_seconds,
            plan=make_plan(self.index, ids, seed=seed),
            seed=seed,
            roll=self.roll,
            random_offset=self.random_offset,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
            workers=self.workers,
            cache_bytes=self.cache_bytes,
        )
        return self._encoded(data.train_dataloader())

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        return self._encoded(
            eval_loader(
                self.index,
                ids,
                batch=batch,
                sample_rate=self.backbone.sample_rate,
                clip_seconds=self.clip_seconds,
                workers=self.workers,
                cache_bytes=self.cache_bytes,
                min_seconds=self.min_seconds,
                max_seconds=self.max_seconds,
            )
        )

    def _encoded(self, batches: Iterable[Any]) -> Batches:
        for batch in batches:
            self.bad_clips.add(batch)
            self.bad_clips.check()
            if batch.keys:
                with evaluating(self.backbone):
                    features = encode(
                        self.backbone, batch, frames=self.frames, autocast=self.autocast
                    )
                yield features, batch.targets


def bank_bytes(backbone: Backbone, clips: int, *, frames: int, dtype: torch.dtype) -> int:
    """What a ``FeatureBank`` of so many clips needs."""
    tokens = frames // backbone.patch * backbone.grid.freq + int(backbone.has_cls)
    return clips * backbone.depth * tokens * backbone.width * dtype.itemsize


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the module's parameters lie."""
    return next(module.parameters()).device


def to_device(features: Features, device: torch.device) -> Features:
    """The same features on ``device``."""
    cls = None if features.cls is None else features.cls.to(device, non_blocking=True)
    return Features(patches=features.patches.to(device, non_blocking=True), cls=cls)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule as it was."""
    was = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in was.items():
            m.training = training


def progress_bar(total: int, what: str, *, unit: str, show: bool) -> tqdm[Any]:
    """A bar on stderr that leaves no trace; quiet where stderr is a file."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        leave=False,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )
