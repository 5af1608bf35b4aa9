"""Runs the diagnostics of an encoder: statistics of its blocks, and prototype maps."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from bat.eval.diagnostics import choose_clips, encoder_statistics, prototype_maps
from bat.eval.features import FeatureStream
from bat.eval.fit import predictions
from bat.eval.heads import load_head
from bat.eval.notes import read_note, write_note
from bat.eval.suite import MAPPED, Evaluation
from bat.probes.base import Probe

log = logging.getLogger("bat")


def statistics_of(evaluation: Evaluation) -> dict[str, Any]:
    """Returns ``diagnostics.encoder_statistics`` on held-out clips, kept in
    ``insight/ENCODER.json``."""
    if not evaluation.config.insight.encoder:
        return {}
    clips = evaluation.config.insight.clips
    file = evaluation.out / "insight" / f"{evaluation.name}.json"
    asked = {**evaluation.made_from, "clips": clips}
    if (kept := read_note(file, asked)) is not None:
        return kept
    held = np.unique(np.concatenate([r.test for r in evaluation.ready.rounds]))
    chosen = np.random.default_rng(evaluation.config.seed).permutation(held)[:clips]
    found = encoder_statistics(
        evaluation.backbone, evaluation.waves(np.sort(chosen)), frames=evaluation.ready.frames
    )
    write_note(file, asked, found)
    return found


def maps_of(evaluation: Evaluation) -> tuple[str, list[dict[str, Any]]]:
    """Returns the probe, and what its prototypes select in held-out clips of the last fold.

    In the form of ``report.probe_plots.plot_prototype_maps``; ("", []) if nothing can be drawn:
    no trained probe with prototypes, frame labels, or unreadable clips that are not all known.
    """
    count, held = evaluation.config.insight.maps, evaluation.ready.rounds[-1]
    found = _mapped(evaluation) if count else None
    if found is None or evaluation.ready.targets_of is not None:
        return "", []
    name, probe = found
    source = evaluation.opened.source if evaluation.opened is not None else _stream(evaluation)
    batches = source.once(held.test, batch=evaluation.config.data.batch)
    judged = predictions({name: probe}, batches, autocast=evaluation.autocast)
    readable = [i for i in held.test.tolist() if evaluation.index.key(i) not in evaluation.bad.keys]
    if len(readable) != len(judged.targets):
        log.warning("no prototype maps: too many clips cannot be read")
        return "", []
    pairs = choose_clips(judged.logits[name, ""], judged.targets, count=count)
    maps = prototype_maps(
        probe,
        evaluation.backbone,
        evaluation.waves(np.array([readable[row] for _, row in pairs], np.int64)),
        classes=[c for c, _ in pairs],
        labels=evaluation.index.vocabulary,
        frames=evaluation.ready.frames,
        autocast=evaluation.autocast,
    )
    return name, maps


def _mapped(evaluation: Evaluation) -> tuple[str, Probe] | None:
    """Returns the preferred probe with prototypes, trained now or, in a resumed run, before."""
    for name in (m for m in MAPPED if m in evaluation.methods):
        if evaluation.mapped is not None and evaluation.mapped[0] == name:
            return evaluation.mapped
        folder = evaluation.head_folder(
            name, evaluation.ready.rounds[-1].name, evaluation.config.seed
        )
        if folder.is_dir():
            return name, load_head(folder)[0].to(evaluation.device)
    return None


def _stream(evaluation: Evaluation) -> FeatureStream:
    """Returns the features of a resumed run with nothing to train: encodes only the drawn clips."""
    data = evaluation.config.data
    return FeatureStream(
        evaluation.backbone,
        evaluation.index,
        frames=evaluation.ready.frames,
        clip_seconds=data.clip_seconds,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        workers=data.workers,
        autocast=evaluation.autocast,
        needs=evaluation.needs(),
        bad_clips=evaluation.bad,
    )
