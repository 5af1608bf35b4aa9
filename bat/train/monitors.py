"""Computes the monitors of a pre-training: numbers that need no training, beside online probes.

Every evaluation uses the same clips, so that values of one run differ by the weights alone; step 0
is before training: the random-init baseline, unless ``init=`` is given. All is of an encoder's
last block, in eval mode. ``knn`` and ``rankme`` use at most a tenth as many clips as a device
trains on between two evaluations, and 256 in any case: a step of training costs several passes of
the encoder for each clip, an evaluation one (the student's; a probed teacher's features are at
hand).

- ``knn`` (accuracy, or mAP if clips have several labels): ``diagnostics.knn_scores`` over the folds
  of the online probes. A clip's vector is the mean of its patch tokens beside the class token, if
  there is one, each of length 1: the cosine is the mean of both. k = 20; other k as ``_k10`` etc.,
  as far as there are as many clips to train on.
- ``rankme``: ``effective_rank`` of the means of patch tokens (N, D) of all N clips, not centred,
  eps 1e-7. Comparable within a run only, since it grows with N.
- ``lidar``: ``diagnostics.lidar`` of 128 clips of 4 views. A view is a fifth of a clip's patches,
  drawn uniformly whatever the objective's own masks are; its vector is the class token. Only
  encoders that can be masked have it.
- ``position``: the objective's local loss, and the loss of the best prediction from position alone,
  which is the targets' variance over clips at each position (unbiased; mean over positions and
  channels), on 16 clips. The audio is used if the former is below the latter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bat.config.schema import Pretrain
from bat.encoders.base import Encoder, MaskableEncoder
from bat.eval.collapse import effective_rank
from bat.eval.diagnostics import KS, RANKME_EPS, knn_scores, lidar
from bat.eval.features import FeatureStream, Source, device_of, evaluating
from bat.eval.fit import preserve_rng_state
from bat.eval.loading import autocast_for
from bat.eval.results import FoldResult
from bat.eval.splits import Split
from bat.metrics.base import find_metric
from bat.nn.masking import inverse_block_mask, row_seeds
from bat.objectives.base import Objective
from bat.probes.base import mean_patch
from bat.seeding import derive_seed
from bat.tasks.base import Task

log = logging.getLogger("bat")

K = 20
"""Neighbours of ``knn`` itself; DINO's choice."""
LIDAR_CLIPS, VIEWS, VISIBLE = 128, 4, 0.2
POSITION_CLIPS = 16
FEWEST = 256
"""Clips that kNN and RankMe use however short the interval is."""


