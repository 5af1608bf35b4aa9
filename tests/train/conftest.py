"""A run small enough for a test: the toy set, a very narrow encoder, a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bat.config.compose import compose
from bat.config.schema import Pretrain

SMALL = [
    "recipe=toy",
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "objective.decoder_depth=1",
    "objective.mask.views=2",
    "train.steps=6",
    "train.log_every=2",
    "train.save_every=2",
    "train.keep=2",
    "online.every=0",
    "log.progress=false",
]


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pretrain]:
    """``small("key=value", ..., out=folder)`` -> configuration; the toy set is made once."""
    cache = tmp_path_factory.getbasetemp() / "shards"

    def build(*words: str, out: Path) -> Pretrain:
        own = [f"out={out}", f"data.cache={cache}"]
        merged = dict(w.split("=", 1) for w in [*SMALL, *own, *words])
        return compose(Pretrain, "pretrain", [f"{k}={v}" for k, v in merged.items()])

    return build
