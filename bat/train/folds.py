"""Trains and evaluates each fold of a fine-tuning and writes its result; skips finished folds.

``OUT/fold-K/`` holds a fold's checkpoints, metrics and curves, and once it is finished its encoder
(``export/``), its head (``head/``) and, last, ``result.json``. The result records hashes of the
data and of the initial weights besides the settings, so one made from others is never reused.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bat import __version__
from bat import weights as checkpoint
from bat.config import schema
from bat.config.compose import to_dict
from bat.data.bad_clips import BadClips
from bat.data.module import AudioData
from bat.errors import UserError
from bat.eval.features import FeatureStream
from bat.eval.fit import own_randomness, predictions
from bat.eval.hardware import speed_up
from bat.eval.heads import save_head
from bat.eval.loading import autocast_for, registered_name, weights_digest
from bat.eval.prepare import Prepared
from bat.eval.results import HOW
from bat.eval.splits import Round
from bat.io import read_jsonl, write_json
from bat.logs import is_main
from bat.probes.base import build_probe
from bat.redact import redact_tree
from bat.report.plots import plot_curves
from bat.seeding import derive_seed
from bat.train.fitting import Fitting
from bat.train.pretrain_data import audio_stream
from bat.train.sharding import full_state, is_sharded
from bat.train.supervised import Supervised

log = logging.getLogger("bat")


class Folds:
    """State shared by the folds of a fine-tuning."""

    def __init__(self, ready: Prepared[schema.Finetune], out: Path, *, force: bool = False) -> None:
        """``force``: start a fold from scratch if it has checkpoints and none loads."""
        self.ready, self.out, self.force = ready, out, force
        self.config, self.task, self.index = ready.config, ready.task, ready.index
        self.backbone, self.frames = ready.backbone, ready.frames
        self.made_from = {"data": ready.index.hash, "encoder": weights_digest(ready.backbone)}
        """Hashes that a finished fold's result depends on besides the settings."""
        if ready.targets_of is not None:
            self.made_from[ready.task.target] = ready.targets_of.digest

    def module(self, held: Round) -> Supervised:
        """Returns a fresh copy of the encoder with a fresh head."""
        backbone = copy.deepcopy(self.backbone)
        with own_randomness(torch.device("cpu")):
            torch.manual_seed(derive_seed(self.config.seed, held.name, "init"))
            head = build_probe(
                self.config.method,
                classes=len(self.ready.labels),
                level=self.config.level,
                width=backbone.width,
                depth=backbone.depth,
                has_cls=backbone.has_cls,
                **asdict(self.config.head),
            )
        module = Supervised(
            self.config,
            backbone=backbone,
            head=head,
            loss=self.ready.loss,
            frames=self.frames,
            fold=held.name,
            start=self.made_from["encoder"],
            targets_of=self.ready.targets_of,
        )
        speed_up(backbone, self.config.hardware)
        return module

    def data(self, held: Round) -> AudioData:
        made = audio_stream(
            self.config,
            self.index,
            held.train,
            sample_rate=self.backbone.sample_rate,
            seed=derive_seed(self.config.seed, held.name, "order"),
            out=self.out / f"fold-{held.name}",
            random_offset=self.config.pad_offset == "random",
        )
        if self.ready.targets_of is not None:  # times count from the start of the clip
            made.dataset.crop = "start"
        return made

    def fold(self, held: Round, begin: Callable[[], None]) -> dict[str, Any]:
        """Trains with ``held`` held out, evaluates and writes the folder, or reads it if finished.

        ``begin`` is called before anything is written."""
        folder = self.out / f"fold-{held.name}"
        before = self.read(held)
        if before is not None:
            log.info("held out %s: done before, read from %s", held.name, folder / "result.json")
            return before
        config = self.config

        def begin_fold() -> None:
            begin()
            if is_main():  # another process could get here before the run folder was checked
                folder.mkdir(parents=True, exist_ok=True)

        module, data = self.module(held), self.data(held)
        name = f"finetune-{config.recipe}-{held.name}"
        fitting = Fitting(
            config, folder, module=module, data=data, name=name, force=self.force, begin=begin_fold
        )
        trainer, newest = fitting.trainer, fitting.newest
        start = f"continuing from {newest}" if newest else "starting"
        log.info("held out %s: %s, %d clips to train on", held.name, start, len(held.train))
        with fitting.running():
            trainer.fit(module, datamodule=data, ckpt_path=fitting.resume_from)
        begin()  # a training that was finished before had no start
        module = self._whole(module, held).to(trainer.strategy.root_device)
        metrics, held_out_bad = self._evaluate(module, held)
        result = {
            "held_out": held.name,
            "metrics": metrics,
            "how": HOW,
            "steps": trainer.global_step,
            **fitting.facts(),
            "bad_clips": data.bad_clips.state_dict(),
            "held_out_bad": held_out_bad.state_dict(),
            "bad": f"training: {data.bad_clips.summary()}; evaluation: {held_out_bad.summary()}",
            "made_from": self.made_from,
        }
        if trainer.is_global_zero:
            self._write(module.cpu(), folder, result)
        trainer.strategy.barrier()  # all ranks wait until the result is written
        return result

    def read(self, held: Round) -> dict[str, Any] | None:
        """Returns the result of a finished fold, or None. Raises ``UserError`` if it was made from
        other data or initial weights."""
        done = self.out / f"fold-{held.name}" / "result.json"
        if not done.is_file():
            return None
        try:
            result: dict[str, Any] = dict(json.loads(done.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{done} is damaged ({error}): remove {done.parent}") from error
        then = result.get("made_from") or {}
        other = [what for what, now in self.made_from.items() if then.get(what) != now]
        if other:
            raise UserError(
                f"{done} was made from other {' and '.join(other)} than this run has: remove "
                f"{done.parent} to train it again, or give another out="
            )
        return result

    def _whole(self, module: Supervised, held: Round) -> Supervised:
        """Returns ``module``, or an unsharded copy if each process holds only a part of it."""
        if not is_sharded(module):
            return module
        state = full_state(module, everywhere=True)
        whole = self.module(held)
        whole.load_state_dict(state)
        return whole

    def _evaluate(self, module: Supervised, held: Round) -> tuple[dict[str, Any], BadClips]:
        """Returns the metrics on the held-out clips (each process evaluates all) and bad clips."""
        config, autocast = self.config, autocast_for(self.config.hardware)
        bad = BadClips(max_bad=config.data.max_bad)
        stream = FeatureStream(
            module.backbone,
            self.index,
            frames=self.frames,
            clip_seconds=config.data.clip_seconds,
            min_seconds=config.data.min_seconds,
            max_seconds=config.data.max_seconds,
            workers=config.data.workers,
            autocast=autocast,
            targets_of=self.ready.targets_of,
            bad_clips=bad,
        )
        batches = stream.once(held.test, batch=config.data.batch)
        found = predictions({"head": module.head}, batches, autocast=autocast)
        bad.check(final=True)
        logits = found.logits["head", ""]
        return self.ready.scorer.values(logits, found, stream, held.test), bad

    def _write(self, module: Supervised, folder: Path, result: dict[str, Any]) -> None:
        """Writes encoder, head and curves of a finished fold; ``result.json`` last."""
        config = self.config
        meta = {
            "bat_version": __version__,
            "task": self.task.name,
            "target": self.task.target,
            "labels": list(self.ready.labels),
            "held_out": result["held_out"],
            "metrics": result["metrics"],
        }
        checkpoint.export(
            folder / "export",
            backbone=registered_name(module.backbone),
            encoder=module.backbone.config(),
            weights={"student": module.backbone.state_dict()},
            meta={**meta, "training": redact_tree(to_dict(config))},
        )
        save_head(
            folder / "head", module.head, name=config.method, head=asdict(config.head), meta=meta
        )
        plot_curves(read_jsonl(folder / "metrics.jsonl"), folder / "plots" / "curves.png")
        write_json(folder / "result.json", result)