class Monitors:
    """Monitors of one run on some of the clips ``ids``; ``splits``: folds, none without labels."""

    def __init__(
        self, config: Pretrain, *, task: Task, splits: Sequence[Split], ids: np.ndarray
    ) -> None:
        self.config, self.task, self.splits = config, task, splits
        self.seed = derive_seed(config.seed, "monitors")
        self.order = np.random.default_rng(self.seed).permutation(ids)
        between = config.online.every * config.data.batch
        self.ids = np.sort(self.order[: max(FEWEST, between // 10)])
        asked, self.told = set(config.online.monitors), set[str]()
        self.asked = asked if splits else asked - {"knn"}

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = autocast_for(self.config.hardware)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def tell_missing(self, keys: Sequence[str]) -> None:
        """Says once which monitors are not among the ``keys`` of an evaluation."""
        marks = {name: f"/{name}" for name in self.asked} | {"position": "/position_only_loss"}
        for name in sorted(self.asked - self.told):
            if not any(key.endswith(marks[name]) for key in keys):
                log.warning(
                    "online.monitors: %s is not computed: this encoder, objective or data lacks "
                    "what it needs (docs/own_audio.md)",
                    name,
                )
        self.told |= self.asked

    @property
    def reads_features(self) -> bool:
        """True if ``of_encoder`` reads the patches of the last block from its source."""
        return bool(self.asked & {"knn", "rankme"})

    def of_encoder(
        self,
        name: str,
        encoder: Encoder,
        source: Source,
        stream: FeatureStream,
        on_step: Callable[[], None] = lambda: None,
    ) -> tuple[list[FoldResult], dict[str, float]]:
        """Returns the kNN results (method ``NAME/knn``) and the scalars by key of an encoder.

        ``source``: gives the features of ``stream``, or is ``stream``. ``on_step`` is called after
        each batch and may raise.
        """
        results: list[FoldResult] = []
        scalars: dict[str, float] = {}
        # other shapes than the training's are not compiled; a loader draws a number
        with torch.compiler.set_stance("force_eager"), preserve_rng_state(device_of(encoder)):
            if self.reads_features:
                means, vectors, targets = self._vectors(source, on_step)
                if "rankme" in self.asked:
                    scalars[f"online/{name}/rankme"] = effective_rank(means, eps=RANKME_EPS)
                if "knn" in self.asked:
                    keys = set(source.readable(self.ids))
                    read = np.array([i for i in self.ids if stream.index.key(i) in keys])
                    for held in self.splits:
                        train, test = np.isin(read, held.train), np.isin(read, held.test)
                        if train.any() and test.any():
                            found = self._scored(vectors, targets, train, test)
                            results.append(FoldResult(f"{name}/knn", held.name, found))
            if "lidar" in self.asked and isinstance(encoder, MaskableEncoder):
                views = self._views(encoder, stream, on_step)  # (n, VIEWS, D)
                if len(views) > 1:
                    scalars[f"online/{name}/lidar"] = lidar(views)
        return results, scalars

    def of_objective(
        self,
        objective: Objective,
        stream: FeatureStream,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> dict[str, float]:
        """Returns ``local_loss`` and ``position_only_loss`` by key; nothing for an objective
        without ``local_targets``. Under FSDP2 every rank must call it, within
        ``TrainingModule.within``, with ``gather``, which collects a value of each rank."""
        batch_size = min(self.config.data.batch, POSITION_CLIPS)
        ids = np.sort(self.order[:POSITION_CLIPS])
        device = device_of(objective)
        total, clips, targets = 0.0, 0, []
        with (
            torch.compiler.set_stance("force_eager"),
            preserve_rng_state(device),
            evaluating(objective),
            torch.no_grad(),
            self._autocast(device),
        ):
            torch.manual_seed(self.seed)  # noise of a decoder
            batches = [b for b in stream.loader(ids, batch=batch_size) if b.keys]
            if gather is not None:  # a rank with fewer batches would let the others wait
                read = gather([b.keys for b in batches])
                if any(keys != read[0] for keys in read):
                    log.warning("online monitors: not all ranks could read the clips of position")
                    return {}
            for batch in batches:
                batch = batch.to(device)
                found = objective.local_targets(batch)
                if found is None:
                    return {}
                scalar, wanted = found  # (B, N, P)
                total += len(batch.keys) * float(objective(batch)[scalar])
                clips += len(batch.keys)
                targets.append(wanted.float())
        if clips < 2:
            return {}
        return {
            "online/objective/local_loss": total / clips,
            "online/objective/position_only_loss": float(torch.cat(targets).var(0).mean()),
        }

    def _vectors(
        self, source: Source, on_step: Callable[[], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns means of patch tokens (n, D), vectors for kNN (n, D or 2 D), targets (n, C)."""
        means, vectors, targets = [], [], []
        for features, wanted in source.once(self.ids, batch=self.config.online.batch):
            mean = mean_patch(features.patches[-1], features).float()  # (B, D)
            tokens = [mean] if features.cls is None else [mean, features.cls[-1].float()]
            means.append(mean.cpu())
            vectors.append(torch.cat([F.normalize(t, dim=1) for t in tokens], dim=1).cpu())
            targets.append(wanted.cpu())
            on_step()
        return torch.cat(means), torch.cat(vectors), torch.cat(targets)

    def _scored(
        self, vectors: Tensor, targets: Tensor, train: np.ndarray, test: np.ndarray
    ) -> dict[str, Any]:
        """Returns the task's metrics of kNN in one fold, the main one also for the other k."""
        task, known, asked = self.task, torch.from_numpy(train), torch.from_numpy(test)
        scores = knn_scores(vectors[known], targets[known], vectors[asked])
        metric, name = find_metric(task.metric)
        settings: dict[str, Any] = {"multi_label": task.multi_label}
        found: dict[str, Any] = {}
        for k in (K, *(k for k in KS if k != K and k <= train.sum())):
            p = scores[k].clamp(1e-12, 1 - 1e-12)
            logits = torch.logit(p) if task.multi_label else p.log()
            computed = metric(**settings)
            computed.update(logits, targets[asked])
            values = computed.compute()
            if k == K:
                found |= {name: values[name]} | values
            else:
                found[f"{name}_k{k}"] = values[name]
        return found

    @torch.no_grad()
    def _views(
        self, encoder: MaskableEncoder, stream: FeatureStream, on_step: Callable[[], None]
    ) -> Tensor:
        """Returns the class tokens of masked views, (n, VIEWS, D) float32."""
        device, found = device_of(encoder), []
        ids = np.sort(self.order[:LIDAR_CLIPS])
        for batch in stream.loader(ids, batch=self.config.online.batch):
            if not batch.keys:
                continue
            inputs = encoder.inputs(
                batch.waves.to(device), batch.lengths.to(device), frames=stream.frames
            )
            seeds = row_seeds(self.seed, batch.positions, VIEWS).to(device)
            views = inverse_block_mask(
                len(seeds), encoder.grid, keep_ratio=VISIBLE, block=1, adjust=0.0, seeds=seeds
            )
            with evaluating(encoder), self._autocast(device):
                cls, _visible = encoder.encode_views(inputs, views)
            found.append(cls.float().unflatten(0, (-1, VIEWS)).cpu())
            on_step()
        return torch.cat(found) if found else torch.empty(0)
