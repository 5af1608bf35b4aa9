"""Inside an encoder on the bench: statistics of its blocks, and what prototypes select."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from bat.eval.diagnostics import choose_clips, encoder_statistics, prototype_maps
from bat.eval.features import FeatureStream
from bat.eval.fit import predictions
from bat.eval.heads import load_head
from bat.eval.notes import read_note, write_note
from bat.eval.suite import MAPPED, Laboratory
from bat.probes.base import Probe

log = logging.getLogger("bat")


def statistics_of(lab: Laboratory) -> dict[str, Any]:
    """``insight.encoder_statistics`` on held-out clips, kept in ``insight/ENCODER.json``."""
    if not lab.config.insight.encoder:
        return {}
    clips = lab.config.insight.clips
    file = lab.out / "insight" / f"{lab.name}.json"
    asked = {**lab.made_from, "clips": clips}
    if (kept := read_note(file, asked)) is not None:
        return kept
    held = np.unique(np.concatenate([r.test for r in lab.ready.rounds]))
    chosen = np.random.default_rng(lab.config.seed).permutation(held)[:clips]
    found = encoder_statistics(lab.backbone, lab.waves(np.sort(chosen)), frames=lab.ready.frames)
    write_note(file, asked, found)
    return found


def maps_of(lab: Laboratory) -> tuple[str, list[dict[str, Any]]]:
    """The probe, and what its prototypes select in held-out clips of the last round.

    As ``report.probe_plots.plot_prototype_maps`` takes it; ("", []) where nothing can be drawn: no
    trained probe with prototypes, labels of frames, or unreadable clips that are not all known.
    """
    count, held = lab.config.insight.maps, lab.ready.rounds[-1]
    found = _mapped(lab) if count else None
    if found is None or lab.ready.targets_of is not None:
        return "", []
    name, probe = found
    source = lab.opened.source if lab.opened is not None else _stream(lab)
    batches = source.once(held.test, batch=lab.config.data.batch)
    judged = predictions({name: probe}, batches, autocast=lab.autocast)
    readable = [i for i in held.test.tolist() if lab.index.key(i) not in lab.bad.keys]
    if len(readable) != len(judged.targets):
        log.warning("no prototype maps: too many clips cannot be read")
        return "", []
    pairs = choose_clips(judged.logits[name, ""], judged.targets, count=count)
    maps = prototype_maps(
        probe,
        lab.backbone,
        lab.waves(np.array([readable[row] for _, row in pairs], np.int64)),
        classes=[c for c, _ in pairs],
        labels=lab.index.vocabulary,
        frames=lab.ready.frames,
        autocast=lab.autocast,
    )
    return name, maps


def _mapped(lab: Laboratory) -> tuple[str, Probe] | None:
    """The best-liked probe with prototypes, trained now or, in a run that goes on, before."""
    for name in (m for m in MAPPED if m in lab.methods):
        if lab.mapped is not None and lab.mapped[0] == name:
            return lab.mapped
        folder = lab.head_folder(name, lab.ready.rounds[-1].name, lab.config.seed)
        if folder.is_dir():
            return name, load_head(folder)[0].to(lab.device)
    return None


def _stream(lab: Laboratory) -> FeatureStream:
    """Features of a run that goes on and had nothing to train: only the drawn clips are encoded."""
    data = lab.config.data
    return FeatureStream(
        lab.backbone,
        lab.index,
        frames=lab.ready.frames,
        clip_seconds=data.clip_seconds,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        workers=data.workers,
        autocast=lab.autocast,
        needs=lab.needs(),
        bad_clips=lab.bad,
    )
