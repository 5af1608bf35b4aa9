"""``data.max_seconds`` reaches every loader that reads clips.

Each caller meets a stand-in that tells what it was called with, and nothing is read.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bat.config import schema
from bat.config.probing import FeatureStore
from bat.data.bad_clips import BadClips
from bat.data.module import AudioData
from bat.data.sequential import SequentialData
from bat.eval import feature_cache, features
from bat.train import online, pretrain_data
from bat.train.finetune import Folds
from bat.train.pretrain_data import open_stream
from bat.types import Needs

LONGEST = 77.5  # not the default


class Called(Exception):  # noqa: N818
    """What a stand-in was called with."""

    def __init__(self, *_: Any, **given: Any) -> None:
        super().__init__()
        self.given = given


def stand_in(*given: Any, **more: Any) -> Any:
    raise Called(*given, **more)


def given_by(call: Any) -> dict[str, Any]:
    with pytest.raises(Called) as caught:
        call()
    given: dict[str, Any] = caught.value.given
    return given


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A ``Folds`` without folds."""
    config = schema.Finetune(hardware=schema.Hardware(precision="32-true"))
    config.data.max_seconds = LONGEST
    monkeypatch.setattr(pretrain_data, "make_plan", lambda *_, **__: None)
    monkeypatch.setattr(pretrain_data, "AudioData", stand_in)
    monkeypatch.setattr("bat.train.finetune.FeatureStream", stand_in)
    return SimpleNamespace(
        config=config,
        index=None,
        frames=16,
        out=Path("nowhere"),
        backbone=SimpleNamespace(sample_rate=16_000),
        ready=SimpleNamespace(targets_of=None),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_pretraining(small: Any, tmp_path: Path, packed: bool) -> None:
    words = [f"data.max_seconds={LONGEST}"]
    if packed:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(1024)))
        words.append(f"data.shards={tmp_path}")
    stream = open_stream(small(*words, out=tmp_path / "run")).data
    assert isinstance(stream, SequentialData if packed else AudioData)
    loader = stream.train_dataloader()
    assert loader.dataset.max_seconds == LONGEST  # type: ignore[attr-defined]


def test_training_of_a_fold(finetune: Any) -> None:
    given = given_by(lambda: Folds.data(finetune, SimpleNamespace(name="1", train=None)))
    assert given["max_seconds"] == LONGEST


def test_judging_a_fold(finetune: Any) -> None:
    module: Any = SimpleNamespace(backbone=None)
    given = given_by(lambda: Folds._evaluate(finetune, module, SimpleNamespace(test=None)))
    assert given["max_seconds"] == LONGEST


def test_online_probes(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "eval_loader", stand_in)
    config = small(f"data.max_seconds={LONGEST}", out=tmp_path)
    probe: Any = SimpleNamespace(config=config, index=None, ids=None)
    teacher: Any = SimpleNamespace(sample_rate=16_000)
    given = given_by(lambda: online.OnlineProbe.probe(probe, teacher, torch.device("cpu")))
    assert given["max_seconds"] == LONGEST


@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
def test_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Any) -> None:
    config = schema.Probe(hardware=schema.Hardware(precision="32-true"))
    config.data.max_seconds = LONGEST
    for name in ("eval_loader", "AudioData"):
        monkeypatch.setattr(features, name, stand_in)
    monkeypatch.setattr(features, "make_plan", lambda *_, **__: None)
    backbone: Any = SimpleNamespace(sample_rate=16_000, frontend=None)
    index: Any = SimpleNamespace(hash="")
    clips = np.arange(2)

    def source() -> Any:
        return feature_cache.open_features(
            backbone,
            index,
            ids=clips,
            frames=16,
            needs=Needs(),
            batch=1,
            store=FeatureStore(cache=cache, folder=str(tmp_path)),
            data=config.data,
            random_offset=False,
            autocast=None,
            device=torch.device("cpu"),
            bad_clips=BadClips(),
            progress=False,
            digest="",
        ).source

    assert given_by(source)["max_seconds"] == LONGEST  # a clip is measured
    monkeypatch.setattr(feature_cache, "measured", lambda *_, **__: 1000)
    if cache == "off":
        for call in (
            lambda: source().training(clips, batch=1, steps=1, seed=0),
            lambda: source().once(clips, batch=1),
        ):
            assert given_by(call)["max_seconds"] == LONGEST
    else:
        assert given_by(source)["max_seconds"] == LONGEST


def test_streams_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = SimpleNamespace(sample_rate=16_000)
    index: Any = None
    stream = features.FeatureStream(
        backbone, index, frames=16, clip_seconds=1.0, max_seconds=LONGEST
    )
    monkeypatch.setattr(features, "make_plan", lambda *_, **__: None)
    monkeypatch.setattr(features, "AudioData", stand_in)
    monkeypatch.setattr(features, "eval_loader", stand_in)
    ids = np.arange(2)
    given = given_by(lambda: stream.training(ids, batch=1, steps=1, seed=0))
    assert given["max_seconds"] == LONGEST
    assert given_by(lambda: stream.once(ids, batch=1))["max_seconds"] == LONGEST
