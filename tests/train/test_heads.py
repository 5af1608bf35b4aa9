"""Heads on disk: what is written is what is read, or an error."""

import json

import pytest
import torch

from bat.probes.base import build_probe, known_probes
from bat.shapes import Features, UserError
from bat.train.heads import load_head, save_head

HEAD = {"prototypes": 6, "dropout": 0.1, "norm": False}


def _save(folder, name="cgp", level="frame"):
    probe = build_probe(name, classes=3, width=8, depth=2, has_cls=True, level=level, **HEAD)
    save_head(folder, probe, name=name, head=HEAD, meta={"labels": ["a", "b", "c"]})
    return probe.eval()


@pytest.mark.parametrize("name", list(known_probes()))
def test_round_trip(tmp_path, name):
    probe = _save(tmp_path, name)
    again, config = load_head(tmp_path)
    features = Features(patches=torch.randn(2, 4, 3, 2, 8), cls=torch.randn(2, 4, 8))
    assert torch.equal(probe(features), again(features))
    assert config["labels"] == ["a", "b", "c"]
    assert not again.training
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_head_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_head(tmp_path)
    _save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"]["classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "bat-export"}))
    with pytest.raises(UserError, match="not a head"):
        load_head(tmp_path)
