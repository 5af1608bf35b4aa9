"""Features of a frozen encoder for the probes: for each clip the features that ``Needs`` names.

``FeatureBank`` runs the encoder once per clip and stores the features (in memory, or mapped from
disk, see ``feature_cache.py``); ``FeatureStream`` runs it for each batch, for data sets too large
to store and for augmented clips. Both give the same batches in the order of the same plan, in the
same type (autocast's, else float32), so a probe trained on one equals a probe trained on the other,
up to rounding where the encoder sees clips batched differently.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bat.audio.decode import MAX_FILE_SECONDS
from bat.data.bad_clips import BadClips
from bat.data.index import Index
from bat.data.loader import Loader
from bat.data.plan import MixedPlan, Plan, make_plan
from bat.data.stream import STAND_INS, eval_loader
from bat.encoders.base import Encoder
from bat.errors import UserError
from bat.eval.encoding import (
    CLIP_AXIS,
    TargetsOf,
    clips_first,
    counted,
    device_of,
    encode,
    evaluating,
    progress_bar,
)
from bat.types import Features, Needs, WaveBatch

__all__ = [
    "Batches",
    "FeatureBank",
    "FeatureStream",
    "Source",
    "device_of",
    "encode",
    "evaluating",
    "progress_bar",
    "to_device",
]

Batches = Iterator[tuple[Features, Tensor]]
"""Features of B clips, on the encoder's device or the CPU, and their targets: (B, C), (B, T, C)
for frame labels, or (B, U) integers for tokens."""


class Source(Protocol):
    """Protocol of objects that give probes the features of clips; clips are ids of an index."""

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        """Yields ``steps`` batches of ``ids`` in the order of the plan of ``seed``, without end."""

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        """Yields every readable clip of ``ids`` once, in order."""

    def readable(self, ids: np.ndarray) -> list[str]:
        """Returns the keys of the clips that ``once`` has yielded."""


class FeatureBank:
    """Features of a set of n clips, each computed once; clips first, as many blocks as are needed.

    ``patches`` (n, L', T, F, D); ``cls`` (n, L, D), ``entry`` (n, T, F, D) and ``pieces``
    (n, L, P, D), each None if absent; ``valid`` (n,) number of time patches within each clip,
    None: all; ``targets`` (n, C) or (n, T, C); ``ids`` (n,) clip ids of the index; ``keys`` (n);
    ``skipped`` ``{key: reason}``. ``index``: its plan gives the order of training (remote shards
    are read in windows) with the keywords ``order``; None: a uniform shuffle.
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
        entry: Tensor | None = None,
        pieces: Tensor | None = None,
        valid: Tensor | None = None,
        index: Index | None = None,
        order: Mapping[str, Any] | None = None,
    ) -> None:
        self.patches, self.cls, self.entry, self.pieces = patches, cls, entry, pieces
        all_own = valid is None or bool((valid == patches.shape[2]).all())
        self.valid = None if all_own else valid
        self.targets, self.index, self.order = targets, index, dict(order or {})
        self.ids, self.keys, self.skipped = np.asarray(ids, np.int64), list(keys), dict(skipped)
        self._row_of = {int(clip): row for row, clip in enumerate(self.ids)}

    @classmethod
    def extract(
        cls,
        stream: FeatureStream,
        ids: np.ndarray,
        *,
        batch: int,
        device: torch.device | str = "cpu",
        progress: bool = False,
        index: Index | None = None,
    ) -> FeatureBank:
        """Computes the features of the clips ``ids`` with ``stream`` and stores them on ``device``.

        Raises ``UserError`` if no clip is readable, too many are not, or features are not finite.
        """
        loader = stream.loader(ids, batch=batch)
        waves = counted(loader, stream.bad_clips, clips=len(ids), progress=progress)
        stored: dict[str, Tensor] = {}
        targets: list[Tensor] = []
        valid: list[Tensor] = []
        rows: list[int] = []
        keys: list[str] = []
        for features, wanted, found in stream.encoded(waves):
            start, end = len(rows), len(rows) + len(found.keys)
            for name, tensor in clips_first(features).items():
                if name not in stored:
                    shape = (len(ids), *tensor.shape[1:])
                    stored[name] = torch.empty(shape, dtype=tensor.dtype, device=device)
                stored[name][start:end] = tensor
            targets.append(wanted)
            T = features.patches.shape[2]
            own = torch.full((len(found.keys),), T) if features.valid is None else features.valid
            valid.append(own.cpu())
            rows += found.positions.tolist()
            keys += found.keys
        kept = {name: stored[name][: len(rows)] if name in stored else None for name in CLIP_AXIS}
        return cls(
            **kept,  # type: ignore[arg-type]
            targets=torch.cat(targets),
            valid=torch.cat(valid),
            ids=np.asarray(ids)[rows],
            keys=keys,
            skipped=stream.bad_clips.keys,
            index=index,
            order=stream.order,
        )

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        if not any(int(clip) in self._row_of for clip in ids):
            raise UserError(f"none of the {len(ids)} clips to train on can be read")
        plan: Plan | MixedPlan = Plan(ids, seed=seed)
        if self.index is not None:
            plan = make_plan(self.index, ids, seed=seed, **self.order)
        for k in range(steps):
            positions = np.arange(k * batch, (k + 1) * batch)
            rows = [
                self._row_at(plan, position, clip)
                for position, clip in zip(
                    positions.tolist(), plan.clips(positions).tolist(), strict=True
                )
            ]
            if found := [row for row in rows if row is not None]:
                yield self._pick(np.array(found))

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        rows = np.array([self._row_of[int(i)] for i in ids if int(i) in self._row_of], np.int64)
        for start in range(0, len(rows), batch):
            yield self._pick(rows[start : start + batch])

    def readable(self, ids: np.ndarray) -> list[str]:
        return [self.keys[self._row_of[int(i)]] for i in ids if int(i) in self._row_of]

    def _row_at(self, plan: Plan | MixedPlan, position: int, clip: int) -> int | None:
        """Returns the row of ``clip``, or of an unreadable one's substitute, as in the stream."""
        row = self._row_of.get(clip)
        if row is not None:
            return row
        others = itertools.islice(plan.stand_ins(position), STAND_INS)
        return next((self._row_of[other] for other in others if other in self._row_of), None)

    def _pick(self, rows: np.ndarray) -> tuple[Features, Tensor]:
        at = torch.from_numpy(rows)
        picked: dict[str, Tensor | None] = {}
        for name, axis in CLIP_AXIS.items():
            tensor: Tensor | None = getattr(self, name)
            own = None if tensor is None else tensor[at.to(tensor.device)]
            picked[name] = None if own is None else own.movedim(0, axis)
        valid = None if self.valid is None else self.valid[at]
        if valid is not None and bool((valid == self.patches.shape[2]).all()):
            valid = None
        return Features(**picked, valid=valid), self.targets[at]  # type: ignore[arg-type]


