"""Fine-tunes an encoder from a resolved configuration: each fold in turn, then the result table.

``OUT/fold-K/`` holds a fold's checkpoints, metrics and curves, and once it is finished its encoder
(``export/``), its head (``head/``) and, last, ``result.json``. A killed run, started again, reads
the results of finished folds and resumes the unfinished one.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bat import __version__
from bat import weights as checkpoint
from bat.config import schema
from bat.config.compose import to_dict
from bat.data.bad_clips import BadClips
from bat.data.module import AudioData
from bat.errors import UserError
from bat.eval.event_pictures import draw_events
from bat.eval.features import FeatureStream
from bat.eval.fit import predictions, preserve_rng_state
from bat.eval.hardware import speed_up, with_precision
from bat.eval.heads import save_head
from bat.eval.loading import autocast_for, registered_name, weights_digest
from bat.eval.next_steps import after_finetuning
from bat.eval.prepare import Prepared, prepare
from bat.eval.results import HOW, FoldResult, summary, table
from bat.eval.run_folder import default_out, run_folder
from bat.eval.splits import Split
from bat.eval.targets import FrameTargets, TokenTargets
from bat.eval.transcripts import record
from bat.io import read_jsonl, write_json
from bat.logs import is_main, start_logging
from bat.nn.losses import against
from bat.probes.base import build_probe, check_level, find_probe, takes_encoder
from bat.redact import redact_tree
from bat.report.plots import chance_of, plot_curves, plot_folds
from bat.report.sections import TITLES
from bat.seeding import derive_seed
from bat.train.callbacks import Metrics
from bat.train.fitting import Fitting, dry_step
from bat.train.pretrain_data import audio_stream
from bat.train.processes import with_batch
from bat.train.selection import WEIGHTS as BEST
from bat.train.selection import Selection, load_selected
from bat.train.sharding import full_state, is_sharded
from bat.train.supervised import Supervised

log = logging.getLogger("bat")


def finetune(
    config: schema.Finetune,
    *,
    dry_run: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Fine-tunes as ``config`` says and returns the run folder. Resumes an existing run there.

    Raises ``Interrupted`` if the run was asked to end; it is saved and can be resumed.
    ``force``: resume although the settings differ. ``say``: gets the report at the end.
    """
    if takes_encoder(find_probe(config.method)):
        raise UserError(
            f"method={config.method} is made of a frozen encoder, and fine-tuning trains it: use "
            "it with bat-probe, or another head here"
        )
    asked, out = config, default_out(config)
    start_logging()
    ready = prepare(with_batch(with_precision(config, out)))
    config = ready.config
    _check(ready)
    run = Folds(ready, out, force=force)
    if dry_run:
        _dry_run(run)
        return out
    settled = replace(  # the batch that was asked for: the devices may differ when it resumes
        config,
        data=replace(config.data, batch=asked.data.batch),
        train=replace(config.train, accumulate=asked.train.accumulate),
    )
    with run_folder(settled, out, force=force) as begin:
        _run(run, out, asked, begin, say)
    return out


def _check(ready: Prepared[schema.Finetune]) -> None:
    """Raises ``UserError`` for settings that do not fit the task or the data."""
    config = ready.config
    check_level(find_probe(config.method), config.level)
    if ready.targets_of is not None and config.augment.time_roll:
        raise UserError("augment.time_roll=true moves clips, not their events or texts: say false")
    if ready.task.target == "tokens" and config.augment.mixup_p:
        raise UserError(
            f"augment.mixup_p={config.augment.mixup_p}: texts cannot be mixed; say "
            "augment.mixup_p=0"
        )
    if ready.frames is None and config.hardware.shards:
        raise UserError(
            f"hardware.strategy={config.hardware.strategy} needs the same shapes on all devices, "
            "and clips of their own length have others: say frames=NUMBER, or "
            "hardware.strategy=ddp"
        )


