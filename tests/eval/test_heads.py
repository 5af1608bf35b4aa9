"""Heads on disk: what is written is what is read, or an error."""

import json
import sys

import pytest
import torch

from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.heads import load_head, save_head
from bat.eval.loading import weights_digest
from bat.probes.base import build_probe, known_probes
from bat.types import Features, Grid

HEAD = {"hidden": 6, "prototypes": 6, "dropout": 0.1, "norm": False}


def _encoder(seed=0):
    torch.manual_seed(seed)
    return BAT(width=8, depth=2, heads=2, grid=Grid(3, 8)).eval()


def _save(folder, name="cgp", level="frame", encoder=None):
    shape = {"classes": 3, "width": 8, "depth": 2, "has_cls": True, "level": level}
    probe = build_probe(name, **shape, encoder=encoder, **HEAD)
    of = {"checkpoint": "A", "digest": weights_digest(encoder)} if encoder else {}
    meta = {"labels": ["a", "b", "c"], "encoder": of}
    save_head(folder, probe, name=name, head=HEAD, meta=meta)
    return probe.eval()


@pytest.mark.parametrize("name", list(known_probes()))
def test_load_head__equals_what_was_saved(tmp_path, name):
    level = "frame" if "frame" in known_probes()[name].levels else "clip"
    probe = _save(tmp_path, name, level, _encoder())
    again, config = load_head(tmp_path, encoder=_encoder())
    features = Features(
        patches=torch.randn(2, 4, 3, 8, 8),
        cls=torch.randn(2, 4, 8),
        entry=torch.randn(4, 3, 8, 8),
    )
    assert torch.equal(probe(features), again(features))
    assert config["labels"] == ["a", "b", "c"]
    assert not again.training
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_load_head__other_encoder_is_an_error(tmp_path):
    _save(tmp_path, "vqt", "clip", _encoder())
    with pytest.raises(UserError, match="there is none here"):
        load_head(tmp_path)
    with pytest.raises(UserError, match=r"trained on another encoder \(A\)"):
        load_head(tmp_path, encoder=_encoder(seed=1))


def test_load_head__damaged_or_foreign_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_head(tmp_path)
    _save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"]["classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        load_head(tmp_path)
    for key, value, said in (
        ("probe", None, "damaged"),
        ("settings", [1], "damaged"),
        ("settings", {"classes": 3}, "no cgp can be built"),
        ("settings", {**config["settings"], "classes": "three"}, "classes='three': a whole"),
        ("settings", {**config["settings"], "depth": 10**7}, "depth=10000000: a whole number"),
        ("settings", {**config["settings"], "prototypes": 10**7}, "prototypes=10000000: a whole"),
        ("settings", {**config["settings"], "dropout": float("nan")}, "dropout=nan: a number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=said):
            load_head(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "bat-export"}))
    with pytest.raises(UserError, match="not a head"):
        load_head(tmp_path)


def test_load_head__imports_outside_code_on_trust_only(tmp_path, monkeypatch):
    _save(tmp_path / "head")
    (tmp_path / "outside_probe.py").write_text("from bat.probes.cgp import CGP\n")
    config = json.loads((tmp_path / "head/config.json").read_text())
    config["probe"] = "outside_probe.CGP"
    (tmp_path / "head/config.json").write_text(json.dumps(config))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"'outside_probe\.CGP', which is not one of bat's own"):
        load_head(tmp_path / "head")
    assert "outside_probe" not in sys.modules
    probe, _ = load_head(tmp_path / "head", trust=True)
    assert type(probe).__name__ == "CGP"
    sys.modules.pop("outside_probe")