@dataclass
class FeatureStream:
    """Features computed anew for each batch, for data sets too large to store and augmented clips.

    Training clips differ from epoch to epoch with ``roll``, ``random_offset`` or ``noise``; long
    clips are cropped at random with the first two, else read from their start, as for the bank.
    """

    backbone: Encoder
    index: Index
    _: KW_ONLY
    frames: int | None
    """Frames of each clip; None: each clip is encoded at its own length (``encoding.encode``)."""
    clip_seconds: float
    roll: bool = False
    random_offset: bool = False
    noise: float = 0.0
    order: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of ``make_plan`` for the training clips: ``balance``, ``epoch_clips``."""
    min_seconds: float = 0.0
    max_seconds: float = MAX_FILE_SECONDS
    workers: int = 0
    cache_bytes: int = 0
    autocast: torch.dtype | None = None
    needs: Needs = field(default_factory=Needs)
    targets_of: TargetsOf | None = None
    bad_clips: BadClips = field(default_factory=lambda: BadClips(max_bad=1.0))

    def training(self, ids: np.ndarray, *, batch: int, steps: int, seed: int) -> Batches:
        from bat.data.module import (
            AudioData,  # imports Lightning: seconds, for augmented clips alone
        )

        data = AudioData(
            index=self.index,
            batch=batch,
            batches=steps,
            sample_rate=self.backbone.sample_rate,
            clip_seconds=self.clip_seconds,
            plan=make_plan(self.index, ids, seed=seed, **self.order),
            seed=seed,
            roll=self.roll,
            random_offset=self.random_offset,
            noise=self.noise,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
            workers=self.workers,
            cache_bytes=self.cache_bytes,
        )
        if not (self.roll or self.random_offset):
            data.dataset.crop = "start"  # the default of AudioData is random
        return self._counted(data.train_dataloader())

    def once(self, ids: np.ndarray, *, batch: int) -> Batches:
        return self._counted(self.loader(ids, batch=batch))

    def readable(self, ids: np.ndarray) -> list[str]:
        keys = map(self.index.key, ids)
        return [key for key in keys if key not in self.bad_clips.keys]

    def loader(self, ids: np.ndarray, *, batch: int, workers: int | None = None) -> Loader:
        """Returns a loader of the waves of ``ids``, each once, in order."""
        return eval_loader(
            self.index,
            ids,
            batch=batch,
            sample_rate=self.backbone.sample_rate,
            clip_seconds=self.clip_seconds,
            workers=self.workers if workers is None else workers,
            cache_bytes=self.cache_bytes,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
        )

    def encoded(self, batches: Iterable[WaveBatch]) -> Iterator[tuple[Features, Tensor, WaveBatch]]:
        """Yields features and targets of each non-empty batch, with the encoder in eval mode."""
        for batch in batches:
            if not batch.keys:
                continue
            with evaluating(self.backbone):
                features = encode(
                    self.backbone,
                    batch,
                    frames=self.frames,
                    autocast=self.autocast,
                    needs=self.needs,
                )
            targets = batch.targets
            if self.targets_of is not None:
                targets = self.targets_of(batch, features.patches.shape[2])  # (B, T, C)
                inside = features.inside()
                # Kaldi's last window ends before the clip does
                if inside is not None and targets.ndim == 3:
                    targets = targets.masked_fill(~inside.to(targets.device)[..., None], torch.nan)
            yield features, targets, batch

    def _counted(self, batches: Iterable[WaveBatch]) -> Batches:
        """Yields features and targets; adds unreadable clips to ``bad_clips``."""

        def checked() -> Iterator[WaveBatch]:
            for batch in batches:
                self.bad_clips.add(batch)
                self.bad_clips.check()
                yield batch

        for features, targets, _ in self.encoded(checked()):
            yield features, targets


def to_device(features: Features, device: torch.device) -> Features:
    """Returns the same features on ``device``."""
    moved = (None if t is None else t.to(device, non_blocking=True) for t in features)
    return Features(*moved)  # type: ignore[arg-type]
