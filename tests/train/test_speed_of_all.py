"""Compilation and activation checkpointing act in fine-tuning and probing too, where they can."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bat.nn.block
from bat.config.compose import compose
from bat.config.schema import Finetune, Pretrain, Probe
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.probe import probe
from bat.train.finetune import finetune
from bat.train.online import OnlineProbe
from bat.types import Grid
from bat.weights import export

BLOCKS = 2


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    model = BAT(width=16, depth=BLOCKS, heads=2, grid=Grid(13, 8))
    checkpoint = export(
        tmp_path / "export",
        backbone="bat", encoder=model.config(), weights={"student": model.state_dict()}, meta={},
    )  # fmt: skip
    return [
        "recipe=toy", f"checkpoint={checkpoint}", f"data.cache={tmp_path}/shards", "folds=[1]",
        "train.steps=2", "train.log_every=1", "log.progress=false",
    ]  # fmt: skip


@pytest.fixture
def compiled(monkeypatch) -> list[object]:
    """What was compiled, without a compiler."""
    real, seen = torch.compile, []

    def compile_(function, **keywords):
        seen.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_)
    return seen


def losses(out: Path) -> list[float]:
    file = next(iter(out.rglob("metrics.jsonl")))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_fine_tuning(words: list[str], compiled: list, tmp_path: Path, monkeypatch) -> None:
    recomputed: list[int] = []
    real = bat.nn.block.checkpoint

    def spy(*args, **keywords):
        recomputed.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr(bat.nn.block, "checkpoint", spy)
    found = {}
    for name, more in {
        "plain": [],
        "compiled": ["hardware.compile=blocks"],
        "recomputed": ["hardware.activation_checkpointing=true"],
    }.items():
        compiled.clear()
        recomputed.clear()
        out = finetune(compose(Finetune, "finetune", [*words, f"out={tmp_path}/{name}", *more]))
        found[name] = losses(out)
        assert len(compiled) == (BLOCKS if name == "compiled" else 0)
        assert len(recomputed) == (2 * BLOCKS if name == "recomputed" else 0)  # two steps
    assert len(found["plain"]) == 2
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["recomputed"] == pytest.approx(found["plain"], rel=1e-6)


def test_online_probes_have_every_setting_of_their_head() -> None:
    config = compose(Pretrain, "pretrain", ["recipe=toy", "online.head.dropout=0.3"])
    task = SimpleNamespace(per_class=20)
    online = SimpleNamespace(config=config, index=SimpleNamespace(classes=5), task=task)
    built = OnlineProbe.build(online, "cgp")
    assert built.dropout.p == 0.3
    assert len(built.prototypes) == config.online.head.prototypes


def test_probing(words: list[str], compiled: list, tmp_path: Path) -> None:
    more = [f"out={tmp_path}/probe", "hardware.compile=blocks", "methods=[linear]"]
    probe(compose(Probe, "probe", [*words, *more]))
    assert len(compiled) == BLOCKS
    with pytest.raises(UserError, match="activation_checkpointing: a frozen encoder"):
        compose(Probe, "probe", [*words, "hardware.activation_checkpointing=true"])
