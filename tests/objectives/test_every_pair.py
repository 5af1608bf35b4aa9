"""Every objective with every kind of maskable encoder and decoder: a dry run as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bat.cli.pretrain import main

ENCODERS = {
    "gated": [],
    "ungated": ["model.gate=false", "model.norm_order=pre", "model.pos_layout=grid"],
    "kaldi": ["frontend.kind=eat", "frontend.pad=fbank", "frontend.statistics=audioset-eat"],
    "eat": ["model.backbone=eat", "model.gate=false", "frontend.kind=eat"],
}
SMALL = ["recipe=toy", "model.width=48", "model.depth=2", "model.heads=2", "log.progress=false"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize(
    ("encoder", "decoder"), [*((name, "usual") for name in ENCODERS), ("gated", "cross")]
)
@pytest.mark.parametrize("objective", ["masked_latent", "mae", "eat", "sslam"])
def test_dry_run__of_every_pair_computes_a_loss(
    objective: str, encoder: str, decoder: str, cache: Path, tmp_path: Path, capsys
) -> None:
    words = [*SMALL, *ENCODERS[encoder], f"objective={objective}", f"data.cache={cache}"]
    words += ["objective.decoder_width=48", "objective.predict=0.5", f"out={tmp_path / 'run'}"]
    words += ["objective.decoder=cross"] if decoder == "cross" else []
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "dry run" in said.out + said.err
    assert not (tmp_path / "run").exists()
