"""BirdSet from its published files to the metric: planted songs, permuted labels, shards, noise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.features import FeatureStream
from bat.eval.prepare import prepare
from bat.eval.probe import probe
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.train.finetune import finetune
from bat.types import Grid
from bat.weights import export
from tests.tasks.birds import SPECIES, write_set


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of songs in ``HSN/`` and a narrow random encoder in ``encoder/``."""
    root = tmp_path_factory.mktemp("birds")
    choices = [c for n in (1, 2) for c in itertools.combinations(SPECIES, n)]
    train = {f"XC{i}.ogg": (choices[i % 6], 5.0 + 0.5 * (i % 4)) for i in range(36)}
    test = {f"t{i}.ogg": ((*choices, ())[i % 7], 5.0) for i in range(28)}
    write_set(root / "HSN", {"train": train, "test_5s": test})
    torch.manual_seed(0)
    model = BAT(width=48, depth=2, heads=2, grid=Grid(32, 8))
    model.patch_embed.proj.weight.data *= 8  # louder than the position code
    state = {"student": model.state_dict()}
    export(root / "encoder", backbone="bat", encoder=model.config(), weights=state, meta={})
    return root


def words(work: Path, out: Path, *more: str) -> list[str]:
    made = ["recipe=hsn", "hardware=cpu", "data.workers=0", "log.progress=false", "data.batch=8"]
    made += [f"data.cache={work / 'cache'}", f"checkpoint={work / 'encoder'}", f"out={out}"]
    made += ["optim.warmup_steps=5", *more]
    return made if any(w.startswith("data.shards") for w in more) else [*made, f"data.root={work}"]


PROBE = ("methods=[abmilp]", "head.prototypes=64", "bootstrap=0", "diagnostics.encoder=false")
PROBE += ("diagnostics.maps=0", "optim.lr=0.1")
STILL = ("data.noise=0", "pad_offset=start", "train.steps=300")
"""Training clips that are the same in every epoch: their features are kept."""


def probed(work: Path, out: Path, *more: str) -> dict[str, Any]:
    probe(compose(Probe, "probe", words(work, out, *PROBE, *more)))
    summary = json.loads((out / "summary.json").read_text())
    (entry,) = summary["encoders"].values()
    found: dict[str, Any] = entry["results"]["abmilp"]["mean"]
    return {**found, "cache": entry["features"]["cache"]}


def test_hsn__planted_songs_are_found_and_permuted_ones_are_not(work: Path, tmp_path: Path) -> None:
    found = probed(work, tmp_path / "run", *STILL)
    assert found["map"] > 0.85  # clips without a bird are new to it
    chance = probed(work, tmp_path / "chance", *STILL, "permute_labels=true")
    assert chance["map"] < 0.6  # three of seven clips have each species


def test_hsn__shards_give_the_same_numbers(work: Path, tmp_path: Path) -> None:
    packed = open_rows(work / "HSN")
    for split in ("train", "test"):
        rows = [row for row in packed.rows if row.split == split]
        write_shards(rows, tmp_path / "shards" / split, vocabulary=packed.vocabulary)
    found = probed(work, tmp_path / "run", "train.steps=3")
    assert found["cache"] == "off"  # noise and places differ from epoch to epoch
    shards = f"data.shards=[{tmp_path / 'shards'}]"
    assert probed(work, tmp_path / "again", "train.steps=3", shards) == found


def test_hsn__a_clip_that_is_evaluated_has_no_noise_and_one_that_trains_has(work: Path) -> None:
    ready = prepare(compose(Probe, "probe", words(work, work / "run", *PROBE)))
    (held,) = ready.splits
    how = {"frames": ready.frames, "clip_seconds": 5.0}
    noisy = FeatureStream(ready.backbone, ready.index, noise=0.02, **how)
    plain = FeatureStream(ready.backbone, ready.index, **how)
    a, b = (next(s.once(held.test, batch=2))[0].patches for s in (noisy, plain))
    assert torch.equal(a, b)
    a, b = (
        next(s.training(held.train, batch=2, steps=1, seed=0))[0].patches for s in (noisy, plain)
    )
    assert (a - b).abs().max() > 1e-3


def test_hsn__cached_features_with_noise_are_refused(work: Path) -> None:
    with pytest.raises(UserError, match=r"features\.cache=memory with data\.noise=0\.02"):
        compose(Probe, "probe", words(work, work / "run", "features.cache=memory"))


def test_hsn__is_fine_tuned_and_the_export_keeps_its_rate(work: Path, tmp_path: Path) -> None:
    more = ("train.steps=2", "train.save_every=2", "drop_path=0")
    out = finetune(compose(Finetune, "finetune", words(work, tmp_path / "tuned", *more)))
    summary = json.loads((out / "summary.json").read_text())
    assert {"map", "f1"} <= set(summary["results"]["linear"]["mean"])
    front = json.loads((out / "fold-test/export/config.json").read_text())["encoder"]["frontend"]
    assert [front[n] for n in ("sample_rate", "n_fft", "hop_length")] == [32_000, 2_048, 320]