def _run(
    run: Folds,
    out: Path,
    asked: schema.Finetune,
    begin: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    config, ready = run.config, run.ready
    if all(run.read(held) is not None for held in ready.splits):
        log.info("nothing to do: %s is finished", out)
        begin()
    start = f"bat {__version__}: fine-tuning {config.checkpoint} ({config.weights}) in {run.out}"
    steps = f"{config.train.steps} steps of {config.data.batch} x {config.train.accumulate} clips"
    head = f"head {config.method}: {len(ready.splits)} fold(s), {steps} a device"
    log.info("%s", ready.headline(start, head))
    results = [run.fold(held, begin) for held in ready.splits]
    if not is_main():  # other ranks only take part in training
        return
    fold_results = [FoldResult(config.method, r["held_out"], r["metrics"]) for r in results]
    metric = ready.task.metric
    found = summary(fold_results, metric=metric)
    plot_folds(
        {config.method: {o.fold: o.metrics[metric] for o in fold_results}},
        out / "plots" / "folds.png",
        metric=TITLES[metric],
        chance=chance_of(metric, len(ready.labels)),
        title=f"Fine-tuned {TITLES[metric]} by held-out fold",
    )
    write_json(
        out / "summary.json",
        {
            "checkpoint": config.checkpoint,
            "weights": config.weights,
            "task": ready.task.name,
            "data": ready.hash,
            "how": run.how,
            "clips": len(ready.recordings),
            "labels": list(ready.labels),
            "bad_clips": {r["held_out"]: r["bad_clips"] for r in results},
            "held_out_bad": {r["held_out"]: r["held_out_bad"] for r in results},
            "results": found,
            "seconds": round(sum(r.get("seconds", 0.0) for r in results), 1),
            "precision": config.hardware.precision,
            "version": __version__,
        },
    )
    for result in results:
        log.info("held out %s: %s", result["held_out"], result["bad"])
    say(_report(asked, run, found))


class Folds:
    """Trains and evaluates each fold and writes its result; skips finished folds.

    A fold's result records hashes of the data and of the initial weights besides the settings, so
    one made from others is never reused.
    """

    def __init__(self, ready: Prepared[schema.Finetune], out: Path, *, force: bool = False) -> None:
        """``force``: start a fold from scratch if it has checkpoints and none loads."""
        self.ready, self.out, self.force = ready, out, force
        self.config, self.task, self.index = ready.config, ready.task, ready.index
        self.backbone, self.frames = ready.backbone, ready.frames
        self.made_from = {"data": ready.index.hash, "encoder": weights_digest(ready.backbone)}
        """Hashes that a finished fold's result depends on besides the settings."""
        if ready.targets_of is not None:
            self.made_from[ready.task.target] = ready.targets_of.digest

    def module(self, held: Split) -> Supervised:
        """Returns a fresh copy of the encoder with a fresh head."""
        backbone = copy.deepcopy(self.backbone)
        with preserve_rng_state(torch.device("cpu")):
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

    def data(self, held: Split) -> AudioData:
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

    def fold(self, held: Split, begin: Callable[[], None]) -> dict[str, Any]:
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
            config,
            folder,
            module=module,
            data=data,
            name=name,
            force=self.force,
            begin=begin_fold,
            online=partial(self._selection, held, folder) if config.validate_every else None,
        )
        trainer, newest = fitting.trainer, fitting.newest
        start = f"continuing from {newest}" if newest else "starting"
        log.info("held out %s: %s, %d clips to train on", held.name, start, len(held.train))
        with fitting.running():
            trainer.fit(module, datamodule=data, ckpt_path=fitting.resume_from)
        begin()  # a training that was finished before had no start
        module = self._whole(module, held).to(trainer.strategy.root_device)
        trainer.strategy.barrier()  # the first rank has written the best weights
        chosen = load_selected(module, folder) if config.validate_every else {}
        metrics, held_out_bad = self._evaluate(module, held.test, folder)
        result = {
            "held_out": held.name,
            "metrics": metrics,
            "how": self.how,
            "selected": chosen,
            "steps": trainer.global_step,
            **fitting.facts(),
            "bad_clips": data.bad_clips.state_dict(),
            "held_out_bad": held_out_bad.state_dict(),
            "bad": f"training: {data.bad_clips.summary()}; evaluation: {held_out_bad.summary()}",
            "made_from": self.made_from,
        }
        if trainer.is_global_zero:
            self._write(module.cpu(), folder, result)
            (folder / BEST).unlink(missing_ok=True)
        trainer.strategy.barrier()  # all ranks wait until the result is written
        return result

    def read(self, held: Split) -> dict[str, Any] | None:
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

    def _whole(self, module: Supervised, held: Split) -> Supervised:
        """Returns ``module``, or an unsharded copy if each process holds only a part of it."""
        if not is_sharded(module):
            return module
        state = full_state(module, everywhere=True)
        whole = self.module(held)
        whole.load_state_dict(state)
        return whole

    @property
    def how(self) -> str:
        """Returns how the results are obtained, a sentence."""
        return self.ready.how if self.config.validate_every else HOW

    def _selection(self, held: Split, folder: Path, *, metrics: Metrics, **_: Any) -> Selection:
        """Returns the callback that selects a step on the validation clips of ``held``."""
        valid = held.valid
        assert valid is not None
        return Selection(
            folder,
            every=self.config.validate_every,
            metric=self.task.selection_metric,
            evaluate=lambda module: self._evaluate(module, valid)[0],
            metrics=metrics,
        )

    def _evaluate(
        self, module: Supervised, ids: NDArray[np.int64], folder: Path | None = None
    ) -> tuple[dict[str, Any], BadClips]:
        """Returns the metrics on the clips ``ids`` (each process evaluates all) and bad clips.

        ``folder``: where transcripts are listed, and transcripts or events drawn."""
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
        batches = stream.once(ids, batch=config.data.batch)
        found = predictions({"head": module.head}, batches, autocast=autocast)
        bad.check(final=True)
        logits = found.logits["head", ""]
        if config.window_scores and folder is not None and is_main():
            self.ready.write_scores(folder / "scores.csv", logits, stream.readable(ids))
        targets_of = self.ready.targets_of
        if folder is not None and isinstance(targets_of, FrameTargets) and is_main():
            draw_events(
                logits,
                found,
                self.ready.scorer,
                labels=self.ready.labels,
                stream=stream,
                source=stream,
                ids=ids,
                picture=folder / "plots" / "events.png",
            )
        if folder is not None and isinstance(targets_of, TokenTargets) and is_main():
            record(
                logits,
                found,
                targets_of,
                stream=stream,
                source=stream,
                ids=ids,
                listed=folder / "utterances.csv",
                picture=folder / "plots" / "transcripts.png",
            )
        return self.ready.scorer.values(logits, found, stream, ids), bad

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
            "frames": self.frames,
            "clip_seconds": config.data.clip_seconds,
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


