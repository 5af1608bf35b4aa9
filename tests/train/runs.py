"""What tests of training runs share: cutting a run short, comparing two, spoiling clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bat.config.schema import Pretrain
from bat.data.index import open_index
from bat.io import read_jsonl
from bat.train.pretrain import Pretraining
from bat.train.run_pretrain import pretrain


class CutError(Exception):
    """Stands for whatever ends a process."""


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


def metrics(out: Path) -> list[dict]:
    """Rows without what the clock decides."""
    rows = read_jsonl(out / "metrics.jsonl")
    clock = ("clips_per_second", "loader_wait", "online/seconds")
    return [{k: v for k, v in r.items() if k not in clock} for r in rows]


def assert_same_run(a: Path, b: Path, *, events: bool = True) -> None:
    """Equal weights and lines; without ``events`` those lines are left out."""
    left, right = weights(a), weights(b)
    assert set(left) == set(right)
    different = [n for n in left if not torch.equal(left[n], right[n])]
    assert not different, different
    rows = [[r for r in metrics(out) if events or "event" not in r] for out in (a, b)]
    assert rows[0] == rows[1]


def damage(shards: Path, *clips: int) -> None:
    """Overwrites these clips with zeros."""
    index = open_index(shards)
    for clip in clips:
        with index.place(int(index.shard[clip])).open("r+b") as file:  # type: ignore[union-attr]
            file.seek(int(index.offset[clip]))
            file.write(b"\0" * int(index.size[clip]))


def at_batch(monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], None]) -> None:
    """Calls ``do()`` within the training step of micro-batch ``at``."""
    original = Pretraining.training_step

    def step(self, batch, batch_idx):
        if batch_idx == at:
            do()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", step)


def run_and_cut(monkeypatch: pytest.MonkeyPatch, config: Pretrain, at: int) -> None:
    def cut() -> None:
        raise CutError

    with monkeypatch.context() as patch:
        at_batch(patch, at, cut)
        with pytest.raises(CutError):
            pretrain(config)