def _dry_run(run: Folds) -> None:
    """Builds everything and computes the loss of one batch without training."""
    splits = run.ready.splits
    module, data = run.module(splits[0]), run.data(splits[0])
    with dry_step(run.config, module, data) as batch:
        spectrogram, targets, features = module.encoded(batch, seed=0)
        logits = module.head(features)
        loss = against(module.loss, logits, targets, inside=module.head.inside(features))
    if loss.is_cuda:
        loss.backward()
    size = sum(p.numel() for p in module.parameters())
    if run.ready.note:
        print(run.ready.note)
    print(f"data      {len(run.index)} clips, {run.index.classes} labels, {len(splits)} fold(s)")
    print(f"input     {tuple(spectrogram.shape)} -> logits {tuple(logits.shape)}")
    groups = len(module.configure_optimizers().param_groups)
    print(f"model     {size / 1e6:.1f} M parameters in {groups} groups")
    print(f"loss      {loss.item():.4f} on {len(batch.waves)} clip(s), {loss.device}")
    print("dry run: nothing was trained, nothing was written but shards and their index")


def _report(asked: schema.Finetune, run: Folds, results: dict[str, dict[str, Any]]) -> str:
    out, folds = run.out, [f"fold-{held.name}" for held in run.ready.splits]
    others = f" (and of {', '.join(folds[1:])})" if folds[1:] else ""
    parts = [
        table(results),
        f"({run.how}; computed in {run.config.hardware.precision})",
        "Where everything is:\n"
        f"  results   {out}/summary.json, {out}/{folds[0]}/metrics.jsonl{others}\n"
        f"  encoders  {out}/{folds[0]}/export{others}; bat.load_encoder reads one\n"
        f"  heads     {out}/{folds[0]}/head{others}\n"
        f"  pictures  {out}/plots/, {out}/{folds[0]}/plots/{others}",
    ]
    if found := after_finetuning(asked, out):
        parts.append("\n  ".join(["Next:", *found]))
    return "\n\n".join(parts)
